"""Convolution with a frozen weight: keeps nothing of its input.

The gradient of the input needs the weight only; ATen's convolution keeps the input even so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count

from lance_kernels.ops._checks import check, check_floating, check_same
from lance_kernels.ops._layout import memory_format_of
from lance_kernels.ops._registry import (
    apply,
    autocast_arguments,
    below_autograd,
    define,
    needs_grad,
    once_differentiable,
    without_autocast,
)


def frozen_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
) -> torch.Tensor:
    """A convolution whose weight takes no gradient.

    Args:
        x: `(B, C, ...)` with one to three spatial dimensions, float32, float64, bfloat16 or float16.
        weight: `(O, C / groups, ...)`; for a transposed one `(C, O / groups, ...)`.
        bias: `(O,)` or None; may require a gradient.
        stride: one number a spatial dimension.
        padding: one number a spatial dimension.
        dilation: one number a spatial dimension.
        transposed: transposed convolution.
        output_padding: one number a spatial dimension, transposed only.
        groups: channel groups.

    Returns:
        What `aten::convolution` returns, with the same gradients of `x` and `bias`.

    Raises:
        RuntimeError: `weight` requires a gradient.
    """
    y: torch.Tensor = torch.ops.lance.frozen_convolution(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return y


def _spread(numbers: Sequence[int], dimensions: int) -> list[int]:
    return list(numbers) * dimensions if len(numbers) == 1 else list(numbers)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> None:
    operator, dimensions = "frozen_convolution", x.dim() - 2
    check_floating(operator, "x", x)
    check_same(operator, x, (("weight", weight), ("bias", bias)))
    named = (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    for name, numbers, least in (*named, ("output_padding", output_padding, 0)):
        check(
            len(numbers) in (1, dimensions) and all(number >= least for number in numbers),
            f"lance::{operator}: {name} is {list(numbers)}; expected {dimensions} numbers of at least {least}, or one",
        )
    most = [max(pair) for pair in zip(_spread(stride, dimensions), _spread(dilation, dimensions))]
    check(
        all(extra < (size if transposed else 1) for extra, size in zip(_spread(output_padding, dimensions), most)),
        f"lance::{operator}: output_padding is {list(output_padding)}; expected less than stride {list(stride)} or "
        f"dilation {list(dilation)}, and 0 where nothing is transposed",
    )
    channels = weight.shape[0] if transposed else weight.shape[1] * groups if weight.dim() > 1 else -1
    check(
        1 <= dimensions <= 3
        and weight.dim() == x.dim()
        and groups >= 1
        and weight.shape[0] % groups == 0
        and x.shape[1] == channels,
        f"lance::{operator}: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}, groups is {groups}; expected "
        "(O, C / groups, *kernel), transposed (C, O / groups, *kernel), and (B, C, *spatial)",
    )
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    check(
        bias is None or (bias.dim() == 1 and bias.shape[0] == outputs),
        f"lance::{operator}: bias has shape {None if bias is None else tuple(bias.shape)}; expected ({outputs},)",
    )


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
    _check(x, weight, bias, *args)
    y: torch.Tensor = torch.ops.aten.convolution(x, weight, bias, *args)
    return y


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.memory_format, ctx.args = x.shape, memory_format_of(x), args
        ctx.bias_size = None if bias is None else list(bias.shape)
        return _reference(x, weight, bias, *args)

    @staticmethod
    @once_differentiable("frozen_convolution")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        # The input's values are not read for its own gradient; its memory format decides how ATen computes it.
        x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias_size, *ctx.args, (needs_x, False, needs_bias)
        )
        return grad_x if needs_x else None, None, grad_bias if needs_bias else None, *[None] * len(ctx.args)


def _autograd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
    if torch.is_grad_enabled():
        check(
            not weight.requires_grad,
            "lance::frozen_convolution: weight requires a gradient; expected a frozen one",
        )
    if needs_grad(x, weight, bias):
        y: torch.Tensor = apply(_FrozenConvolution, x, weight, bias, *args)
        return y
    with below_autograd():
        return frozen_convolution(x, weight, bias, *args)


def _autocast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        return frozen_convolution(x, weight, bias, *args)


def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool = False,
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return int(conv_flop_count(list(x_shape), list(weight_shape), list(out_shape), transposed=transposed))


define(
    "frozen_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> Tensor",
    reference=_reference,
    fake=_reference,
    autograd=_autograd,
    autocast=_autocast,
    flops=_flops,
)
