"""`patch_gram_` on a GPU: Gram matrices of patches without a copy of them, in Triton.

A patch's value at row `(channel, tap)` and column `(sample, position)` lies in `x` at a sum of offsets: the sample's,
the channel's, and one a spatial mode from a table `(taps, positions)` that knows stride, dilation and every kind of
padding. All spatial modes but the last share one table. A program sums one tile of one group's matrix, on or above the
diagonal, over all columns, or over a part of them where there are few tiles; the parts are added in order. Products of
patches with factors are convolutions and batched products, which the library has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv, matmul_precision, splits_for
from lance_kernels.ops._padding import pad_pairs, padded_rows
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.patch import _check_gram, _gram_reference

TILE = 64  # rows and columns of the matrix a program has
DEPTH = 32  # columns of patches it takes at once
NARROW = 2**30  # offsets in x that fit 32 bits, with room for sums of them


@triton.jit
def locate_rows(rows, channel_step, taps, last_taps, outer_positions, width):
    """What of the patches' places does not change along rows (R,): offsets in both tables and in `x`."""
    tap = rows % taps
    return tap // last_taps * outer_positions, tap % last_taps * width, rows // taps * channel_step


@triton.jit
def read_patches(image, outer, last, outer_row, last_row, channel, known, outer_column, last_column, sample, inside):
    """Patches (R, K) at rows (R,), where `known`, and columns (K,), where `inside`; zero elsewhere, and in padding."""
    place = tl.load(outer + (outer_row[:, None] + outer_column[None, :]))  # (R, K)
    place += tl.load(last + (last_row[:, None] + last_column[None, :]))
    inside = known[:, None] & inside[None, :] & (place >= 0)
    return tl.load(image + (channel[:, None] + sample[None, :] + place), mask=inside, other=0.0)


@triton.jit
def patch_gram_kernel(
    gram,  # (splits, groups, size, size) by strides
    x,
    outer,  # (outer taps, outer positions): offsets in x, or a negative number for padding
    last,  # (last taps, width): the same
    pairs,  # (2, pair_count): row and column of the tiles on or above the diagonal
    pair_count,
    groups,
    size,
    total,
    split_columns,
    channels,
    channel_step,
    sample_step,
    taps,
    last_taps,
    positions,
    width,
    gram_split,
    gram_group,
    gram_row,
    gram_column,
    ADDS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """gram[split, group] (+)= patches patches^T over the split's columns, one tile and its transpose."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    pair = tl.program_id(0) % pair_count
    group = (tl.program_id(0) // pair_count % groups).to(tl.int64)
    split = (tl.program_id(0) // pair_count // groups).to(tl.int64)
    upper, right = tl.load(pairs + pair), tl.load(pairs + pair_count + pair)
    rows = upper.to(INDEX) * TILE + tl.arange(0, TILE)  # (TILE,)
    columns = right.to(INDEX) * TILE + tl.arange(0, TILE)  # (TILE,)
    outer_positions = positions // width
    row_outer, row_last, row_channel = locate_rows(rows, channel_step, taps, last_taps, outer_positions, width)
    column_outer, column_last, column_channel = locate_rows(
        columns, channel_step, taps, last_taps, outer_positions, width
    )
    image = x + group * channels * channel_step
    first = split * split_columns
    end = tl.minimum(first + split_columns, total)
    sample = tl.zeros([DEPTH], dtype=INDEX) + (first // positions).to(INDEX)  # (DEPTH,)
    position = (first % positions).to(INDEX) + tl.arange(0, DEPTH)  # (DEPTH,)
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(first, end, DEPTH):
        sample += position // positions
        position = position % positions
        inside = tl.arange(0, DEPTH) < end - start
        high, low, begin = position // width, position % width, sample * sample_step
        left = read_patches(
            image, outer, last, row_outer, row_last, row_channel, rows < size, high, low, begin, inside
        )  # (TILE, DEPTH)
        other = read_patches(
            image, outer, last, column_outer, column_last, column_channel, columns < size, high, low, begin, inside
        )  # (TILE, DEPTH)
        # Products of 16-bit numbers are exact in float32.
        sums = tl.dot(left, tl.trans(other), sums, input_precision=PRECISION)
        position += DEPTH
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    corner = gram + split * gram_split + group * gram_group
    wide_rows, wide_columns = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    target = corner + wide_rows * gram_row + wide_columns * gram_column
    tl.store(target, tl.load(target, mask=inside, other=0.0) + sums if ADDS else sums, mask=inside)
    if upper < right:
        mirror = corner + wide_columns * gram_row + wide_rows * gram_column
        tl.store(mirror, tl.load(mirror, mask=inside, other=0.0) + sums if ADDS else sums, mask=inside)


def places(x: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets in `x` of what every tap reads at every position; for padding a number that makes all sums negative.

    Args:
        x: `(B, C, *S)`.
        kernel: one number a spatial mode.
        geometry: the convolution's numbers.

    Returns:
        `(outer taps, outer positions)` of all spatial modes but the last, and `(taps, positions)` of the last; int32
        where they fit.
    """
    sizes = output_size(x.shape, [geometry.groups, x.shape[1] // geometry.groups, *kernel], geometry)[2:]
    pairs = pad_pairs(geometry.padding, len(kernel))
    span = sum((size - 1) * step for size, step in zip(x.shape[2:], x.stride()[2:]))
    dtype, padding = (torch.int32, -(2**30)) if span < NARROW else (torch.int64, -(2**62))
    tables = [torch.zeros(1, 1, dtype=torch.int64, device=x.device)]
    for mode, (taps, positions) in enumerate(zip(kernel, sizes)):
        extent = x.shape[2 + mode]
        rows = padded_rows(extent, *pairs[mode], geometry.padding_mode, x.device)
        tap = torch.arange(taps, device=x.device).unsqueeze(1)
        position = torch.arange(positions, device=x.device)
        row = rows[geometry.stride[mode] * position + geometry.dilation[mode] * tap]
        table = torch.where(row < extent, row * x.stride(2 + mode), padding)  # (taps, positions)
        if mode + 1 < len(kernel):
            both = tables[0][:, None, :, None] + table[None, :, None, :]
            known = (tables[0] >= 0)[:, None, :, None] & (table >= 0)[None, :, None, :]
            tables[0] = torch.where(known, both, padding).flatten(2, 3).flatten(0, 1)
        else:
            tables.append(table)
    return tables[0].to(dtype).contiguous(), tables[1].to(dtype).contiguous()


def patch_gram_(gram: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> None:
    """Launches the kernel behind `lance_kernels.ops.patch_gram_`; float64 takes the reference."""
    geometry = Geometry.of(*numbers)
    if torch.float64 in (x.dtype, gram.dtype):
        _gram_reference(gram, x, kernel, *geometry)
        return
    _check_gram(gram, x, kernel, geometry)
    if not x.numel() or not gram.numel():
        return
    outer, last = places(x, kernel, geometry)
    positions = outer.shape[1] * last.shape[1]
    size, total = gram.shape[1], x.shape[0] * positions
    pairs = torch.triu_indices(*[cdiv(size, TILE)] * 2, dtype=torch.int32, device=x.device)
    programs, steps = pairs.shape[1] * geometry.groups, cdiv(total, DEPTH)
    split_steps = cdiv(steps, splits_for(programs, steps, gram.numel() * 4, x.numel() * x.itemsize))
    splits = cdiv(steps, split_steps)
    span = sum((length - 1) * step for length, step in zip(x.shape, x.stride()))
    sums = gram.unsqueeze(0) if splits == 1 else gram.new_empty(splits, *gram.shape, dtype=torch.float32)
    patch_gram_kernel[(programs * splits,)](
        sums,
        x,
        outer,
        last,
        pairs,
        pairs.shape[1],
        geometry.groups,
        size,
        total,
        split_steps * DEPTH,
        x.shape[1] // geometry.groups,
        x.stride(1),
        x.stride(0),
        math.prod(kernel),
        kernel[-1],
        positions,
        last.shape[1],
        *sums.stride(),
        ADDS=splits == 1,
        WIDE=max(span, total, size, outer.numel(), last.numel()) > NARROW,
        PRECISION=matmul_precision(x.dtype),
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=8,
    )
    if splits > 1:
        gram.add_(sums.sum(0))
