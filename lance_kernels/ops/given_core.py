"""The linear layer and the convolution for which another layer made the core already.

Two layers that read the same input (query and key, gate and up, a block's first convolution and its shortcut) have the
same core: the first call of `lance::linear` or `lance::convolution` makes it, and these take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lance_kernels.ops._checks import check, factors_require_grad
from lance_kernels.ops._registry import apply, autocast_arguments, define, without_autocast, writable
from lance_kernels.ops.convolution import Geometry, _Convolution, _product, product_flops, split_numbers
from lance_kernels.ops.linear import _check_linear, _Linear, _linear_flops, check_lengths, core_size, kept_size
from lance_kernels.ops.pack_core import check_bits, packed_bytes
from lance_kernels.ops.tucker import Factors


def linear_given_core(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    """`lance_kernels.ops.linear`'s `y` for a core made before.

    Args:
        x: `(..., D)`, float32, float64, bfloat16 or float16, any strides.
        weight: `(O, D)`, dtype of `x` (under autocast both are cast).
        bias: `(O,)` or None.
        core: the core that `linear` returned for this `x`, `factors` and `core_bits`.
        factors: one `(size, rank)` matrix or None a mode of `x`.
        core_bits: as for the call that made the core.
        core_lengths: as for the call that made the core.
        core_count: as for the call that made the core.

    Returns:
        `y`, `(..., O)`, differentiable once in `x`, `weight` and `bias`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, a factor requires a gradient, or a second derivative is
            asked for.
    """
    y: torch.Tensor = torch.ops.lance.linear_given_core(
        x, weight, bias, core, list(factors), core_bits, core_lengths, core_count
    )
    return y


def convolution_given_core(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    padding_mode: str = "zeros",
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    """`lance_kernels.ops.convolution`'s `y` for a core made before.

    Args:
        x: `(B, C, *S)` with one to three spatial modes, float32, float64, bfloat16 or float16, any strides.
        weight: `(O, C / groups, *K)`, dtype of `x` (under autocast both are cast).
        bias: `(O,)` or None.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode.
        dilation: one number a spatial mode.
        groups: number of groups; divides C and O.
        core: the core that `convolution` returned for this `x`, `factors` and `core_bits`.
        factors: one `(size, rank)` matrix or None a mode of `x`.
        core_bits: as for the call that made the core.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        core_lengths: as for the call that made the core.
        core_count: as for the call that made the core.

    Returns:
        `y`, `(B, O, *S')`, differentiable once in `x`, `weight` and `bias`.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit, a factor requires a gradient, or a second
            derivative is asked for.
    """
    y: torch.Tensor = torch.ops.lance.convolution_given_core(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        core,
        list(factors),
        core_bits,
        padding_mode,
        core_lengths,
        core_count,
    )
    return y


def _check_core(
    operator: str,
    x: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int,
    core_lengths: torch.Tensor | None,
    core_count: int,
) -> None:
    check_lengths(operator, x, factors, core_lengths, core_count)
    size = kept_size(x, factors, core_lengths, core_count)
    if core_bits:
        check_bits(operator, core_bits)
    expected, dtype = ([packed_bytes(size, core_bits)], torch.uint8) if core_bits else (size, x.dtype)
    check(
        list(core.shape) == expected and core.dtype == dtype and core.device == x.device,
        lambda: (
            f"lance::{operator}: core is {core.dtype} of shape {tuple(core.shape)} on {core.device}; expected {dtype} "
            f"of shape {tuple(expected)} on {x.device} for x of shape {tuple(x.shape)} and core_bits {core_bits}"
        ),
    )


def _linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    _check_linear(x, weight, bias, factors)
    _check_core("linear_given_core", x, core, factors, core_bits, core_lengths, core_count)
    return F.linear(x, weight, bias)


def _linear_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    _check_linear(x, weight, bias, factors)
    _check_core("linear_given_core", x, core, factors, core_bits, core_lengths, core_count)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _LinearGivenCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        core_bits: int,
        core_lengths: torch.Tensor | None,
        core_count: int,
        core: torch.Tensor,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        check(not factors_require_grad(factors), "lance::linear_given_core: factors require a gradient")
        y = _linear_reference(x, weight, bias, core, factors, core_bits, core_lengths, core_count)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(core if needs_weight else None, weight if needs_x else None, core_lengths, *factors)
        ctx.core_bits, ctx.core_count, ctx.core_size, ctx.dtype = core_bits, core_count, core_size(x, factors), x.dtype
        ctx.set_materialize_grads(False)
        return writable(y)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return *_Linear.backward(ctx, grad_output, None), None


def _linear_autograd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    y: torch.Tensor = apply(_LinearGivenCore, x, weight, bias, core_bits, core_lengths, core_count, core, *factors)
    return y


def _linear_autocast(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    core: torch.Tensor,
    factors: Factors,
    core_bits: int = 0,
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> torch.Tensor:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        return linear_given_core(x, weight, bias, core, factors, core_bits, core_lengths, core_count)


def _linear_given_core_flops(x_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _linear_flops(x_shape, weight_shape, None, [None] * len(x_shape))


def _split(*numbers: Any) -> tuple[torch.Tensor, tuple[Geometry, Factors, int, torch.Tensor | None, int]]:
    """The core, and the rest as `lance::convolution` has it."""
    return numbers[4], split_numbers(*numbers[:4], *numbers[5:])


def _convolution_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> torch.Tensor:
    core, (geometry, factors, core_bits, core_lengths, core_count) = _split(*numbers)
    y = _product(x, weight, bias, geometry, factors)
    _check_core("convolution_given_core", x, core, factors, core_bits, core_lengths, core_count)
    return y


class _ConvolutionGivenCore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        core_bits: int,
        core_lengths: torch.Tensor | None,
        core_count: int,
        core: torch.Tensor,
        *factors: torch.Tensor | None,
    ) -> torch.Tensor:
        check(not factors_require_grad(factors), "lance::convolution_given_core: factors require a gradient")
        y = _product(x, weight, bias, geometry, factors)
        _check_core("convolution_given_core", x, core, factors, core_bits, core_lengths, core_count)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(core if needs_weight else None, weight if needs_x else None, core_lengths, *factors)
        ctx.geometry, ctx.core_bits, ctx.core_count, ctx.dtype = geometry, core_bits, core_count, x.dtype
        ctx.core_size = core_size(x, factors)
        ctx.input_size, ctx.weight_size = x.shape, weight.shape
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return *_Convolution.backward(ctx, grad_output, None), None


def _convolution_autograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> torch.Tensor:
    core, (geometry, factors, core_bits, core_lengths, core_count) = _split(*numbers)
    y: torch.Tensor = apply(
        _ConvolutionGivenCore, x, weight, bias, geometry, core_bits, core_lengths, core_count, core, *factors
    )
    return y


def _convolution_autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> torch.Tensor:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        y: torch.Tensor = torch.ops.lance.convolution_given_core(x, weight, bias, *numbers)
    return y


define(
    "linear_given_core(Tensor x, Tensor weight, Tensor? bias, Tensor core, Tensor?[] factors, int core_bits=0, "
    "Tensor? core_lengths=None, SymInt core_count=0) -> Tensor",
    reference=_linear_reference,
    fake=_linear_fake,
    autograd=_linear_autograd,
    autocast=_linear_autocast,
    flops=_linear_given_core_flops,
)
define(
    "convolution_given_core(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    'int groups, Tensor core, Tensor?[] factors, int core_bits=0, str padding_mode="zeros", '
    "Tensor? core_lengths=None, SymInt core_count=0) -> Tensor",
    reference=_convolution_reference,
    fake=_convolution_reference,
    autograd=_convolution_autograd,
    autocast=_convolution_autocast,
    flops=product_flops,
)
