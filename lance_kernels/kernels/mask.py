"""Piecewise linear activations with one bit an element, in Triton.

`y = relu(x)`, `min(max(x, low), high)` or `x > 0 ? x : slope x`; bit `i % 8` of byte `i // 8` says that the derivative
at element `i` is one. `grad_x = bit ? grad : 0`, or `slope grad` for the last. Dropout's is `grad (bit ? scale : 0)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv
from lance_kernels.ops._checks import check_floating
from lance_kernels.ops._layout import check_order, empty_in_order, from_order, in_order
from lance_kernels.ops.dropout import check_dropout_grad, dropout_grad_reference
from lance_kernels.ops.mask import (
    check_bits,
    check_mask,
    masked_grad_reference,
    masked_in_place_reference,
    masked_reference,
)

BLOCK = 4096


@triton.jit
def store_bits(mask, keep, byte, inside):
    """Stores one bit for each element of `keep` (B, 8) at bytes `byte` (B,), those that are not `inside` (B,) aside."""
    bits = tl.where(keep, 1 << tl.arange(0, 8)[None, :], 0)  # (B, 8)
    tl.store(mask + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=inside)


@triton.jit
def load_bits(mask, byte, inside):
    """Undoes `store_bits`: bool (B, 8), false where not `inside` (B,)."""
    bits = tl.load(mask + byte, mask=inside, other=0).to(tl.int32)  # (B,)
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def pack_kernel(
    elements,  # (total,) uint8
    mask,  # (ceil(total / 8),) uint8
    total,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    keep = tl.load(elements + index, mask=index < total, other=0) != 0
    store_bits(mask, keep, byte, byte * 8 < total)


@triton.jit
def unpack_kernel(
    mask,  # (ceil(total / 8),) uint8
    elements,  # (total,) uint8
    total,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    keep = load_bits(mask, byte, byte * 8 < total)
    tl.store(elements + index, keep.to(tl.uint8), mask=index < total)


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
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
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
    store_bits(mask, keep & inside, byte, byte * 8 < total)


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
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    value = tl.load(grad + index, mask=inside, other=0.0)
    keep = load_bits(mask, byte, byte * 8 < total)
    other = (value.to(tl.float32) * slope).to(value.dtype) if SCALED else tl.zeros_like(value)
    tl.store(out + index, tl.where(keep, value, other), mask=inside)


@triton.jit
def dropout_grad_kernel(
    grad,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    out,  # (total,)
    scale,
    total,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    value = tl.load(grad + index, mask=inside, other=0.0)
    # Multiplied, not selected: a dropped infinity or NaN stays NaN, as in ATen.
    noise = tl.where(load_bits(mask, byte, byte * 8 < total), scale, 0.0)
    tl.store(out + index, (value.to(tl.float32) * noise).to(value.dtype), mask=inside)


def pack_mask(bits: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """`lance::pack_mask`."""
    check_bits(bits, order)
    total = bits.numel()
    mask = torch.empty((total + 7) // 8, dtype=torch.uint8, device=bits.device)
    if total:
        flat = in_order(bits, order).view(torch.uint8)
        pack_kernel[(cdiv(total, BLOCK),)](flat, mask, total, BLOCK=BLOCK)
    return mask


def unpack_mask(mask: torch.Tensor, like: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """`lance::unpack_mask`."""
    check_order("unpack_mask", like, order)
    check_mask("unpack_mask", mask, like)
    total = like.numel()
    bits = empty_in_order(like, order, torch.bool)
    if total:
        unpack_kernel[(cdiv(total, BLOCK),)](mask.contiguous(), bits.view(torch.uint8), total, BLOCK=BLOCK)
    return bits


def dropout_grad(grad: torch.Tensor, mask: torch.Tensor, p: float, order: Sequence[int]) -> torch.Tensor:
    """`lance::dropout_grad`, scaled in float32 as ATen does on CUDA; float64 takes the reference."""
    if grad.dtype == torch.float64:
        return dropout_grad_reference(grad, mask, p, order)
    check_dropout_grad(grad, mask, p, order)
    flat, total = in_order(grad, order), grad.numel()
    out = torch.empty_like(flat)
    if total:
        dropout_grad_kernel[(cdiv(total, BLOCK),)](flat, mask.contiguous(), out, 1 / (1 - p), total, BLOCK=BLOCK)
    return from_order(out, order)


def _activate(
    flat: torch.Tensor, result: torch.Tensor, low: float | None, high: float | None, slope: float | None
) -> torch.Tensor:
    total = flat.numel()
    mask = torch.empty((total + 7) // 8, dtype=torch.uint8, device=flat.device)
    kind = "leaky" if slope is not None else "relu" if low is None or high is None else "clamp"
    if total:
        activate_kernel[(cdiv(total, BLOCK),)](
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
        select_kernel[(cdiv(total, BLOCK),)](
            flat, mask.contiguous(), out, slope or 0.0, total, SCALED=slope is not None, BLOCK=BLOCK
        )
    return from_order(out, order)
