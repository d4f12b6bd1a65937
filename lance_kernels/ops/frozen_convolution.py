"""Convolution with a frozen weight: keeps nothing of its input.

The gradient of the input needs the weight only; ATen's convolution keeps the input even so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count

from lance_kernels.ops._checks import check, check_floating
from lance_kernels.ops._layout import memory_format_of
from lance_kernels.ops._registry import (
    apply,
    autocast_arguments,
    below_autograd,
    define,
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


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
    check_floating("frozen_convolution", "x", x)
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
        if x.requires_grad or (bias is not None and bias.requires_grad):
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
