"""Batch norm with fixed statistics, alone in backward and with the ReLU after it in both directions, in Triton.

`y = max((x - mean) weight / sqrt(var + eps) + bias, 0)`, at most `high`; bit `i % 8` of byte `i // 8` says that the
activation passes element `i` on. `grad_x = (bit ? grad : 0) / sqrt(var + eps) weight`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.ops._layout import check_order, empty_in_order, in_order
from lance_kernels.ops.batch_norm import (
    check_batch_norm,
    check_relu_grad,
    frozen_grad_reference,
    mask_reference,
    relu_grad_reference,
)

BLOCK = 2048


@triton.jit
def forward_kernel(
    x,  # (total,)
    weight,  # (channels,), as are the next three
    bias,
    mean,
    var,
    y,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    eps,
    high,
    total,
    channels,
    inner,  # elements between two channels
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    lane = tl.arange(0, 8)  # (8,)
    index = byte[:, None] * 8 + lane[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    channel = index // inner % channels
    loaded = tl.load(x + index, mask=inside, other=0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + channel, mask=inside, other=1.0).to(tl.float32) + eps))
    if HAS_WEIGHT:
        scale = scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = -tl.load(mean + channel, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_BIAS:
        shift = shift + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    # Rounded to the dtype of x before the activation sees it, as between two operators.
    value = (loaded.to(tl.float32) * scale + shift).to(loaded.dtype).to(tl.float32)
    if BOUNDED:
        keep = ((value <= 0) | (value >= high)) == 0
        raised = tl.where(value < 0, 0.0, value)
        result = tl.where(raised > high, high, raised)
    else:
        keep = (value <= 0) == 0
        result = tl.where(value < 0, 0.0, value)
    tl.store(y + index, result.to(loaded.dtype), mask=inside)
    bits = tl.where(keep & inside, 1 << lane[None, :], 0)
    tl.store(mask + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < total)


@triton.jit
def grad_kernel(
    grad,  # (total,)
    mask,  # (ceil(total / 8),) uint8
    weight,  # (channels,), as is var
    var,
    out,  # (total,)
    eps,
    total,
    channels,
    inner,  # elements between two channels
    HAS_WEIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # (BLOCK / 8,)
    lane = tl.arange(0, 8)  # (8,)
    index = byte[:, None] * 8 + lane[None, :]  # (BLOCK / 8, 8)
    inside = index < total
    channel = index // inner % channels
    loaded = tl.load(grad + index, mask=inside, other=0.0)
    value = loaded.to(tl.float32)
    if MASKED:
        bits = tl.load(mask + byte, mask=byte * 8 < total, other=0).to(tl.int32)
        value = tl.where(((bits[:, None] >> lane[None, :]) & 1) != 0, value, 0.0)
    value = value * tl.div_rn(1.0, tl.sqrt_rn(tl.load(var + channel, mask=inside, other=1.0).to(tl.float32) + eps))
    if HAS_WEIGHT:
        value = value * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + index, value.to(loaded.dtype), mask=inside)


def _inner(x: torch.Tensor, order: Sequence[int]) -> int:
    """Elements between two channels of `x` in memory."""
    return math.prod(x.shape[dim] for dim in order[list(order).index(1) + 1 :])


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
        forward_kernel[(triton.cdiv(total, BLOCK),)](
            flat,
            mean if weight is None else weight,
            mean if bias is None else bias,
            mean,
            var,
            y,
            mask,
            eps,
            0.0 if high is None else high,
            total,
            x.shape[1],
            _inner(x, order),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
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
        grad_kernel[(triton.cdiv(total, BLOCK),)](
            flat,
            var if mask is None else mask.contiguous(),
            var if weight is None else weight,
            var,
            out,
            eps,
            total,
            grad.shape[1],
            _inner(grad, order),
            HAS_WEIGHT=weight is not None,
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
