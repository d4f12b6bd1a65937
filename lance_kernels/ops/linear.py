"""The linear layer that keeps a core of its input, and its weight gradient from that core.

With `x_hat = core x_0 U_0 ... x_{N-1} U_{N-1}` of shape `(..., D)` in place of `x`, `grad_weight = grad_output^T x_hat`
summed over the leading modes (arXiv 2509.21617, section 3). `x_hat` is never formed: either `grad_output` is projected
onto the factors of the leading modes, or the core is expanded along them, and the feature factor comes last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lance_kernels.ops._checks import accumulation_dtype, check, check_factors, check_same, factors_require_grad
from lance_kernels.ops._prepared import prepared
from lance_kernels.ops._registry import (
    apply,
    autocast_arguments,
    below_autograd,
    define,
    not_differentiable,
    once_differentiable,
    register_triton,
    without_autocast,
    writable,
)
from lance_kernels.ops.pack_core import packed_bytes
from lance_kernels.ops.tucker import Factors, mode_product, mode_product_flops, ranks_of


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight^T + bias`, keeping the core of `x` for the weight gradient.

    Args:
        x: `(..., D)`, float32, float64, bfloat16 or float16, any strides.
        weight: `(O, D)`, dtype of `x` (under autocast both are cast).
        bias: `(O,)` or None.
        factors: one `(size, rank)` matrix or None a mode of `x`.
        core_bits: 0 keeps the core in the dtype of `x`; 8, 4, 2 or 1 keep what `pack_core` makes of it.
        core_lengths: of each sample's core, how many leading values of the last mode are kept, by the indices of the
            modes between: an integer tensor of the shape of the core without its first and last mode. The rest count
            as zero. None keeps all.
        core_count: the sum of `core_lengths`.

    Returns:
        `y`, `(..., O)`, exactly `torch.nn.functional.linear`'s, and the core (the packed buffer with `core_bits`; in
        float16 divided by a power of two, see `kept_factors`). `y` is differentiable once in `x`,
        `weight` and `bias`; the core carries no gradient. Kept for the backward pass: the core when `weight` needs a
        gradient, `weight` when `x` does, the factors.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, a factor requires a gradient, or a second derivative is
            asked for.
    """
    y, core = torch.ops.lance.linear(x, weight, bias, list(factors), core_bits, core_lengths, core_count)
    return y, core


def linear_weight_grad(grad_output: torch.Tensor, core: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Weight gradient of a linear layer from the core of its input.

    Args:
        grad_output: `(..., O)`, float32, float64, bfloat16 or float16, any strides.
        core: the input's core, one rank a mode, dtype of `grad_output`.
        factors: one `(size, rank)` matrix or None a mode of the input.

    Returns:
        `(O, D)`, contiguous, dtype of `grad_output`, accumulated in float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    grad_weight: torch.Tensor = torch.ops.lance.linear_weight_grad(grad_output, core, list(factors))
    return grad_weight


def _check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, factors: Factors) -> None:
    check_factors("linear", "x", x, factors, side=0)
    check(
        weight.dim() == 2 and x.dim() > 0 and weight.shape[1] == x.shape[-1],
        lambda: (
            f"lance::linear: weight has shape {tuple(weight.shape)}; expected (O, D) with D that of x, whose shape is "
            f"{tuple(x.shape)}"
        ),
    )
    check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0]),
        lambda: (
            f"lance::linear: bias has shape {None if bias is None else tuple(bias.shape)}; expected "
            f"({weight.shape[0]},)"
        ),
    )
    check_same("linear", x, (("weight", weight), ("bias", bias)))


def kept_factors(factors: Factors, dtype: torch.dtype, expand: bool = False) -> list[torch.Tensor | None]:
    """The factors that a kept core is made with, or expanded with; in float16 not the layer's own.

    Orthonormal columns of `size` entries can make a core `sqrt(size)` times larger than the input, beyond float16's
    65504; divided by as much, one of small inputs falls below its 6e-8. So each factor is divided by a power of two of
    at least the fourth root of `size`, and multiplied by it to expand: a core is finite where no sample's root mean
    square exceeds 65504 over the fourth root of its projected size (3,325 for 3 x 224 x 224, 1,023 for 4096 x 4096).

    Args:
        factors: one `(size, rank)` matrix or None a mode of the input.
        dtype: the input's.
        expand: for `linear_weight_grad` and `convolution_weight_grad`.
    """
    if dtype != torch.float16:
        return list(factors)
    return [None if factor is None else scaled_factor(factor, factor.shape[0], expand) for factor in factors]


def scaled_factor(factor: torch.Tensor, size: int, expand: bool) -> torch.Tensor:
    """A factor divided by a power of two, at least the fourth root of its columns' `size`, or multiplied."""
    scale = 2.0 ** math.ceil(math.log2(max(size, 1)) / 4)

    def make() -> torch.Tensor:
        return factor.float() * (scale if expand else 1 / scale)

    # On a GPU every product has a launch, and launchers prepare what they are handed anew where it is new.
    return prepared([factor], ("scaled", scale, expand), make) if factor.is_cuda else make()


def core_places(core_lengths: torch.Tensor, core_count: int, last: int) -> torch.Tensor:
    """Places, in a sample's flattened core, of the values that `core_lengths` keeps, `(core_count,)`, int64.

    Args:
        core_lengths: how many leading values of the last mode are kept, for every index of the modes between.
        core_count: their sum.
        last: rank of the last mode.
    """

    def make() -> torch.Tensor:
        lengths = core_lengths.flatten().long()
        rows = torch.arange(lengths.shape[0], device=lengths.device)
        shifts = rows * last - (lengths.cumsum(0) - lengths)
        within = torch.arange(core_count, device=lengths.device)
        return shifts.repeat_interleave(lengths, output_size=core_count) + within

    # A dozen launches on a GPU; on the CPU they cost less than keeping the places.
    return prepared([core_lengths], ("places", core_count, last), make) if core_lengths.is_cuda else make()


def keep_core(
    x: torch.Tensor, factors: Factors, core_bits: int, core_lengths: torch.Tensor | None, core_count: int
) -> torch.Tensor:
    """The core of `x` by its `kept_factors`, its values within `core_lengths`, packed when `core_bits` is not 0."""
    # The core carries no gradient.
    with below_autograd():
        core: torch.Tensor = torch.ops.lance.tucker_project(x, kept_factors(factors, x.dtype))
    if core_lengths is not None:
        last = core.shape[-1]
        if core_lengths.device.type == "cpu":  # elsewhere it would be waited for
            message = f"lance: core_lengths reaches beyond the core's last mode; expected lengths from 0 to {last}"
            torch._assert_async(((core_lengths >= 0) & (core_lengths <= last)).all(), message)
        core = core.flatten(1).index_select(1, core_places(core_lengths, core_count, last))
    if core_bits:
        with below_autograd():
            core = torch.ops.lance.pack_core(core, core_bits)
    return core


def kept_size(x: torch.Tensor, factors: Factors, core_lengths: torch.Tensor | None, core_count: int) -> list[int]:
    """Shape of what is kept of the core of `x`, before it is packed."""
    return core_size(x, factors) if core_lengths is None else [x.shape[0], core_count]


def fake_core(
    x: torch.Tensor, factors: Factors, core_bits: int, core_lengths: torch.Tensor | None, core_count: int
) -> torch.Tensor:
    """Shape and dtype of what `keep_core` returns."""
    shape = kept_size(x, factors, core_lengths, core_count)
    return x.new_empty(packed_bytes(shape, core_bits), dtype=torch.uint8) if core_bits else x.new_empty(shape)


def restore_core(
    kept: torch.Tensor,
    size: Sequence[int],
    core_bits: int,
    core_lengths: torch.Tensor | None,
    core_count: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The core of shape `size` from what `keep_core` kept of it."""
    if core_bits:
        shape = size if core_lengths is None else [size[0], core_count]
        kept = torch.ops.lance.unpack_core(kept, shape, core_bits, dtype)
    if core_lengths is None:
        return kept
    places = core_places(core_lengths, core_count, size[-1])
    return kept.new_zeros(size[0], math.prod(size[1:])).index_copy(1, places, kept).view(tuple(size))


def check_lengths(
    operator: str, x: torch.Tensor, factors: Factors, core_lengths: torch.Tensor | None, core_count: int
) -> None:
    """Refuses lengths that do not fit the core; their values are not read."""
    if core_lengths is None:
        return
    size = core_size(x, factors)
    check(
        len(size) > 1
        and list(core_lengths.shape) == size[1:-1]
        and not (core_lengths.is_floating_point() or core_lengths.is_complex() or core_lengths.dtype == torch.bool)
        and core_lengths.device == x.device
        and 0 <= core_count <= math.prod(size[1:]),
        lambda: (
            f"lance::{operator}: core_lengths is {core_lengths.dtype} of shape {tuple(core_lengths.shape)} on "
            f"{core_lengths.device} and core_count {core_count}; expected integers of shape {tuple(size[1:-1])} on "
            f"{x.device} that sum to core_count, for a core of shape {tuple(size)} with two modes or more"
        ),
    )


def core_size(x: torch.Tensor, factors: Factors) -> list[int]:
    """Shape of the core of `x`."""
    return [size if factor is None else factor.shape[1] for size, factor in zip(x.shape, factors)]


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_linear(x, weight, bias, factors)
    check_lengths("linear", x, factors, core_lengths, core_count)
    return F.linear(x, weight, bias), keep_core(x, factors, core_bits, core_lengths, core_count)


def _linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_linear(x, weight, bias, factors)
    check_lengths("linear", x, factors, core_lengths, core_count)
    return x.new_empty(*x.shape[:-1], weight.shape[0]), fake_core(x, factors, core_bits, core_lengths, core_count)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        core_bits: int,
        core_lengths: torch.Tensor | None,
        core_count: int,
        *factors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check(not factors_require_grad(factors), "lance::linear: factors require a gradient; expected fixed factors")
        y, core = _linear_reference(x, weight, bias, factors, core_bits, core_lengths, core_count)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(core if needs_weight else None, weight if needs_x else None, core_lengths, *factors)
        ctx.core_bits, ctx.core_count, ctx.core_size, ctx.dtype = core_bits, core_count, core_size(x, factors), x.dtype
        ctx.mark_non_differentiable(core)
        ctx.set_materialize_grads(False)
        return writable(y), core

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        core, weight, lengths, *factors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if grad_output is not None:
            if needs_x:
                grad_x = grad_output @ weight
            if needs_weight:
                core = restore_core(core, ctx.core_size, ctx.core_bits, lengths, ctx.core_count, ctx.dtype)
                expanding = kept_factors(factors, ctx.dtype, expand=True)
                with below_autograd():
                    if needs_bias:
                        grad_weight, grad_bias = torch.ops.lance.linear_weight_bias_grad(grad_output, core, expanding)
                    else:
                        grad_weight = torch.ops.lance.linear_weight_grad(grad_output, core, expanding)
            elif needs_bias:
                grad_bias = _bias_grad(grad_output)
        return grad_x, grad_weight, grad_bias, None, None, None, *[None] * len(factors)


def _linear_autograd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, core = apply(_Linear, x, weight, bias, core_bits, core_lengths, core_count, *factors)
    return y, core


def _linear_autocast(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        return linear(x, weight, bias, factors, core_bits, core_lengths, core_count)


def _check_weight_grad(grad_output: torch.Tensor, core: torch.Tensor, factors: Factors) -> None:
    check_factors("linear_weight_grad", "core", core, factors, side=1)
    check_same("linear_weight_grad", grad_output, (("core", core),))
    leading = [size if factor is None else factor.shape[0] for size, factor in zip(core.shape, factors)][:-1]
    check(
        core.dim() > 0 and grad_output.dim() == core.dim() and list(grad_output.shape[:-1]) == leading,
        lambda: (
            f"lance::linear_weight_grad: grad_output has shape {tuple(grad_output.shape)}; expected ({leading}, O), "
            f"the input's leading modes as core, of shape {tuple(core.shape)}, and factors give them"
        ),
    )


def _weight_grad_reference(grad_output: torch.Tensor, core: torch.Tensor, factors: Factors) -> torch.Tensor:
    _check_weight_grad(grad_output, core, factors)
    wide = accumulation_dtype(core.dtype)
    grad, kept = grad_output.to(wide), core.to(wide)
    leading = [(mode, factor.to(wide)) for mode, factor in enumerate(factors[:-1]) if factor is not None]
    factor_shapes = [None if factor is None else factor.shape for factor in factors]
    if _weight_grad_plan(grad.shape, kept.shape, factor_shapes)[0]:
        for mode, factor in sorted(leading, key=lambda entry: entry[1].shape[1] / max(entry[1].shape[0], 1)):
            grad = mode_product(grad, factor.mT, mode)
    else:
        for mode, factor in leading:
            kept = mode_product(kept, factor, mode)
    product = grad.reshape(-1, grad.shape[-1]).mT @ kept.reshape(-1, kept.shape[-1])
    feature = factors[-1]
    return (product if feature is None else product @ feature.to(wide).mT).to(grad_output.dtype)


def _bias_grad(grad_output: torch.Tensor) -> torch.Tensor:
    # Summed in one order whatever the strides.
    return grad_output.reshape(math.prod(grad_output.shape[:-1]), grad_output.shape[-1]).sum(dim=0)


def _weight_bias_grad_reference(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.lance.linear_weight_grad(grad_output, core, factors), _bias_grad(grad_output)


def _weight_bias_grad_fake(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    return _weight_grad_fake(grad_output, core, factors), grad_output.new_empty(grad_output.shape[-1])


def _weight_grad_plan(
    grad_shape: Sequence[int], core_shape: Sequence[int], factor_shapes: Sequence[Sequence[int] | None]
) -> tuple[bool, int]:
    """Whether to project `grad_output` onto the leading factors, or else expand the core; and the operations needed."""
    leading = factor_shapes[:-1]
    outputs, features = grad_shape[-1], core_shape[-1]
    project = mode_product_flops(grad_shape, [*ranks_of(leading, side=1), None])
    project += 2 * math.prod(core_shape[:-1]) * outputs * features
    expand = mode_product_flops(core_shape, [*ranks_of(leading, side=0), None])
    expand += 2 * math.prod(grad_shape[:-1]) * outputs * features
    return project < expand, min(project, expand)


def _weight_grad_fake(grad_output: torch.Tensor, core: torch.Tensor, factors: Factors) -> torch.Tensor:
    _check_weight_grad(grad_output, core, factors)
    feature = factors[-1]
    return grad_output.new_empty(grad_output.shape[-1], core.shape[-1] if feature is None else feature.shape[0])


def weight_grad_flops(
    grad_shape: Sequence[int],
    core_shape: Sequence[int],
    factor_shapes: Sequence[Sequence[int] | None],
    **kwargs: Any,
) -> int:
    """Operations of the cheaper way, without those of a bias gradient."""
    _, total = _weight_grad_plan(grad_shape, core_shape, factor_shapes)
    feature = factor_shapes[-1]
    return total + (0 if feature is None else 2 * grad_shape[-1] * math.prod(feature))


def _linear_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    factor_shapes: Sequence[Sequence[int] | None],
    *args: Any,
    **kwargs: Any,
) -> int:
    project = mode_product_flops(x_shape, ranks_of(factor_shapes, side=1))
    return 2 * math.prod(x_shape) * weight_shape[0] + project


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor?[] factors, int core_bits=0, "
    "Tensor? core_lengths=None, SymInt core_count=0) -> (Tensor, Tensor)",
    reference=_linear_reference,
    fake=_linear_fake,
    autograd=_linear_autograd,
    autocast=_linear_autocast,
    flops=_linear_flops,
)
define(
    "linear_weight_grad(Tensor grad_output, Tensor core, Tensor?[] factors) -> Tensor",
    reference=_weight_grad_reference,
    fake=_weight_grad_fake,
    autograd=not_differentiable("linear_weight_grad"),
    flops=weight_grad_flops,
    tags=(torch.Tag.flexible_layout,),
)
define(
    "linear_weight_bias_grad(Tensor grad_output, Tensor core, Tensor?[] factors) -> (Tensor, Tensor)",
    reference=_weight_bias_grad_reference,
    fake=_weight_bias_grad_fake,
    autograd=not_differentiable("linear_weight_bias_grad"),
    flops=weight_grad_flops,
    tags=(torch.Tag.flexible_layout,),
)
register_triton("linear_weight_grad", "linear")
register_triton("linear_weight_bias_grad", "linear")
