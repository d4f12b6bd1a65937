"""Dropout that keeps one bit an element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import check, check_floating
from lance_kernels.ops._layout import check_order, empty_in_order, from_order, in_order, memory_order
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    not_differentiable,
    once_differentiable,
    register_triton,
    writable,
)
from lance_kernels.ops.mask import check_mask


def dropout(x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    """Zeroes each element with probability `p` and divides the rest by `1 - p`, keeping 1 bit an element for backward.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.
        p: probability, at least 0 and below 1.

    Returns:
        Shape and dtype of `x`; the same draw, values and gradient as `torch.nn.functional.dropout` from the same state
        of the generator.

    Raises:
        RuntimeError: `p` is out of range or the dtype is not floating.
    """
    y: torch.Tensor = torch.ops.lance.dropout(x, p)
    return y


def _check_dropout(operator: str, x: torch.Tensor, p: float) -> None:
    check_floating(operator, "x", x)
    check(0 <= p < 1, f"lance::{operator}: p is {p}; expected a probability of at least 0 and below 1")


def _draw(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the kept elements, drawn the way ATen draws them for the device of `x`."""
    if p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        y, kept = torch.ops.aten.native_dropout(x, p, True)
        return y, kept
    noise = torch.empty_like(x).bernoulli_(1 - p)
    kept = noise > 0
    return x * noise.div_(1 - p), kept


def _scale(grad: torch.Tensor, p: float) -> torch.Tensor:
    return torch.ones((), dtype=grad.dtype, device=grad.device).div_(1 - p)


def _mask_reference(x: torch.Tensor, p: float, order: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    _check_dropout("dropout_mask", x, p)
    check_order("dropout_mask", x, order)
    y, kept = _draw(x, p)
    return from_order(in_order(y, order), order), torch.ops.lance.pack_mask(kept, order)


def _mask_fake(x: torch.Tensor, p: float, order: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    _check_dropout("dropout_mask", x, p)
    check_order("dropout_mask", x, order)
    return empty_in_order(x, order), x.new_empty([(x.numel() + 7) // 8], dtype=torch.uint8)


def check_dropout_grad(grad: torch.Tensor, mask: torch.Tensor, p: float, order: Sequence[int]) -> None:
    """Refuses what is not a gradient of dropout and its mask."""
    _check_dropout("dropout_grad", grad, p)
    check_order("dropout_grad", grad, order)
    check_mask("dropout_grad", mask, grad)


def dropout_grad_reference(grad: torch.Tensor, mask: torch.Tensor, p: float, order: Sequence[int]) -> torch.Tensor:
    """Reference of `lance::dropout_grad`."""
    check_dropout_grad(grad, mask, p, order)
    # Multiplied, not selected: a dropped infinity or NaN stays NaN, as in ATen.
    noise = torch.ops.lance.unpack_mask(mask, grad, order) * _scale(grad, p)
    return from_order(in_order(grad, order) * in_order(noise, order), order)


def _grad_fake(grad: torch.Tensor, mask: torch.Tensor, p: float, order: Sequence[int]) -> torch.Tensor:
    check_dropout_grad(grad, mask, p, order)
    return empty_in_order(grad, order)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        order = memory_order(x)
        if torch.compiler.is_compiling():
            y, kept = _draw(x, p)
            mask = torch.ops.lance.pack_mask(kept, order)
        else:
            y, mask = torch.ops.lance.dropout_mask(x, p, order)
        ctx.save_for_backward(mask)
        ctx.order, ctx.p = order, p
        return writable(y)

    @staticmethod
    @once_differentiable("dropout")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (mask,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return grad * (torch.ops.lance.unpack_mask(mask, grad, ctx.order) * _scale(grad, ctx.p)), None
        return torch.ops.lance.dropout_grad(grad, mask, ctx.p, ctx.order), None


def _dropout_autograd(x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    if needs_grad(x):
        _check_dropout("dropout", x, p)
        y: torch.Tensor = apply(_Dropout, x, p)
        return y
    with below_autograd():
        return dropout(x, p)


def _dropout_reference(x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    _check_dropout("dropout", x, p)
    return _draw(x, p)[0]


def _dropout_fake(x: torch.Tensor, p: float = 0.5) -> torch.Tensor:
    _check_dropout("dropout", x, p)
    return torch.empty_like(x)


define(
    "dropout_mask(Tensor x, float p, int[] order) -> (Tensor, Tensor)",
    reference=_mask_reference,
    fake=_mask_fake,
    autograd=not_differentiable("dropout_mask"),
    tags=(torch.Tag.nondeterministic_seeded,),
)
define(
    "dropout_grad(Tensor grad, Tensor mask, float p, int[] order) -> Tensor",
    reference=dropout_grad_reference,
    fake=_grad_fake,
    autograd=not_differentiable("dropout_grad"),
)
define(
    "dropout(Tensor x, float p=0.5) -> Tensor",
    reference=_dropout_reference,
    fake=_dropout_fake,
    autograd=_dropout_autograd,
    tags=(torch.Tag.nondeterministic_seeded,),
)
register_triton("dropout_grad", file="mask")
