"""Codes of an activation's derivative, in Triton; values and meaning are those of `lance_kernels/ops/activation.py`.

`code = round(derivative(x) steps) + zero`, the highest code for NaN, and `grad_x = grad (code - zero) / steps`. Two
4-bit codes share a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv
from lance_kernels.ops._layout import check_order, from_order, in_order
from lance_kernels.ops.activation import (
    KINDS,
    check_codes,
    check_kind,
    code_bytes,
    codes_reference,
    grad_reference,
)

BLOCK = 1024  # bytes of codes a program takes


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def bounded(x, limit):
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """Derivative at float32 `x`; beyond the bounds it is constant in every dtype."""
    if KIND == "gelu":
        v = bounded(x, 9.0)
        result = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    elif KIND == "gelu_tanh":
        v = bounded(x, 9.0)
        t = 2.0 * logistic(bounded(1.5957691216057308 * (v + 0.044715 * v * v * v), 80.0)) - 1.0
        result = 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * v * v)
    elif KIND == "silu" or KIND == "quick_gelu":
        v = bounded(x if KIND == "silu" else 1.702 * x, 80.0)
        s = logistic(v)
        result = s * (1.0 + v * (1.0 - s))
    elif KIND == "hardswish":
        result = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0))
    elif KIND == "sigmoid":
        s = logistic(bounded(x, 80.0))
        result = s * (1.0 - s)
    elif KIND == "tanh":
        t = 2.0 * logistic(bounded(2.0 * x, 80.0)) - 1.0
        result = 1.0 - t * t
    else:
        result = tl.where((x > -3.0) & (x < 3.0), 1.0 / 6.0, 0.0)
    return result


@triton.jit
def codes_kernel(
    x,  # (total,)
    codes,  # (total,) or (ceil(total / 2),) uint8
    total,
    KIND: tl.constexpr,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    MISSING: tl.constexpr = 2**BITS - 1
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    lane = tl.arange(0, PER_BYTE)  # (PER_BYTE,)
    index = byte[:, None] * PER_BYTE + lane[None, :]  # (BLOCK, PER_BYTE)
    inside = index < total
    value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    # The magic number rounds to the nearest integer, ties to even.
    rounded = (derivative(value, KIND) * STEPS + 12582912.0) - 12582912.0 + ZERO
    code = bounded(rounded - MISSING / 2, MISSING / 2 - 0.5) + MISSING / 2
    if KIND != "hardsigmoid":
        code = tl.where(value == value, code, 1.0 * MISSING)
    single = tl.where(inside, code, 0.0).to(tl.int32)
    packed = tl.sum(single << (lane[None, :] * BITS), axis=1)  # (BLOCK,)
    tl.store(codes + byte, packed.to(tl.uint8), mask=byte * PER_BYTE < total)


@triton.jit
def grad_kernel(
    grad,  # (total,)
    codes,  # (total,) or (ceil(total / 2),) uint8
    out,  # (total,)
    total,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    MISSING: tl.constexpr = 2**BITS - 1
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    lane = tl.arange(0, PER_BYTE)  # (PER_BYTE,)
    index = byte[:, None] * PER_BYTE + lane[None, :]  # (BLOCK, PER_BYTE)
    inside = index < total
    packed = tl.load(codes + byte, mask=byte * PER_BYTE < total, other=0).to(tl.int32)
    code = (packed[:, None] >> (lane[None, :] * BITS)) & MISSING
    value = (code - ZERO).to(tl.float32) / STEPS
    value = tl.where(code == MISSING, float("nan"), value)
    loaded = tl.load(grad + index, mask=inside, other=0.0)
    tl.store(out + index, (loaded.to(tl.float32) * value).to(loaded.dtype), mask=inside)


def activation_codes(x: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    """`lance::activation_codes`; float64 takes the reference."""
    if x.dtype == torch.float64:
        return codes_reference(x, kind, bits, order)
    check_kind("activation_codes", x, kind, bits)
    check_order("activation_codes", x, order)
    flat = in_order(x, order)
    codes = torch.empty(code_bytes(x, bits), dtype=torch.uint8, device=x.device)
    grid = KINDS[kind].grids[bits]
    if codes.numel():
        codes_kernel[(cdiv(codes.numel(), BLOCK),)](
            flat, codes, flat.numel(), KIND=kind, STEPS=grid.steps, ZERO=grid.zero, BITS=bits, BLOCK=BLOCK
        )
    return codes


def activation_grad(
    grad: torch.Tensor, codes: torch.Tensor, kind: str, bits: int, order: Sequence[int]
) -> torch.Tensor:
    """`lance::activation_grad`; float64 takes the reference."""
    if grad.dtype == torch.float64:
        return grad_reference(grad, codes, kind, bits, order)
    check_codes(grad, codes, kind, bits, order)
    flat = in_order(grad, order)
    out = torch.empty_like(flat)
    grid = KINDS[kind].grids[bits]
    if codes.numel():
        grad_kernel[(cdiv(codes.numel(), BLOCK),)](
            flat, codes.contiguous(), out, flat.numel(), STEPS=grid.steps, ZERO=grid.zero, BITS=bits, BLOCK=BLOCK
        )
    return from_order(out, order)
