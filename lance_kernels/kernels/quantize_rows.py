"""`quantize_rows` and `dequantize_rows` on a GPU.

`code = round((x - center) / step)` with one step a row, its largest deviation over 127. Two launches: the largest
deviations of parts of every row, then steps and codes. Memory is `(outer, rows, inner)`; item `k` of a row lies at
`outer` index `k // inner` and `inner` index `k % inner`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv, next_power_of_two
from lance_kernels.ops._layout import empty_in_order, in_order
from lance_kernels.ops.quantize_rows import (
    check_dequantize,
    check_quantize,
    dequantize_reference,
    quantize_reference,
)

BLOCK = 2048  # elements a program holds
PROGRAMS = 512  # programs that the first launch should have, whatever the device
MOST_PARTS = 64


@triton.jit
def largest_kernel(
    x,  # (outer, rows, inner)
    center,  # (rows,)
    largest,  # (rows, parts) float32
    rows,
    items,  # elements of a row
    inner,
    part_items,  # elements of a part
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Largest deviation of one part of ROWS rows; infinity where there is a NaN."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    part = tl.program_id(1).to(tl.int64)
    middle = tl.zeros([ROWS], dtype=tl.float32)
    if CENTERED:
        middle = tl.load(center + row, mask=row < rows, other=0.0).to(tl.float32)
    best = tl.zeros([ROWS], dtype=tl.float32)
    end = tl.minimum((part + 1) * part_items, items)
    for start in range(part * part_items, end, ITEMS):
        item = start + tl.arange(0, ITEMS)  # (ITEMS,)
        inside = (row < rows)[:, None] & (item < end)[None, :]
        place = ((item // inner)[None, :] * rows + row[:, None]) * inner + (item % inner)[None, :]
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - middle[:, None]
        deviation = tl.where(value == value, tl.abs(value), float("inf"))
        best = tl.maximum(best, tl.max(tl.where(inside, deviation, 0.0), axis=1))
    tl.store(largest + row * tl.num_programs(1) + part, best, mask=row < rows)


@triton.jit
def codes_kernel(
    x,  # (outer, rows, inner)
    center,  # (rows,)
    largest,  # (rows, parts) float32
    codes,  # (outer, rows, inner) int8
    steps,  # (rows,) float32
    rows,
    items,
    inner,
    parts,
    blocks,  # of ITEMS items in a row
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Steps of ROWS rows, and codes of ITEMS items of each."""
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    row = group.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    item = block.to(tl.int64) * ITEMS + tl.arange(0, ITEMS)  # (ITEMS,)
    part = tl.arange(0, PARTS)
    known = (row < rows)[:, None] & (part < parts)[None, :]
    best = tl.max(tl.load(largest + row[:, None] * parts + part[None, :], mask=known, other=0.0), axis=1)
    finite = best < float("inf")
    step = tl.div_rn(best, 127.0)  # (ROWS,)
    positive = finite & (step > 0)
    inverse = tl.div_rn(1.0, tl.where(positive, step, 1.0))
    usable = positive & (inverse < float("inf"))
    inverse = tl.where(usable, inverse, 0.0)
    step = tl.where(usable, step, tl.where(finite, 0.0, float("nan")))
    tl.store(steps + row, step, mask=(row < rows) & (block == 0))
    inside = (row < rows)[:, None] & (item < items)[None, :]
    place = ((item // inner)[None, :] * rows + row[:, None]) * inner + (item % inner)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        value = value - tl.load(center + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    # The magic number rounds to the nearest integer, ties to even.
    rounded = (tl.where(usable[:, None], value * inverse[:, None], 0.0) + 12582912.0) - 12582912.0
    bounded = tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    tl.store(codes + place, bounded.to(tl.int8), mask=inside)


@triton.jit
def values_kernel(
    codes,  # (total,) int8
    steps,  # (rows,)
    out,  # (total,)
    total,
    rows,
    inner,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = index < total
    code = tl.load(codes + index, mask=inside, other=0).to(tl.float32)
    step = tl.load(steps + index // inner % rows, mask=inside, other=0.0)
    tl.store(out + index, (code * step).to(out.dtype.element_ty), mask=inside)


def tile(rows: int, items: int, inner: int) -> tuple[int, int]:
    """Rows and items of a block: along a row where its items are neighbours, across rows where those are."""
    across = 2 if inner > 1 else min(64, max(2, next_power_of_two(rows)))
    along = min(BLOCK // across, max(16, next_power_of_two(items)))
    return max(across, min(BLOCK // along, next_power_of_two(rows))), along


def quantize_rows(
    x: torch.Tensor, center: torch.Tensor | None, outer: int, rows: int, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::quantize_rows`; float64, and no elements, take the reference."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return quantize_reference(x, center, outer, rows, order)
    check_quantize(x, center, outer, rows, order)
    flat = in_order(x, order)
    inner, items = x.numel() // (outer * rows), x.numel() // rows
    height, width = tile(rows, items, inner)
    groups = cdiv(rows, height)
    parts = min(MOST_PARTS, cdiv(items, width), cdiv(PROGRAMS, groups))
    largest = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
    codes = torch.empty(x.numel(), dtype=torch.int8, device=x.device)
    steps = torch.empty(rows, dtype=torch.float32, device=x.device)
    middle = steps if center is None else center.contiguous()
    shape = {"CENTERED": center is not None, "ROWS": height, "ITEMS": width}
    part_items = cdiv(cdiv(items, parts), width) * width
    largest_kernel[(groups, parts)](flat, middle, largest, rows, items, inner, part_items, **shape)
    blocks = cdiv(items, width)
    codes_kernel[(groups * blocks,)](
        flat,
        middle,
        largest,
        codes,
        steps,
        rows,
        items,
        inner,
        parts,
        blocks,
        **shape,
        PARTS=max(2, next_power_of_two(parts)),
    )
    return codes, steps


def dequantize_rows(
    codes: torch.Tensor, steps: torch.Tensor, outer: int, like: torch.Tensor, order: Sequence[int]
) -> torch.Tensor:
    """`lance::dequantize_rows`; float64, and no elements, take the reference."""
    total, rows = like.numel(), steps.shape[0]
    if like.dtype == torch.float64 or total == 0:
        return dequantize_reference(codes, steps, outer, like, order)
    check_dequantize(codes, steps, outer, like, order)
    out = empty_in_order(like, order)
    values_kernel[(cdiv(total, BLOCK),)](
        codes.contiguous(), steps.contiguous(), out, total, rows, total // (outer * rows), BLOCK=BLOCK
    )
    return out
