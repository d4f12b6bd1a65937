"""`patch_gram_` on a GPU: Gram matrices of patches without a copy of them, in Triton.

A patch's value at row `(channel, tap)` and column `(sample, position)` lies in `x` at a sum of offsets: the sample's,
the channel's, and one a spatial mode from a table `(taps, positions)` that knows stride, dilation and every kind of
padding. All spatial modes but the last share one table. A program sums one tile of one group's matrix over all columns
and adds it, and its transpose below the diagonal. Products of patches with factors are convolutions and batched
products, which the library has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import matmul_precision
from lance_kernels.ops._padding import pad_pairs, padded_rows
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.patch import _check_gram, _gram_reference

TILE = 64  # rows and columns of the matrix a program has
DEPTH = 16  # columns of patches it takes at once


@triton.jit
def read_patches(
    x, outer, last, rows, columns, size, total, channel_step, sample_step, taps, last_taps, positions, width
):
    """Patches at `rows` (R,) and `columns` (K,), float32 (R, K); zero where either is outside, or in padding."""
    tap = rows % taps
    sample = columns // positions
    position = columns % positions
    inside = (rows < size)[:, None] & (columns < total)[None, :]
    outer_row = (tap // last_taps) * (positions // width)
    high = tl.load(outer + outer_row[:, None] + (position // width)[None, :], mask=inside, other=-1)
    last_row = (tap % last_taps) * width
    low = tl.load(last + last_row[:, None] + (position % width)[None, :], mask=inside, other=-1)
    offset = (rows // taps)[:, None] * channel_step + sample[None, :] * sample_step + high + low
    return tl.load(x + offset, mask=inside & (high >= 0) & (low >= 0), other=0.0).to(tl.float32)


@triton.jit
def patch_gram_kernel(
    gram,  # (groups, size, size) by strides
    x,
    outer,  # (outer taps, outer positions): offsets in x, -1 for padding
    last,  # (last taps, width): the same
    size,
    total,
    channels,
    channel_step,
    sample_step,
    taps,
    last_taps,
    positions,
    width,
    gram_group,
    gram_row,
    gram_column,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """gram[group] += patches patches^T, one tile on or above the diagonal and its transpose."""
    group = tl.program_id(2).to(tl.int64)
    upper, right = tl.program_id(0), tl.program_id(1)
    if upper <= right:
        rows = upper.to(tl.int64) * TILE + tl.arange(0, TILE)
        columns = right.to(tl.int64) * TILE + tl.arange(0, TILE)
        image = x + group * channels * channel_step
        sums = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, total, DEPTH):
            at = tl.arange(0, DEPTH).to(tl.int64) + start
            left = read_patches(
                image, outer, last, rows, at, size, total, channel_step, sample_step, taps, last_taps, positions, width
            )  # (TILE, DEPTH)
            other = read_patches(
                image,
                outer,
                last,
                columns,
                at,
                size,
                total,
                channel_step,
                sample_step,
                taps,
                last_taps,
                positions,
                width,
            )  # (TILE, DEPTH)
            sums = tl.dot(left, tl.trans(other), sums, input_precision=PRECISION)
        inside = (rows < size)[:, None] & (columns < size)[None, :]
        target = gram + group * gram_group + rows[:, None] * gram_row + columns[None, :] * gram_column
        before = tl.load(target, mask=inside, other=0.0)
        tl.store(target, before + sums, mask=inside)
        if upper < right:
            mirror = gram + group * gram_group + columns[None, :] * gram_row + rows[:, None] * gram_column
            before = tl.load(mirror, mask=inside, other=0.0)
            tl.store(mirror, before + sums, mask=inside)


def places(x: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets in `x` of what every tap reads at every position, -1 for padding.

    Args:
        x: `(B, C, *S)`.
        kernel: one number a spatial mode.
        geometry: the convolution's numbers.

    Returns:
        `(outer taps, outer positions)` of all spatial modes but the last, and `(taps, positions)` of the last; int64.
    """
    sizes = output_size(x.shape, [geometry.groups, x.shape[1] // geometry.groups, *kernel], geometry)[2:]
    pairs = pad_pairs(geometry.padding, len(kernel))
    tables = [torch.zeros(1, 1, dtype=torch.int64, device=x.device)]
    for mode, (taps, positions) in enumerate(zip(kernel, sizes)):
        extent = x.shape[2 + mode]
        rows = padded_rows(extent, *pairs[mode], geometry.padding_mode, x.device)
        tap = torch.arange(taps, device=x.device).unsqueeze(1)
        position = torch.arange(positions, device=x.device)
        row = rows[geometry.stride[mode] * position + geometry.dilation[mode] * tap]
        table = torch.where(row < extent, row * x.stride(2 + mode), -1)  # (taps, positions)
        if mode + 1 < len(kernel):
            both = tables[0][:, None, :, None] + table[None, :, None, :]
            known = (tables[0] >= 0)[:, None, :, None] & (table >= 0)[None, :, None, :]
            tables[0] = torch.where(known, both, -1).flatten(2, 3).flatten(0, 1)
        else:
            tables.append(table)
    return tables[0].contiguous(), tables[1].contiguous()


def patch_gram_(gram: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> None:
    """Launches the kernel behind `lance_kernels.ops.patch_gram_`; float64 takes the reference."""
    geometry = Geometry(*numbers)
    if torch.float64 in (x.dtype, gram.dtype):
        _gram_reference(gram, x, kernel, *geometry)
        return
    _check_gram(gram, x, kernel, geometry)
    if not x.numel() or not gram.numel():
        return
    outer, last = places(x, kernel, geometry)
    positions = outer.shape[1] * last.shape[1]
    tiles = triton.cdiv(gram.shape[1], TILE)
    patch_gram_kernel[(tiles, tiles, geometry.groups)](
        gram,
        x,
        outer,
        last,
        gram.shape[1],
        x.shape[0] * positions,
        x.shape[1] // geometry.groups,
        x.stride(1),
        x.stride(0),
        math.prod(kernel),
        kernel[-1],
        positions,
        last.shape[1],
        *gram.stride(),
        PRECISION=matmul_precision(x.dtype),
        TILE=TILE,
        DEPTH=DEPTH,
        num_warps=8,
    )
