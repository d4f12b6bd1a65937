"""Batch norm with fixed statistics, alone in backward and with the ReLU after it in both directions, in Triton.

`y = max((x - mean) weight / sqrt(var + eps) + bias, 0)`, at most `high`; bit `i % 8` of byte `i // 8` says that the
activation passes element `i` on. `grad_x = (bit ? grad : 0) / sqrt(var + eps) weight`.

A first launch makes two numbers a channel, so that an element costs no division: scale and shift, or for the gradient
the factors `1 / sqrt(var + eps)` and `weight`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv
from lance_kernels.kernels.mask import load_bits, store_bits
from lance_kernels.ops._layout import check_order, empty_in_order, in_order
from lance_kernels.ops.batch_norm import (
    check_batch_norm,
    check_relu_grad,
    frozen_grad_reference,
    mask_reference,
    relu_grad_reference,
)

BLOCK = 2048
NARROW = 2**31  # elements whose indices fit 32 bits


@triton.jit
def table_kernel(
    weight,  # (channels,), as are the next three
    bias,
    mean,
    var,
    table,  # (2, channels) float32
    eps,
    channels,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = channel < channels
    first = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + channel, mask=inside, other=1.0).to(tl.float32) + eps))
    second = tl.full([BLOCK], 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        second = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if FORWARD:
        first = first * second
        second = -tl.load(mean + channel, mask=inside, other=0.0).to(tl.float32) * first
        if HAS_BIAS:
            second = second + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(table + channel, first, mask=inside)
    tl.store(table + channels + channel, second, mask=inside)


@triton.jit
def look_up(table, start, channels, inner, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Both numbers of the channels of elements `start` to `start + BLOCK`.

    They are (BLOCK / 8, 8), or (BLOCK / 8, 1) where ALIGNED is "inner": eight elements never part channels. With
    "channels", eight elements are eight neighbouring channels.
    """
    first = (start // inner % channels).to(tl.int32)
    # How far the block starts behind its first channel; a channel that ends beyond the block may as well be shorter.
    length = tl.minimum(inner, 1 << 30).to(tl.int32)
    behind = length - tl.minimum(inner - start % inner, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    lane = tl.arange(0, 8)[None, :]  # (1, 8)
    if ALIGNED == "inner":
        channel = ((first + (behind + byte * 8) // length) % channels)[:, None]
    elif ALIGNED == "channels":
        channel = ((first + byte * 8) % channels)[:, None] + lane
        channel = tl.max_contiguous(tl.multiple_of(channel, [1, 8]), [1, 8])
    else:
        channel = (first + (behind + byte[:, None] * 8 + lane) // length) % channels
    return tl.load(table + channel), tl.load(table + channels + channel)


@triton.jit
def forward_kernel(
    x,  # (total,)
    table,  # (2, channels) float32: scale and shift
    y,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    high,
    total,
    channels,
    inner,  # elements between two channels
    ALIGNED: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK
    left = tl.minimum(total - start, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    inside = index < left
    scale, shift = look_up(table, start, channels, inner, ALIGNED, BLOCK)
    loaded = tl.load(x + start + index, mask=inside, other=0.0)
    # Rounded to the dtype of x before the activation sees it, as between two operators.
    value = (loaded.to(tl.float32) * scale + shift).to(loaded.dtype).to(tl.float32)
    if BOUNDED:
        keep = ((value <= 0) | (value >= high)) == 0
        raised = tl.where(value < 0, 0.0, value)
        result = tl.where(raised > high, high, raised)
    else:
        keep = (value <= 0) == 0
        result = tl.where(value < 0, 0.0, value)
    tl.store(y + start + index, result.to(loaded.dtype), mask=inside)
    store_bits(mask + start // 8, keep & inside, byte, byte * 8 < left)


@triton.jit
def grad_kernel(
    grad,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    table,  # (2, channels) float32: both factors
    out,  # (total,)
    total,
    channels,
    inner,  # elements between two channels
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK
    left = tl.minimum(total - start, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    index = byte[:, None] * 8 + tl.arange(0, 8)[None, :]  # (BLOCK / 8, 8)
    inside = index < left
    inverse, weight = look_up(table, start, channels, inner, ALIGNED, BLOCK)
    loaded = tl.load(grad + start + index, mask=inside, other=0.0)
    value = loaded.to(tl.float32)
    if MASKED:
        value = tl.where(load_bits(mask + start // 8, byte, byte * 8 < left), value, 0.0)
    tl.store(out + start + index, (value * inverse * weight).to(loaded.dtype), mask=inside)


def _table(
    weight: torch.Tensor | None, bias: torch.Tensor | None, mean: torch.Tensor | None, var: torch.Tensor, eps: float
) -> torch.Tensor:
    """Scale and shift of every channel; without a mean, both factors of the gradient."""
    channels = var.shape[0]
    table = torch.empty(2, channels, dtype=torch.float32, device=var.device)
    table_kernel[(cdiv(channels, BLOCK),)](
        *(table if vector is None else vector.contiguous() for vector in (weight, bias, mean, var)),
        table,
        eps,
        channels,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        FORWARD=mean is not None,
        BLOCK=BLOCK,
    )
    return table


def _places(x: torch.Tensor, order: Sequence[int]) -> dict[str, int | str | bool]:
    """How channels follow each other in memory."""
    inner = math.prod(x.shape[dim] for dim in order[list(order).index(1) + 1 :])
    aligned = "inner" if inner % 8 == 0 else "channels" if inner == 1 and x.shape[1] % 8 == 0 else "neither"
    return {"inner": inner, "ALIGNED": aligned, "WIDE": x.numel() > NARROW}


def batch_norm_relu_mask(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    high: float | None,
    order: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::batch_norm_relu_mask`; float64 takes the reference."""
    if x.dtype == torch.float64:
        return mask_reference(x, weight, bias, mean, var, eps, high, order)
    check_batch_norm("batch_norm_relu_mask", x, weight, bias, mean, var)
    check_order("batch_norm_relu_mask", x, order)
    flat, total = in_order(x, order), x.numel()
    y = empty_in_order(x, order)
    mask = torch.empty((total + 7) // 8, dtype=torch.uint8, device=x.device)
    if total:
        forward_kernel[(cdiv(total, BLOCK),)](
            flat,
            _table(weight, bias, mean, var, eps),
            y,
            mask,
            0.0 if high is None else high,
            total,
            x.shape[1],
            **_places(x, order),
            BOUNDED=high is not None,
            BLOCK=BLOCK,
        )
    return y, mask


def _grad(
    grad: torch.Tensor,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    var: torch.Tensor,
    eps: float,
    order: Sequence[int],
) -> torch.Tensor:
    flat, total = in_order(grad, order), grad.numel()
    out = empty_in_order(grad, order)
    if total:
        grad_kernel[(cdiv(total, BLOCK),)](
            flat,
            flat if mask is None else mask.contiguous(),
            _table(weight, None, None, var, eps),
            out,
            total,
            grad.shape[1],
            **_places(grad, order),
            MASKED=mask is not None,
            BLOCK=BLOCK,
        )
    return out


def batch_norm_frozen_grad(
    grad: torch.Tensor, weight: torch.Tensor | None, var: torch.Tensor, eps: float, order: Sequence[int]
) -> torch.Tensor:
    """`lance::batch_norm_frozen_grad`; float64 takes the reference."""
    if grad.dtype == torch.float64:
        return frozen_grad_reference(grad, weight, var, eps, order)
    check_batch_norm("batch_norm_frozen_grad", grad, weight, None, None, var)
    check_order("batch_norm_frozen_grad", grad, order)
    return _grad(grad, None, weight, var, eps, order)


def batch_norm_relu_grad(
    grad: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None,
    var: torch.Tensor,
    eps: float,
    order: Sequence[int],
) -> torch.Tensor:
    """`lance::batch_norm_relu_grad`; float64 takes the reference."""
    if grad.dtype == torch.float64:
        return relu_grad_reference(grad, mask, weight, var, eps, order)
    check_relu_grad(grad, mask, weight, var, order)
    return _grad(grad, mask, weight, var, eps, order)
