"""Piecewise linear activations with one bit an element, in Triton.

`y = relu(x)`, `min(max(x, low), high)` or `x > 0 ? x : slope x`; bit `i % 8` of byte `i // 8` says that the derivative
at element `i` is one. `grad_x = bit ? grad : 0`, or `slope grad` for the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.ops._checks import check_floating
from lance_kernels.ops._layout import check_order, from_order, in_order
from lance_kernels.ops.mask import check_mask, masked_grad_reference, masked_in_place_reference, masked_reference

BLOCK = 4096


@triton.jit
def activate_kernel(
    x,  # (total,)
    y,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    low,
    high,
    slope,
    total,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    lane = tl.arange(0, 8)  # (8,)
    index = byte[:, None] * 8 + lane[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    loaded = tl.load(x + index, mask=inside, other=0.0)
    value = loaded.to(tl.float32)
    # Comparisons are false for NaN, which passes through and keeps its gradient but for the leaky one.
    if KIND == "leaky":
        keep = value > 0
        result = tl.where(keep, value, value * slope)
    elif KIND == "clamp":
        keep = ((value <= low) | (value >= high)) == 0
        raised = tl.where(value < low, low, value)
        result = tl.where(raised > high, high, raised)
    else:
        keep = (value <= 0) == 0
        result = tl.where(value < 0, 0.0, value)
    tl.store(y + index, result.to(loaded.dtype), mask=inside)
    bits = tl.where(keep & inside, 1 << lane[None, :], 0)
    tl.store(mask + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < total)


@triton.jit
def select_kernel(
    grad,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    out,  # (total,)
    slope,
    total,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    lane = tl.arange(0, 8)  # (8,)
    index = byte[:, None] * 8 + lane[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    value = tl.load(grad + index, mask=inside, other=0.0)
    bits = tl.load(mask + byte, mask=byte * 8 < total, other=0).to(tl.int32)
    keep = ((bits[:, None] >> lane[None, :]) & 1) != 0
    other = (value.to(tl.float32) * slope).to(value.dtype) if SCALED else tl.zeros_like(value)
    tl.store(out + index, tl.where(keep, value, other), mask=inside)


def _activate(
    flat: torch.Tensor, result: torch.Tensor, low: float | None, high: float | None, slope: float | None
) -> torch.Tensor:
    total = flat.numel()
    mask = torch.empty((total + 7) // 8, dtype=torch.uint8, device=flat.device)
    kind = "leaky" if slope is not None else "relu" if low is None or high is None else "clamp"
    if total:
        activate_kernel[(triton.cdiv(total, BLOCK),)](
            flat, result, mask, low or 0.0, high or 0.0, slope or 0.0, total, KIND=kind, BLOCK=BLOCK
        )
    return mask


def masked_activation(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::masked_activation`; float64, whose bounds a launch would round to float32, takes the reference."""
    if x.dtype == torch.float64:
        return masked_reference(x, low, high, slope, order)
    check_floating("masked_activation", "x", x)
    check_order("masked_activation", x, order)
    flat = in_order(x, order)
    result = torch.empty_like(flat)
    mask = _activate(flat, result, low, high, slope)
    return from_order(result, order), mask


def masked_activation_(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    """`lance::masked_activation_`."""
    if x.dtype == torch.float64:
        return masked_in_place_reference(x, low, high, slope, order)
    check_floating("masked_activation", "x", x)
    check_order("masked_activation", x, order)
    flat = in_order(x, order)
    mask = _activate(flat, flat, low, high, slope)
    if flat.data_ptr() != x.data_ptr():
        x.copy_(from_order(flat, order))
    return mask


def masked_activation_grad(
    grad: torch.Tensor, mask: torch.Tensor, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    """`lance::masked_activation_grad`."""
    if grad.dtype == torch.float64:
        return masked_grad_reference(grad, mask, slope, order)
    check_floating("masked_activation_grad", "grad", grad)
    check_order("masked_activation_grad", grad, order)
    check_mask("masked_activation_grad", mask, grad)
    flat = in_order(grad, order)
    out = torch.empty_like(flat)
    total = flat.numel()
    if total:
        select_kernel[(triton.cdiv(total, BLOCK),)](
            flat, mask.contiguous(), out, slope or 0.0, total, SCALED=slope is not None, BLOCK=BLOCK
        )
    return from_order(out, order)
