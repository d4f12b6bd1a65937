"""`tucker_project` on a GPU: every factor of a call in one pass over `x`, in Triton.

In memory order `x` is a stack of matrices `X_b (streamed mode, summed mode)`. A program takes rows of one, sums
`T = X_b F` over the summed mode with its factor `F`, and adds `T^T G` with the streamed mode's factor `G` to the core
`(rank of F, rank of G)`; without a `G`, `T` is the result. Neighbouring modes share a factor, the Kronecker product of
theirs, while that is small. What a pass leaves over is a small core, which the library's products finish.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import (
    MAX_ALIGN_BYTES,
    Tile,
    alignment,
    by_preference,
    kronecker,
    launch_fitting,
    matmul_precision,
    nearest,
    power_of_two,
    splits_for,
    stages_for,
)
from lance_kernels.kernels._reduction import sum_parts
from lance_kernels.ops._checks import check_factors
from lance_kernels.ops.tucker import Factors, _project_reference, mode_product

MAX_KRONECKER = 2**18  # elements, half a megabyte of bfloat16
MAX_RANK = 256
MAX_CORE = 2**14  # elements of the core that a program keeps

# Of an H100: the rank whose products take as long as the reads; how much longer reads take that lie apart; terms of the
# sum and elements of x that could be read while a program is between two tiles and while the library finishes a mode.
BALANCED_RANK, UNORDERED, TERMS_BETWEEN_TILES, ELEMENTS_A_PRODUCT = 150, 8.0, 128, 1.5e7


@triton.jit
def project_kernel(
    x,  # (outer, inner, stream, total) by strides
    first,  # (total, R)
    second,  # (stream, Q) float32
    core,  # (splits, outer, inner, R or stream, Q or R) by strides
    inner,
    stream,
    total,
    splits,
    outer_step,
    inner_step,
    stream_step,
    total_step,
    core_split,
    core_outer,
    core_inner,
    core_stream,
    core_first,
    first_rank,
    second_rank,
    STREAM_UNIT: tl.constexpr,
    TOTAL_UNIT: tl.constexpr,
    STREAM_CONTIGUOUS: tl.constexpr,
    TOTAL_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    STREAM: tl.constexpr,
    SUM: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Sizes and steps come divided by their units, so that the compiler sees what divides them.
    stream_size = stream * STREAM_UNIT
    total_size = total * TOTAL_UNIT
    stream_stride = 1 if STREAM_CONTIGUOUS else tl.cast(stream_step, tl.int64) * ALIGN
    total_stride = 1 if TOTAL_CONTIGUOUS else tl.cast(total_step, tl.int64) * ALIGN
    program = tl.program_id(0)
    tiles = tl.cdiv(stream_size, STREAM * BLOCKS)
    parts = splits if TWO_SIDED else tiles
    matrix, split = program // parts, program % parts
    outer = (matrix // inner).to(tl.int64)
    innermost = (matrix % inner).to(tl.int64)
    base = x + (outer * outer_step + innermost * inner_step) * ALIGN
    target = core + outer * core_outer + innermost * core_inner
    if TWO_SIDED:
        target += split.to(tl.int64) * core_split
        share = tl.cdiv(tiles, splits)
        begin, end = split * share, tl.minimum((split + 1) * share, tiles)
    else:
        begin, end = split, split + 1
    r = tl.arange(0, R).to(tl.int64)
    q = tl.arange(0, Q).to(tl.int64)
    result = tl.zeros((R, Q), dtype=tl.float32)
    for tile in range(begin, end):
        s = (tile * STREAM * BLOCKS + tl.arange(0, STREAM)).to(tl.int64)  # (STREAM,)
        rows = base + s * stream_stride
        inside = s < stream_size
        sums = tl.zeros((STREAM, R), dtype=tl.float32)
        if BLOCKS == 2:
            more = s + STREAM < stream_size
            other = tl.zeros((STREAM, R), dtype=tl.float32)
        for start in range(0, total_size, SUM):
            k = (start + tl.arange(0, SUM)).to(tl.int64)  # (SUM,)
            known = k < total_size
            places = rows[:, None] + k[None, :] * total_stride
            factor = tl.load(first + k[:, None] * R + r[None, :], mask=known[:, None], other=0.0)  # (SUM, R)
            block = tl.load(places, mask=inside[:, None] & known[None, :], other=0.0)  # (STREAM, SUM)
            sums = tl.dot(block, factor, sums, input_precision=PRECISION)
            if BLOCKS == 2:
                block = tl.load(places + STREAM * stream_stride, mask=more[:, None] & known[None, :], other=0.0)
                other = tl.dot(block, factor, other, input_precision=PRECISION)
        if TWO_SIDED:
            places = second + s[:, None] * Q + q[None, :]
            factor = tl.load(places, mask=inside[:, None], other=0.0)  # (STREAM, Q)
            result = tl.dot(tl.trans(nearest(sums, PRECISION)), factor, result, input_precision=PRECISION)
            if BLOCKS == 2:
                factor = tl.load(places + STREAM * Q, mask=more[:, None], other=0.0)
                result = tl.dot(tl.trans(nearest(other, PRECISION)), factor, result, input_precision=PRECISION)
        else:
            places = target + s[:, None] * core_stream + r[None, :] * core_first
            kept = r[None, :] < first_rank
            tl.store(places, sums.to(core.dtype.element_ty), mask=inside[:, None] & kept)
            if BLOCKS == 2:
                places += STREAM * core_stream
                tl.store(places, other.to(core.dtype.element_ty), mask=more[:, None] & kept)
    if TWO_SIDED:
        places = target + q[None, :] * core_stream + r[:, None] * core_first
        kept = (r[:, None] < first_rank) & (q[None, :] < second_rank)
        tl.store(places, result.to(core.dtype.element_ty), mask=kept)


class Group(NamedTuple):
    """Modes that lie side by side in memory, as one.

    Attributes:
        modes: the modes, slowest first.
        size: product of their sizes.
        stride: stride of the fastest.
        rank: product of their ranks; None when they are kept.
    """

    modes: tuple[int, ...]
    size: int
    stride: int
    rank: int | None


class Pass(NamedTuple):
    """How one launch covers `x`.

    Attributes:
        groups: all groups, slowest first.
        summed: index of the group that is summed over.
        streamed: index of the group that is streamed.
        two_sided: whether the streamed group's factor is applied in the launch too.
    """

    groups: tuple[Group, ...]
    summed: int
    streamed: int
    two_sided: bool

    @property
    def batch(self) -> list[int]:
        """Indices of the groups that count matrices."""
        return [index for index in range(len(self.groups)) if index not in (self.summed, self.streamed)]

    def extents(self) -> list[int]:
        """Extent of every group in the launch's result."""
        extents = [group.size for group in self.groups]
        summed, streamed = self.groups[self.summed], self.groups[self.streamed]
        extents[self.summed] = summed.rank or summed.size
        if self.two_sided:
            extents[self.streamed] = streamed.rank or streamed.size
        return extents

    def columns(self) -> tuple[int, int]:
        """Padded ranks of the summed and of the streamed group."""
        rank = self.groups[self.streamed].rank if self.two_sided else None
        return power_of_two(self.groups[self.summed].rank or 1), power_of_two(rank or 1)

    def cost(self) -> float:
        """Time of the launch and of what it leaves, over that of reading `x` once; fitted to an H100."""
        summed, streamed = self.groups[self.summed], self.groups[self.streamed]
        first, second = self.columns()
        sizes = [group.size for group in self.groups]
        rows = -(-streamed.size // 64) * 64 / streamed.size
        time = max(1.0, rows * first / BALANCED_RANK)
        if summed.stride != 1 and streamed.stride != 1 and min(group.stride for group in self.groups) == 1:
            time *= UNORDERED
        # Between two tiles a program reads the second factor and nothing of x.
        time += (TERMS_BETWEEN_TILES + (2 * second if self.two_sided else 0)) / summed.size
        done = {self.summed, self.streamed} if self.two_sided else {self.summed}
        left = sum(group.rank is not None for index, group in enumerate(self.groups) if index not in done)
        return time + 8 * math.prod(self.extents()) / math.prod(sizes) + left * ELEMENTS_A_PRODUCT / math.prod(sizes)


def group_modes(sizes: Sequence[int], strides: Sequence[int], ranks: Sequence[int | None]) -> tuple[Group, ...]:
    """Modes in memory order, neighbours merged where one stride serves both."""
    order = sorted(range(len(sizes)), key=lambda mode: (-strides[mode], mode))
    merged: list[Group] = []
    for mode in reversed(order):
        group = Group((mode,), sizes[mode], strides[mode], ranks[mode])
        if merged and group.stride == merged[-1].size * merged[-1].stride:
            inner = merged[-1]
            size = group.size * inner.size
            rank = group.rank * inner.rank if group.rank and inner.rank else None
            kept = group.rank is None and inner.rank is None
            small = rank is not None and rank <= MAX_RANK and size * power_of_two(rank) <= MAX_KRONECKER
            if kept or small:
                merged[-1] = Group((mode, *inner.modes), size, inner.stride, rank)
                continue
        merged.append(group)
    return tuple(reversed(merged))


@functools.lru_cache(maxsize=1024)
def plan(sizes: tuple[int, ...], strides: tuple[int, ...], ranks: tuple[int | None, ...]) -> Pass | None:
    """The launch for an input of these sizes, strides and ranks; None where there is none."""
    if math.prod(sizes) == 0 or any(stride == 0 and size > 1 for size, stride in zip(sizes, strides)):
        return None
    # A mode of one entry counts as lying outermost, wherever its stride says it is.
    span = max((size * stride for size, stride in zip(sizes, strides)), default=1)
    placed = [span if size == 1 else stride for size, stride in zip(sizes, strides)]
    groups = group_modes(sizes, placed, ranks)
    passes = []
    for summed, streamed in itertools.permutations(range(len(groups)), 2):
        rank = groups[summed].rank
        if rank is None or rank > MAX_RANK:
            continue
        for two_sided in (False, True) if groups[streamed].rank is not None else (False,):
            one = Pass(groups, summed, streamed, two_sided)
            first, second = one.columns()
            fits = not two_sided or (second <= MAX_RANK and first * second <= MAX_CORE)
            if fits and len(one.batch) <= 2:
                passes.append(one)
    return min(passes, key=Pass.cost, default=None)


def tiles_for(first: int, second: int, stream: int, total: int, itemsize: int, align: int) -> list[Tile]:
    """Tiles for padded ranks `first` and `second` (0 without one), streamed and summed sizes, and elements a load."""
    terms = min(128 // itemsize, power_of_two(total))

    def stage(rows: int, terms: int) -> int:
        return (rows + first) * terms * itemsize

    def tile(rows: int, warps: int, blocks: int = 1, terms: int = terms) -> Tile:
        return Tile(rows, terms, warps, min(stages_for(stage(rows * blocks, terms)), 3), blocks)

    listed = [tile(128, 4), tile(128, 8), tile(128, 8, 2), tile(64, 4), tile(64, 8)]
    if itemsize == 4:
        listed = [tile._replace(stages=2) for tile in (tile(128, 8), tile(64, 4), tile(64, 8))]
    listed = [tile for tile in listed if tile.rows <= max(64, power_of_two(stream))]
    listed += [tile(rows, 4, terms=16)._replace(stages=2) for rows in (64, 32, 16)]

    def registers(tile: Tile) -> float:
        accumulators = tile.rows * first + max(first, tile.stream / 2) * second
        addresses = 2 * tile.rows * tile.sum * (1 / align - itemsize / MAX_ALIGN_BYTES)  # more of them for narrow loads
        return (accumulators + addresses) / (32 * tile.warps)

    return by_preference(
        listed,
        registers=registers,
        shared=lambda tile: max(
            tile.stages * stage(tile.rows, tile.sum), 4 * (tile.stream * (first + second)) if second else 0
        ),
        rereads=lambda tile: first * triton.cdiv(stream, tile.rows) / stream + second / total,
    )


def _steps(one: Pass, strides: list[int]) -> list[int]:
    """Steps of the outer and the inner batch group; 0 where there is none."""
    return [0] * (2 - len(one.batch)) + [strides[index] for index in one.batch]


def _units(one: Pass, itemsize: int) -> tuple[int, int]:
    """What divides the streamed and the summed group's size where it lies contiguous: how wide loads are."""
    summed, streamed = one.groups[one.summed], one.groups[one.streamed]
    steps = _steps(one, [group.stride for group in one.groups])
    if streamed.stride == 1:
        return alignment(itemsize, streamed.size, summed.stride, *steps), 1
    if summed.stride == 1:
        return 1, alignment(itemsize, summed.size, streamed.stride, *steps)
    return 1, 1


def _core_strides(one: Pass, sizes: Sequence[int]) -> list[int] | None:
    """Strides of a contiguous core of these sizes by group; None where a group's modes do not merge."""
    strides = [math.prod(sizes[mode + 1 :]) for mode in range(len(sizes))]
    for group in one.groups:
        for mode, faster in itertools.pairwise(group.modes):
            if strides[mode] != strides[faster] * sizes[faster]:
                return None
    return [strides[group.modes[-1]] for group in one.groups]


def launch(
    one: Pass,
    x: torch.Tensor,
    factors: Factors,
    out: torch.Tensor,
    strides: list[int],
    splits: int,
    split_step: int,
    tile: Tile,
) -> None:
    """Starts the kernel; `strides` are those of `out` by group."""
    summed, streamed = one.groups[one.summed], one.groups[one.streamed]
    first, second = one.columns()
    precision = matmul_precision(x.dtype)
    first_factor = kronecker([_given(factors[mode]) for mode in summed.modes], x.dtype, first, precision)
    second_factor = first_factor
    if one.two_sided:
        second_factor = kronecker([_given(factors[mode]) for mode in streamed.modes], torch.float32, second, precision)
    steps = _steps(one, [group.stride for group in one.groups])
    batch = [one.groups[index].size for index in one.batch]
    stream_unit, total_unit = _units(one, x.element_size())
    align = max(stream_unit, total_unit)
    programs = math.prod(batch) * (splits if one.two_sided else triton.cdiv(streamed.size, tile.rows))
    core_outer, core_inner = _steps(one, strides)
    project_kernel[(programs,)](
        x,
        first_factor,
        second_factor,
        out,
        batch[-1] if batch else 1,
        streamed.size // stream_unit,
        summed.size // total_unit,
        splits,
        steps[0] // align,
        steps[1] // align,
        streamed.stride // align,
        summed.stride // align,
        split_step,
        core_outer,
        core_inner,
        strides[one.streamed],
        strides[one.summed],
        summed.rank,
        streamed.rank if one.two_sided else 1,
        STREAM_UNIT=stream_unit,
        TOTAL_UNIT=total_unit,
        STREAM_CONTIGUOUS=streamed.stride == 1,
        TOTAL_CONTIGUOUS=summed.stride == 1,
        ALIGN=align,
        R=first,
        Q=second,
        STREAM=tile.stream,
        SUM=tile.sum,
        TWO_SIDED=one.two_sided,
        BLOCKS=tile.blocks,
        PRECISION=precision,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _given(factor: torch.Tensor | None) -> torch.Tensor:
    assert factor is not None
    return factor


def tucker_project(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """`lance::tucker_project`; float64, and what no launch covers, takes the reference."""
    check_factors("tucker_project", "x", x, factors, side=0)
    ranks = tuple(None if factor is None else factor.shape[1] for factor in factors)
    one = None if x.dtype == torch.float64 else plan(tuple(x.shape), x.stride(), ranks)
    if one is None:
        return _project_reference(x, factors)
    summed, streamed = one.groups[one.summed], one.groups[one.streamed]
    first, second = one.columns()
    matrices = math.prod(one.groups[index].size for index in one.batch)
    extents = one.extents()
    done = {*summed.modes, *(streamed.modes if one.two_sided else ())}
    left = [(mode, factor) for mode, factor in enumerate(factors) if factor is not None and mode not in done]
    sizes = [ranks[mode] or size if mode in done else size for mode, size in enumerate(x.shape)]

    def start(tile: Tile) -> tuple[torch.Tensor, bool]:
        """What the launch leaves, its parts added up, and whether it is the core."""
        splits = 1
        if one.two_sided:
            tiles, partial = triton.cdiv(streamed.size, tile.rows), 4 * math.prod(extents)
            splits = splits_for(matrices, tiles, partial, x.numel() * x.element_size())
        strides = None if left else _core_strides(one, sizes)
        is_core = strides is not None
        dtype = x.dtype if is_core else torch.float32  # of what is returned
        shape = sizes if is_core else extents
        if splits == 1:
            whole = x.new_empty(shape, dtype=dtype)
            launch(one, x, factors, whole, strides or list(whole.stride()), 1, 0, tile)
            return whole, is_core
        parts = x.new_empty((splits, *shape), dtype=torch.float32)
        launch(one, x, factors, parts, strides or list(parts.stride()[1:]), splits, parts.stride(0), tile)
        return sum_parts(parts, dtype)[0], is_core

    units = _units(one, x.element_size())
    shape = (first, second if one.two_sided else 0, streamed.size, summed.size, x.element_size(), max(units))
    variant = (x.dtype, matmul_precision(x.dtype), *units)
    started = launch_fitting("tucker_project", shape, variant, tiles_for, start)
    if started is None:
        return _project_reference(x, factors)
    result, is_core = started
    if is_core:
        return result
    order = [mode for group in one.groups for mode in group.modes]
    wide = result.reshape([sizes[mode] for mode in order]).permute([order.index(mode) for mode in range(x.dim())])
    for mode, factor in sorted(left, key=lambda entry: entry[1].shape[1] / entry[1].shape[0]):
        wide = mode_product(wide, factor.float().mT, mode)
    return wide.to(x.dtype).contiguous()
