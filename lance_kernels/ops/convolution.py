"""The convolution that keeps a core of its input: 1-D, 2-D and 3-D, as `aten::convolution`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import conv_flop_count

from lance_kernels.ops._checks import MOST_NUMBER, check, check_factors, check_same, factors_require_grad, kept_by_sizes
from lance_kernels.ops._padding import MODES, pad_pairs, pad_spatial, unpad_spatial_grad
from lance_kernels.ops._registry import (
    apply,
    autocast_arguments,
    below_autograd,
    define,
    once_differentiable,
    without_autocast,
)
from lance_kernels.ops.linear import check_lengths, core_size, fake_core, keep_core, kept_factors, restore_core
from lance_kernels.ops.tucker import Factors, mode_product_flops, ranks_of


class Geometry(NamedTuple):
    """What a convolution is, apart from its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"

    @classmethod
    def of(
        cls,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        padding_mode: str = "zeros",
    ) -> Geometry:
        """The geometry of an operator's arguments: with tuples for lists it can be a key."""
        return cls(tuple(stride), tuple(padding), tuple(dilation), groups, padding_mode)


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factors: Factors,
    core_bits: int = 0,
    padding_mode: str = "zeros",
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution of `x` with `weight`, keeping the core of `x` for the weight gradient.

    Args:
        x: `(B, C, *S)` with one to three spatial modes, float32, float64, bfloat16 or float16, any strides.
        weight: `(O, C / groups, *K)`, dtype of `x` (under autocast both are cast).
        bias: `(O,)` or None.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode.
        dilation: one number a spatial mode.
        groups: number of groups; divides C and O.
        factors: one `(size, rank)` matrix or None a mode of `x`.
        core_bits: 0 keeps the core in the dtype of `x`; 8, 4, 2 or 1 keep what `pack_core` makes of it.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        core_lengths: of each sample's core, how many leading values of the last mode are kept, by the indices of the
            modes between: an integer tensor of the shape of the core without its first and last mode. The rest count
            as zero. None keeps all.
        core_count: the sum of `core_lengths`.

    Returns:
        `y`, `(B, O, *S')`, exactly PyTorch's, and the core (the packed buffer with `core_bits`; in float16 divided by a
        power of two, see `kept_factors`). `y` is differentiable once in `x`, `weight` and `bias`;
        the core carries no gradient. Kept for the backward pass: the core when `weight` needs a gradient, `weight` when
        `x` does, the factors.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit, a factor requires a gradient, or a second
            derivative is asked for.
    """
    y, core = torch.ops.lance.convolution(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        list(factors),
        core_bits,
        padding_mode,
        core_lengths,
        core_count,
    )
    return y, core


@kept_by_sizes
def check_geometry(
    operator: str, input_size: Sequence[int], weight_size: Sequence[int], geometry: Geometry
) -> Sequence[tuple[int, int]]:
    """Refuses a geometry that does not fit `input_size` and `weight_size`; returns the padding as pairs."""
    dimensions = len(input_size) - 2
    check(
        1 <= dimensions <= 3 and len(weight_size) == dimensions + 2,
        lambda: (
            f"lance::{operator}: weight has size {tuple(weight_size)} and the input {tuple(input_size)}; expected "
            "(O, C / groups, *kernel) and (B, C, *spatial) with one to three spatial modes"
        ),
    )
    for argument, values in (("stride", geometry.stride), ("dilation", geometry.dilation)):
        if len(values) != dimensions or not all(1 <= value <= MOST_NUMBER for value in values):
            raise RuntimeError(
                f"lance::{operator}: {argument} is {list(values)}; expected {dimensions} numbers from 1 to "
                f"{MOST_NUMBER}"
            )
    check(
        len(geometry.padding) in (dimensions, 2 * dimensions)
        and all(0 <= value <= MOST_NUMBER for value in geometry.padding),
        lambda: (
            f"lance::{operator}: padding is {list(geometry.padding)}; expected {dimensions} or {2 * dimensions} "
            f"numbers from 0 to {MOST_NUMBER}"
        ),
    )
    check(
        geometry.padding_mode in MODES,
        lambda: f"lance::{operator}: padding_mode is {geometry.padding_mode!r}; expected one of {', '.join(MODES)}",
    )
    check(
        geometry.groups >= 1
        and weight_size[0] % geometry.groups == 0
        and input_size[1] == weight_size[1] * geometry.groups,
        lambda: (
            f"lance::{operator}: weight has size {tuple(weight_size)}, the input {tuple(input_size)} and groups is "
            f"{geometry.groups}; expected C = weight's second size times groups, and O a multiple of groups"
        ),
    )
    pairs = pad_pairs(geometry.padding, dimensions)
    limits = {"zeros": None, "replicate": None, "reflect": -1, "circular": 0}
    limit = limits[geometry.padding_mode]
    check(
        limit is None or all(max(pair) <= size + limit for size, pair in zip(input_size[2:], pairs)),
        lambda: (
            f"lance::{operator}: padding {list(geometry.padding)} is too large for {geometry.padding_mode} padding of "
            f"an input of size {tuple(input_size)}"
        ),
    )
    check(
        all(
            kernel >= 1 and size + sum(pair) >= dilation * (kernel - 1) + 1
            for size, kernel, pair, dilation in zip(input_size[2:], weight_size[2:], pairs, geometry.dilation)
        ),
        lambda: (
            f"lance::{operator}: weight has size {tuple(weight_size)}, larger than the padded input of size "
            f"{tuple(input_size)} with padding {list(geometry.padding)} and dilation {list(geometry.dilation)}"
        ),
    )
    return tuple(pairs)


def output_size(input_size: Sequence[int], weight_size: Sequence[int], geometry: Geometry) -> list[int]:
    """Shape of the convolution's output."""
    pairs = pad_pairs(geometry.padding, len(input_size) - 2)
    spatial = [
        (size + sum(pair) - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, pair, stride, dilation in zip(
            input_size[2:], weight_size[2:], pairs, geometry.stride, geometry.dilation
        )
    ]
    return [input_size[0], weight_size[0], *spatial]


def _check_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, factors: Factors
) -> Sequence[tuple[int, int]]:
    check_factors("convolution", "x", x, factors, side=0)
    pairs = check_geometry("convolution", x.shape, weight.shape, geometry)
    check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == weight.shape[0]),
        lambda: (
            f"lance::convolution: bias has shape {None if bias is None else tuple(bias.shape)}; expected "
            f"({weight.shape[0]},)"
        ),
    )
    check_same("convolution", x, (("weight", weight), ("bias", bias)))
    return pairs


def _split_padding(pairs: Sequence[tuple[int, int]], mode: str) -> tuple[list[int], list[tuple[int, int]]]:
    """What the library's convolution pads itself, and what has to be padded before it.

    The split of an asymmetric padding is that of PyTorch's `padding='same'`, so that the result has the same bits.
    """
    if mode != "zeros":
        return [0] * len(pairs), list(pairs)
    inner = [min(pair) for pair in pairs]
    return inner, [(before - least, after - least) for (before, after), least in zip(pairs, inner)]


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, factors: Factors
) -> torch.Tensor:
    """The library's convolution, its arguments checked."""
    pairs = _check_convolution(x, weight, bias, geometry, factors)
    inner, outer = _split_padding(pairs, geometry.padding_mode)
    y: torch.Tensor = torch.ops.aten.convolution(
        pad_spatial(x, outer, geometry.padding_mode),
        weight,
        bias,
        geometry.stride,
        inner,
        geometry.dilation,
        False,
        [0] * len(inner),
        geometry.groups,
    )
    return y


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    factors: Factors,
    core_bits: int,
    core_lengths: torch.Tensor | None,
    core_count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _product(x, weight, bias, geometry, factors)
    check_lengths("convolution", x, factors, core_lengths, core_count)
    return y, keep_core(x, factors, core_bits, core_lengths, core_count)


def _input_grad(
    grad_output: torch.Tensor, weight: torch.Tensor, input_size: Sequence[int], geometry: Geometry
) -> torch.Tensor:
    """Gradient in `x`: the transposed convolution, which needs no tensor of the size of `x` but its result."""
    if grad_output.numel() == 0:
        return grad_output.new_zeros(input_size)
    inner, outer, unreached = _input_grad_sizes(tuple(input_size), weight.shape, grad_output.shape, geometry)
    grad: torch.Tensor = torch.ops.aten.convolution(
        grad_output, weight, None, geometry.stride, inner, geometry.dilation, True, unreached, geometry.groups
    )
    return unpad_spatial_grad(grad, input_size[2:], outer, geometry.padding_mode)


@kept_by_sizes
def _input_grad_sizes(
    input_size: Sequence[int], weight_size: Sequence[int], output: Sequence[int], geometry: Geometry
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """What the library pads, what was padded before it, and rows behind that it does not reach."""
    inner, outer = _split_padding(pad_pairs(geometry.padding, len(input_size) - 2), geometry.padding_mode)
    # Rows at the end that no kernel position reached when the stride does not divide.
    unreached = [
        size + sum(pair) - ((outputs - 1) * stride - 2 * pad + dilation * (kernel - 1) + 1)
        for size, pair, outputs, stride, pad, dilation, kernel in zip(
            input_size[2:], outer, output[2:], geometry.stride, inner, geometry.dilation, weight_size[2:]
        )
    ]
    return inner, outer, unreached


def bias_grad(grad_output: torch.Tensor) -> torch.Tensor:
    """Gradient of a convolution's bias, `(O,)`, from `(B, O, *S')`."""
    return grad_output.sum(dim=[0, *range(2, grad_output.dim())])


class _Convolution(torch.autograd.Function):
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
        *factors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check(not factors_require_grad(factors), "lance::convolution: factors require a gradient; expected fixed ones")
        y, core = _forward(x, weight, bias, geometry, factors, core_bits, core_lengths, core_count)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(core if needs_weight else None, weight if needs_x else None, core_lengths, *factors)
        ctx.geometry, ctx.core_bits, ctx.core_count, ctx.dtype = geometry, core_bits, core_count, x.dtype
        ctx.core_size = core_size(x, factors)
        ctx.input_size, ctx.weight_size = x.shape, weight.shape
        ctx.mark_non_differentiable(core)
        ctx.set_materialize_grads(False)
        return y, core

    @staticmethod
    @once_differentiable("convolution")
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        core, weight, lengths, *factors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if grad_output is not None:
            if needs_x:
                grad_x = _input_grad(grad_output, weight, ctx.input_size, ctx.geometry)
            if needs_weight:
                core = restore_core(core, ctx.core_size, ctx.core_bits, lengths, ctx.core_count, ctx.dtype)
                expanding = kept_factors(factors, ctx.dtype, expand=True)
                arguments = (grad_output, core, expanding, ctx.weight_size, *ctx.geometry)
                with below_autograd():
                    if needs_bias:
                        grad_weight, grad_bias = torch.ops.lance.convolution_weight_bias_grad(*arguments)
                    else:
                        grad_weight = torch.ops.lance.convolution_weight_grad(*arguments)
            elif needs_bias:
                grad_bias = bias_grad(grad_output)
        return grad_x, grad_weight, grad_bias, None, None, None, None, *[None] * len(factors)


def split_numbers(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factors: Factors,
    core_bits: int = 0,
    padding_mode: str = "zeros",
    core_lengths: torch.Tensor | None = None,
    core_count: int = 0,
) -> tuple[Geometry, Factors, int, torch.Tensor | None, int]:
    """Geometry, factors, and the core's bits, lengths and count, from what follows the tensors in a call."""
    geometry = Geometry.of(stride, padding, dilation, groups, padding_mode)
    return geometry, factors, core_bits, core_lengths, core_count


def _convolution_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, weight, bias, *split_numbers(*numbers))


def _convolution_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry, factors, core_bits, core_lengths, core_count = split_numbers(*numbers)
    # Forwarding to the library's fake convolution gives its strides.
    y = _product(x, weight, bias, geometry, factors)
    check_lengths("convolution", x, factors, core_lengths, core_count)
    return y, fake_core(x, factors, core_bits, core_lengths, core_count)


def _convolution_autograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry, factors, core_bits, core_lengths, core_count = split_numbers(*numbers)
    y, core = apply(_Convolution, x, weight, bias, geometry, core_bits, core_lengths, core_count, *factors)
    return y, core


def _convolution_autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        y, core = torch.ops.lance.convolution(x, weight, bias, *numbers)
    return y, core


def product_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any
) -> int:
    """Floating point operations of the convolution alone."""
    return int(conv_flop_count(list(x_shape), list(weight_shape), list(out_shape), transposed=False))


def _convolution_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    *numbers: Any,
    out_shape: Sequence[Any],
    **kwargs: Any,
) -> int:
    factor_shapes = numbers[4]
    product = product_flops(x_shape, weight_shape, out_shape=out_shape[0])
    return product + mode_product_flops(x_shape, ranks_of(factor_shapes, side=1))


define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    'Tensor?[] factors, int core_bits=0, str padding_mode="zeros", Tensor? core_lengths=None, '
    "SymInt core_count=0) -> (Tensor, Tensor)",
    reference=_convolution_reference,
    fake=_convolution_fake,
    autograd=_convolution_autograd,
    autocast=_convolution_autocast,
    flops=_convolution_flops,
)
