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
    cdiv,
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
MAX_EXTENT = 2**31 - 2**16  # of a launch's modes, whose positions are counted in 32 bits
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
                places += STREAM * tl.cast(core_stream, tl.int64)
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


def plan(sizes: tuple[int, ...], strides: tuple[int, ...], ranks: tuple[int | None, ...]) -> Pass | None:
    """The launch for an input of these sizes, strides and ranks; None where there is none."""
    if math.prod(sizes) == 0 or any(stride == 0 and size > 1 for size, stride in zip(sizes, strides)):
        return None
    # A mode of one entry counts as lying outermost, wherever its stride says it is.
    span = max((size * stride for size, stride in zip(sizes, strides)), default=1)
    placed = [span if size == 1 else stride for size, stride in zip(sizes, strides)]
    groups = group_modes(sizes, placed, ranks)
    if max((group.size for group in groups), default=0) > MAX_EXTENT:
        return None
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
        rereads=lambda tile: first * cdiv(stream, tile.rows) / stream + second / total,
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


def _contiguous(sizes: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor."""
    return [math.prod(sizes[index + 1 :]) for index in range(len(sizes))]


def _group_strides(one: Pass, sizes: Sequence[int]) -> list[int] | None:
    """Strides of a contiguous core of these sizes, by group; None where a group's modes do not merge."""
    strides, by_group = _contiguous(sizes), []
    for group in one.groups:
        for mode, faster in itertools.pairwise(group.modes):
            if strides[mode] != strides[faster] * sizes[faster]:
                return None
        by_group.append(strides[group.modes[-1]])
    return by_group


class Layout(NamedTuple):
    """What all launches share for inputs of the same sizes and strides and factors of the same ranks.

    Attributes:
        one: how the launch covers `x`.
        sizes: sizes of what the launch leaves, by mode.
        extents: the same by group.
        left: modes that the launch leaves to be projected.
        matrices: matrices that `x` is made of.
        tiled: what the tiles follow from, the arguments of `tiles_for`.
        units: what divides the streamed and the summed size.
        inner: matrices of the inner batch group, the streamed and the summed size, divided by their units.
        steps: steps of outer, inner, streamed and summed group in `x`, divided by the greater unit.
        core_steps: the same in the core, if the launch can write that.
        part_steps: the same in one part of it.
        ranks: ranks of the summed and the streamed group, 1 without one.
        constants: the kernel's compile-time arguments.
    """

    one: Pass
    sizes: tuple[int, ...]
    extents: tuple[int, ...]
    left: tuple[int, ...]
    matrices: int
    tiled: tuple[int, int, int, int, int, int]
    units: tuple[int, int]
    inner: tuple[int, int, int]
    steps: tuple[int, ...]
    core_steps: tuple[int, ...] | None
    part_steps: tuple[int, ...]
    ranks: tuple[int | None, int | None]
    constants: dict[str, int | bool]


@functools.lru_cache(maxsize=1024)
def layout_of(
    sizes: tuple[int, ...], strides: tuple[int, ...], ranks: tuple[int | None, ...], itemsize: int
) -> Layout | None:
    """The layout of an input; None where there is no launch."""
    one = plan(sizes, strides, ranks)
    if one is None:
        return None
    summed, streamed = one.groups[one.summed], one.groups[one.streamed]
    first, second = one.columns()
    done = {*summed.modes, *(streamed.modes if one.two_sided else ())}
    left = tuple(mode for mode, rank in enumerate(ranks) if rank is not None and mode not in done)
    core = tuple(ranks[mode] or size if mode in done else size for mode, size in enumerate(sizes))
    batch, extents = [one.groups[index].size for index in one.batch], tuple(one.extents())
    units = _units(one, itemsize)
    core_strides = None if left else _group_strides(one, core)
    return Layout(
        one=one,
        sizes=core,
        extents=extents,
        left=left,
        matrices=math.prod(batch),
        tiled=(first, second if one.two_sided else 0, streamed.size, summed.size, itemsize, max(units)),
        units=units,
        inner=(batch[-1] if batch else 1, streamed.size // units[0], summed.size // units[1]),
        steps=tuple(step // max(units) for step in _all_steps(one, [group.stride for group in one.groups])),
        core_steps=None if core_strides is None else _all_steps(one, core_strides),
        part_steps=_all_steps(one, _contiguous(extents)),
        ranks=(summed.rank, streamed.rank if one.two_sided else 1),
        constants={
            "STREAM_UNIT": units[0],
            "TOTAL_UNIT": units[1],
            "STREAM_CONTIGUOUS": streamed.stride == 1,
            "TOTAL_CONTIGUOUS": summed.stride == 1,
            "ALIGN": max(units),
            "R": first,
            "Q": second,
            "TWO_SIDED": one.two_sided,
        },
    )


def _all_steps(one: Pass, strides: list[int]) -> tuple[int, ...]:
    """Steps of the outer, the inner, the streamed and the summed group."""
    return *_steps(one, strides), strides[one.streamed], strides[one.summed]


def _factor(factors: Factors, group: Group, dtype: torch.dtype, columns: int, precision: str) -> torch.Tensor:
    """The factor of a group, `(size, columns)`."""
    given = [factor for mode in group.modes if (factor := factors[mode]) is not None]
    return kronecker(given, dtype, columns, precision)


def tucker_project(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """`lance::tucker_project`; float64, and what no launch covers, takes the reference."""
    check_factors("tucker_project", "x", x, factors, side=0)
    ranks = tuple(None if factor is None else factor.shape[1] for factor in factors)
    layout = None if x.dtype == torch.float64 else layout_of(x.shape, x.stride(), ranks, x.element_size())
    if layout is None:
        return _project_reference(x, factors)
    one, sizes = layout.one, layout.sizes
    first, second, stream, _, itemsize, align = layout.tiled
    precision = matmul_precision(x.dtype)
    first_factor = second_factor = _factor(factors, one.groups[one.summed], x.dtype, first, precision)
    if one.two_sided:
        second_factor = _factor(factors, one.groups[one.streamed], torch.float32, second, precision)
    is_core = layout.core_steps is not None
    shape = sizes if is_core else layout.extents
    elements = math.prod(shape)

    def start(tile: Tile) -> torch.Tensor:
        """The core, or what the launch leaves of it in float32, by group."""
        tiles, splits = cdiv(stream, tile.rows), 1
        if one.two_sided:
            splits = splits_for(layout.matrices, tiles, 4 * elements, x.numel() * itemsize)
        parted = splits > 1
        dtype = x.dtype if is_core else torch.float32
        out = x.new_empty((splits, *shape), dtype=torch.float32) if parted else x.new_empty(shape, dtype=dtype)
        project_kernel[(layout.matrices * (splits if one.two_sided else tiles),)](
            x,
            first_factor,
            second_factor,
            out,
            *layout.inner,
            splits,
            *layout.steps,
            elements if parted else 0,
            *(layout.core_steps or layout.part_steps),
            *layout.ranks,
            **layout.constants,
            STREAM=tile.stream,
            SUM=tile.sum,
            BLOCKS=tile.blocks,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return sum_parts(out, dtype)[0] if parted else out

    aligned = x.data_ptr() % MAX_ALIGN_BYTES == 0
    tiled, variant = (*layout.tiled[:-1], align if aligned else 1), (x.dtype, precision, *layout.units)
    result = launch_fitting("tucker_project", tiled, variant, tiles_for, start)
    if result is None:
        return _project_reference(x, factors)
    if is_core:
        return result
    left = [(mode, factor) for mode, factor in enumerate(factors) if factor is not None and mode in layout.left]
    order = [mode for group in one.groups for mode in group.modes]
    wide = result.reshape([sizes[mode] for mode in order]).permute([order.index(mode) for mode in range(x.dim())])
    for mode, factor in sorted(left, key=lambda entry: entry[1].shape[1] / entry[1].shape[0]):
        wide = mode_product(wide, factor.float().mT, mode)
    return wide.to(x.dtype).contiguous()
