"""`convolution_weight_grad` on a GPU: the shifted way in one kernel, Triton; other ways through the library's products.

With the shifted factors `V (H', i, k)` and `W (W', j, l)` of `lance_kernels/ops/convolution_weight_grad.py`, a program
takes some output channels and some images, and for each image forms `T[h', o, jl] = sum_w' grad W`,
`Q[o, jl, ik] = sum_h' T V`, and adds `sum_kl Q core[q, kl]` to its part of the gradient, `(O, i, j, q)`. Taps and ranks
are padded to powers of two. `grad_output` is read once. The parts are added up in order and multiplied with `U_C` by
the library.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import (
    Tile,
    alignment,
    by_preference,
    cdiv,
    convolution_precision,
    launch_fitting,
    nearest,
    next_power_of_two,
    power_of_two,
    splits_for,
    stages_for,
)
from lance_kernels.kernels._reduction import reduce_and_expand
from lance_kernels.kernels.convolution_folded import (
    MAX_CONTRACTED,
    MAX_FOLDED,
    MAX_RANKS,
    ONES,
    folded_factor,
    is_rows,
    patch_sums,
    projected_sums,
)
from lance_kernels.kernels.convolution_folded import columns as folded_columns
from lance_kernels.ops._prepared import prepared
from lance_kernels.ops.convolution import Geometry, bias_grad, output_size
from lance_kernels.ops.convolution_weight_grad import (
    _check,
    _input_size,
    _reference,
    _shapes,
    _weight_grad_expanded,
    shifted_rows,
)
from lance_kernels.ops.tucker import Factors, mode_product, mode_product_flops, ranks_of

MAX_TAPS_RANKS = 64  # of one spatial mode, padded
MAX_CHANNEL_RANK = 128

# For choosing a way only, from an H100: bytes a second that are read or written at best, copied to another layout (a
# guess), read of Q, and of P; operations a second of the library's large products, of those with P, of the shifted
# kernel and of small float32 products; channels at which the library's weight gradient has half its rate; seconds of a
# launch, and of a small product in float32.
BANDWIDTH, COPY_BANDWIDTH, CONTRACT_BANDWIDTH, PATCH_BANDWIDTH = 3.0e12, 1.5e12, 1.0e12, 1.5e12
RATE, PATCH_RATE, SHIFTED_RATE, SMALL_RATE = 6.0e14, 3.5e14, 4.5e13, 8.0e12
HALF_RATE_CHANNELS, LAUNCH, SMALL_PRODUCT = 64, 4e-6, 1.5e-5


@triton.jit
def shifted_kernel(
    grad,  # (batch, outputs, height, width) by strides
    rows,  # (height, TAPS_H * RANK_H) of the shifted factor of the height, float32
    columns,  # (width, TAPS_W * RANK_W), of the width
    core,  # (batch, channels, rank_h, rank_w)
    parts,  # (splits, outputs, TAPS_W * TAPS_H, CHANNELS)
    batch,
    outputs,
    height,
    width,
    channels,
    rank_h,
    rank_w,
    splits,
    batch_step,
    output_step,
    height_step,
    width_step,
    OUTPUT_UNIT: tl.constexpr,
    WIDTH_UNIT: tl.constexpr,
    OUTPUT_CONTIGUOUS: tl.constexpr,
    WIDTH_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    TAPS_H: tl.constexpr,
    RANK_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    RANK_W: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Sizes and steps come divided by their units, so that the compiler sees what divides them.
    output_size = outputs * OUTPUT_UNIT
    width_size = width * WIDTH_UNIT
    output_stride = 1 if OUTPUT_CONTIGUOUS else tl.cast(output_step, tl.int64) * ALIGN
    width_stride = 1 if WIDTH_CONTIGUOUS else tl.cast(width_step, tl.int64) * ALIGN
    IK: tl.constexpr = TAPS_H * RANK_H
    JL: tl.constexpr = TAPS_W * RANK_W
    KL: tl.constexpr = RANK_H * RANK_W
    IJ: tl.constexpr = TAPS_H * TAPS_W
    tiles = tl.cdiv(output_size, OUTPUTS)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    # Rows of the streamed matrix: h' slow, o fast, so that either layout of grad is read along its memory.
    row = tl.arange(0, HEIGHT * OUTPUTS)
    o = (tile * OUTPUTS + row % OUTPUTS).to(tl.int64)  # (HEIGHT * OUTPUTS,)
    h = row // OUTPUTS
    ik = tl.arange(0, IK)
    jl = tl.arange(0, JL)
    kl = tl.arange(0, KL)
    c = tl.arange(0, CHANNELS)
    total = tl.zeros((OUTPUTS * IJ, CHANNELS), dtype=tl.float32)
    share = tl.cdiv(batch, splits)
    for image in range(split * share, tl.minimum((split + 1) * share, batch)):
        place = tl.cast(image, tl.int64)
        base = grad + place * batch_step * ALIGN
        q = tl.zeros((OUTPUTS * JL, IK), dtype=tl.float32)
        for top in range(0, height, HEIGHT):
            inside = (o < output_size) & (top + h < height)
            line = base + o * output_stride + (top + h).to(tl.int64) * height_step * ALIGN
            t = tl.zeros((HEIGHT * OUTPUTS, JL), dtype=tl.float32)
            for left in range(0, width_size, WIDTH):
                w = left + tl.arange(0, WIDTH)
                known = w < width_size
                block = tl.load(
                    line[:, None] + w[None, :].to(tl.int64) * width_stride,
                    mask=inside[:, None] & known[None, :],
                    other=0.0,
                )  # (HEIGHT * OUTPUTS, WIDTH)
                factor = tl.load(columns + w[:, None] * JL + jl[None, :], mask=known[:, None], other=0.0)  # (WIDTH, JL)
                t = tl.dot(block, nearest(factor.to(block.dtype), PRECISION), t, input_precision=PRECISION)
            heights = top + tl.arange(0, HEIGHT)
            entries = rows + heights[:, None] * IK + ik[None, :]
            factor = tl.load(entries, mask=(heights < height)[:, None], other=0.0)  # (HEIGHT, IK)
            turned = tl.permute(tl.reshape(t, (HEIGHT, OUTPUTS, JL)), (1, 2, 0))
            turned = tl.reshape(turned, (OUTPUTS * JL, HEIGHT))
            q = tl.dot(nearest(turned, PRECISION), nearest(factor, PRECISION), q, input_precision=PRECISION)
        k, width_rank = kl // RANK_W, kl % RANK_W
        places = ((place * channels + c[None, :]) * rank_h + k[:, None]) * rank_w + width_rank[:, None]
        known = (c[None, :] < channels) & (k < rank_h)[:, None] & (width_rank < rank_w)[:, None]
        kernel = nearest(tl.load(core + places, mask=known, other=0.0), PRECISION).to(tl.float32)  # (KL, CHANNELS)
        apart = tl.reshape(q, (OUTPUTS, TAPS_W, RANK_W, TAPS_H, RANK_H))
        apart = tl.reshape(tl.permute(apart, (0, 3, 1, 4, 2)), (OUTPUTS * IJ, KL))
        total = tl.dot(nearest(apart, PRECISION), kernel, total, input_precision=PRECISION)
    entry = tl.arange(0, OUTPUTS * IJ)
    first = tile * OUTPUTS * IJ
    kept = first + entry < output_size * IJ
    line = split.to(tl.int64) * output_size * IJ + first + entry
    tl.store(parts + line[:, None] * CHANNELS + c[None, :], total, mask=kept[:, None])


class Shape(NamedTuple):
    """What the shifted kernel is launched for; taps and ranks of height and width, and the channels' rank."""

    batch: int
    outputs: int
    height: int
    width: int
    taps: tuple[int, int]
    ranks: tuple[int, int]
    channels: int
    itemsize: int

    @property
    def padded(self) -> tuple[int, int, int, int, int]:
        """Padded taps and ranks of height and width, and the padded channels' rank."""
        return _padded(self.taps, self.ranks, self.channels)


@functools.cache
def _padded(taps: tuple[int, int], ranks: tuple[int, int], channels: int) -> tuple[int, int, int, int, int]:
    (taps_h, taps_w), (rank_h, rank_w) = map(next_power_of_two, taps), map(next_power_of_two, ranks)
    # Products of taps and ranks, and of both ranks, are sides of a matrix product, of at least 16.
    rank_h, rank_w = max(rank_h, 16 // taps_h), max(rank_w, 16 // taps_w)
    while rank_h * rank_w < 16:
        rank_h, rank_w = (2 * rank_h, rank_w) if rank_h < rank_w else (rank_h, 2 * rank_w)
    return taps_h, rank_h, taps_w, rank_w, power_of_two(channels)


def rows_at_once(height: int) -> int:
    """Rows of an image that are taken at once."""
    return min(32, power_of_two(height))


def tiles_for(*fields: Any) -> list[Tile]:
    """Tiles for the fields of a `Shape`; they stream output channels and sum over the width."""
    shape = Shape(*fields)
    taps_h, rank_h, taps_w, rank_w, channels = shape.padded
    height = rows_at_once(shape.height)
    width = min(128 // shape.itemsize, power_of_two(shape.width))
    ik, jl = taps_h * rank_h, taps_w * rank_w

    def tile(outputs: int, warps: int, width: int) -> Tile:
        return Tile(outputs, width, warps, min(3, stages_for(outputs * height * width * shape.itemsize)))

    def registers(tile: Tile) -> float:
        held = tile.stream * (height * jl + jl * ik + taps_h * taps_w * channels)
        return 1.2 * held / (32 * tile.warps)  # two of the three are rearranged

    def shared(tile: Tile) -> float:
        block = tile.stages * tile.stream * height * tile.sum * shape.itemsize
        turned = 4 * jl * (tile.stream * max(height, ik) + ik)
        return max(block, turned, 4 * channels * (tile.stream * taps_h * taps_w + rank_h * rank_w))

    listed = [tile(*sizes, width) for sizes in ((32, 8), (16, 8), (16, 4), (8, 8), (8, 4), (4, 4))]
    listed = [tile for tile in listed if tile.stream * height >= 64 and tile.stream <= power_of_two(shape.outputs)]
    listed += [tile(outputs, 4, 16)._replace(stages=2) for outputs in (4, 2, 1) if outputs * height >= 16]
    return by_preference(listed, registers=registers, shared=shared, rereads=lambda tile: jl / (tile.stream * height))


def shifted_sums(
    grad: torch.Tensor,
    core: torch.Tensor,
    spatial: Sequence[torch.Tensor],
    weight_size: Sequence[int],
    geometry: Geometry,
) -> torch.Tensor | None:
    """The shifted way for every output channel with every channel of the core.

    Args:
        grad: `(batch, O, H', W')`.
        core: `(batch, channels, rank_H, rank_W)`.
        spatial: the factors of height and width.
        weight_size: `(O, C / groups, kernel height, kernel width)`.
        geometry: the convolution's.

    Returns:
        Partial sums, float32, `(splits, O, kernel height, kernel width, channels)` with the last three padded; None
        where the GPU has no room for the kernel.
    """
    taps = (weight_size[2], weight_size[3])
    shape = Shape(
        grad.shape[0], grad.shape[1], grad.shape[2], grad.shape[3], taps, (core.shape[2], core.shape[3]),
        core.shape[1], grad.element_size(),
    )  # fmt: skip
    taps_h, rank_h, taps_w, rank_w, channels = shape.padded
    shifted = [
        _padded_shift(spatial[index], index, grad.shape[2 + index], taps[index], geometry, shape.padded[2 * index :])
        for index in range(2)
    ]
    core, precision = core.contiguous(), convolution_precision(grad.dtype)
    entries = shape.outputs * taps_h * taps_w
    steps = grad.stride()
    output_unit = width_unit = 1
    if steps[3] == 1:
        width_unit = alignment(shape.itemsize, shape.width, *steps[:3])
    elif steps[1] == 1:
        output_unit = alignment(shape.itemsize, shape.outputs, steps[0], *steps[2:])
    align = max(output_unit, width_unit)

    def start(tile: Tile) -> torch.Tensor:
        tiles = cdiv(shape.outputs, tile.stream)
        splits = splits_for(tiles, shape.batch, 4 * entries * channels, grad.numel() * shape.itemsize)
        parts = grad.new_empty((splits, entries, channels), dtype=torch.float32)
        shifted_kernel[(tiles * splits,)](
            grad,
            *shifted,
            core,
            parts,
            shape.batch,
            shape.outputs // output_unit,
            shape.height,
            shape.width // width_unit,
            shape.channels,
            *shape.ranks,
            splits,
            steps[0] // align,
            steps[1] // align,
            steps[2] // align,
            steps[3] // align,
            OUTPUT_UNIT=output_unit,
            WIDTH_UNIT=width_unit,
            OUTPUT_CONTIGUOUS=steps[1] == 1 and steps[3] != 1,
            WIDTH_CONTIGUOUS=steps[3] == 1,
            ALIGN=align,
            TAPS_H=taps_h,
            RANK_H=rank_h,
            TAPS_W=taps_w,
            RANK_W=rank_w,
            CHANNELS=channels,
            OUTPUTS=tile.stream,
            HEIGHT=rows_at_once(shape.height),
            WIDTH=tile.sum,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return parts

    variant = (grad.dtype, precision, output_unit, width_unit)
    parts = launch_fitting("convolution_weight_grad", shape, variant, tiles_for, start)
    if parts is None:
        return None
    return parts.view(-1, shape.outputs, taps_h, taps_w, channels)


def added_up(parts: torch.Tensor, taps: tuple[int, int], channels: int) -> torch.Tensor:
    """What `shifted_sums` returned, summed and without padding, `(O, channels, kernel height, kernel width)`."""
    return parts.sum(0)[:, : taps[0], : taps[1], :channels].permute(0, 3, 1, 2)


def _padded_shift(
    factor: torch.Tensor, index: int, outputs: int, taps: int, geometry: Geometry, padded: Sequence[int]
) -> torch.Tensor:
    """The shifted factor of spatial mode `index`, `(outputs, padded taps * padded rank)`, float32."""

    def make() -> torch.Tensor:
        rows = shifted_rows(factor.float(), index, outputs, taps, geometry)
        padding = (0, padded[1] - rows.shape[2], 0, padded[0] - taps)
        return torch.nn.functional.pad(rows, padding).flatten(1).contiguous()

    return prepared([factor], ("shift", index, outputs, taps, geometry, *padded[:2]), make)


class Costs(NamedTuple):
    """Seconds that the cost model gives each way; infinite where a way is not there."""

    shifted: float
    expanded: float
    projected: float
    patches: float


@functools.lru_cache(maxsize=1024)
def costs(
    core_size: tuple[int, ...],
    factor_shapes: tuple[tuple[int, int] | None, ...],
    weight_size: tuple[int, ...],
    geometry: Geometry,
    itemsize: int,
    is_rows: bool = False,
    channels_last: bool = False,
) -> Costs:
    """The larger of bytes over bandwidth and operations over rate, for each way, and what its launches take.

    Args:
        core_size: shape of the core, the batch as it will be contracted.
        factor_shapes: shapes of the factors, None for a kept mode.
        weight_size: `(O, C / groups, *K)`.
        geometry: the convolution's.
        itemsize: bytes of an element.
        is_rows: whether the library's products take `grad_output` along the positions.
        channels_last: whether `grad_output` is channels_last.
    """
    output = output_size(_input_size(core_size, factor_shapes), weight_size, geometry)
    samples, channels = core_size[0], core_size[1]
    grad_bytes = itemsize * samples * math.prod(output[1:])
    rearranged = 0.0 if channels_last else 2 * grad_bytes / COPY_BANDWIDTH
    sizes = ranks_of(factor_shapes[2:], side=0)
    image = [core if size is None else size for core, size in zip(core_size[2:], sizes)]
    image_bytes = itemsize * samples * channels * math.prod(image)
    operations = 2 * samples * math.prod(output[1:]) * math.prod(weight_size[2:]) * channels
    # The image is written and read by one product a mode, then read by the library's convolution.
    rate = RATE * channels / (channels + HALF_RATE_CHANNELS)
    expanded = rearranged + max((grad_bytes + image_bytes) / BANDWIDTH, operations / rate) + 8 * LAUNCH
    expanded += 2 * image_bytes / BANDWIDTH + sum(size is not None for size in sizes) * SMALL_PRODUCT
    expanded += (
        mode_product_flops(core_size, [None, None, *sizes]) + 2 * math.prod(weight_size) * channels
    ) / SMALL_RATE
    if len(output) != 4 or None in sizes or channels > MAX_CHANNEL_RANK or itemsize > 4:
        return Costs(math.inf, expanded, math.inf, math.inf)
    taps, ranks = (weight_size[2], weight_size[3]), (core_size[2], core_size[3])
    shape = Shape(samples, output[1], output[2], output[3], taps, ranks, channels, itemsize)
    taps_h, rank_h, taps_w, rank_w, padded = shape.padded
    ik, jl = taps_h * rank_h, taps_w * rank_w
    height, width = (-(-size // 16) * 16 for size in output[2:])
    work = 2 * samples * output[1] * (height * width * jl + jl * height * ik + ik * jl * padded)
    shifted = max(grad_bytes / BANDWIDTH, work / SHIFTED_RATE) + 2 * LAUNCH
    if max(ik, jl) > MAX_TAPS_RANKS:
        shifted = math.inf
    positions, all_taps, all_ranks = math.prod(output[2:]), math.prod(taps), math.prod(ranks)
    pitch = folded_columns(all_taps, all_ranks)
    if itemsize != 2 or positions * pitch > MAX_FOLDED or all_ranks > MAX_RANKS:
        return Costs(shifted, expanded, math.inf, math.inf)
    projected_bytes = 4 * samples * output[1] * pitch
    projected = max((grad_bytes + projected_bytes) / BANDWIDTH, grad_bytes * pitch / RATE)
    projected += projected_bytes / CONTRACT_BANDWIDTH + (0.0 if is_rows else rearranged) + 4 * LAUNCH
    if power_of_two(all_ranks) * padded > MAX_CONTRACTED:
        projected = math.inf
    columns = all_taps * padded + ONES
    patches_bytes = 2 * samples * positions * columns
    patches = max((grad_bytes + patches_bytes) / PATCH_BANDWIDTH, grad_bytes * columns / PATCH_RATE)
    patches += patches_bytes / PATCH_BANDWIDTH + rearranged + 4 * LAUNCH
    return Costs(shifted, expanded, projected, patches)


def convolution_weight_grads(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    weight_size: Sequence[int],
    geometry: Geometry,
    with_bias: bool,
    way: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight gradient, and the bias gradient or None; from one read where the way has it.

    Args:
        grad_output: `(B, O, *S')`.
        core: the input's core, one rank a mode.
        factors: one `(size, rank)` matrix or None a mode of the input.
        weight_size: `(O, C / groups, *K)`.
        geometry: the convolution's.
        with_bias: whether to sum `grad_output` up too.
        way: a field of `Costs` whose way is there; None for the cheapest.
    """
    _check(grad_output, core, factors, weight_size, geometry)
    batch, feature, *spatial = factors
    narrow = core.shape[1] > weight_size[1] or (feature is None and geometry.groups > 1)
    if grad_output.dtype == torch.float64 or narrow or not (grad_output.numel() and core.numel()):
        grad_weight = _reference(grad_output, core, factors, weight_size, *geometry)
        return grad_weight, bias_grad(grad_output) if with_bias else None
    # A factor of the batch widens the core, which is small, instead of narrowing grad_output.
    kept = core if batch is None else mode_product(core.float(), batch.float(), 0).to(core.dtype)
    if way is None:
        cost = costs_for(grad_output, kept, factors, weight_size, geometry)
        way = min(cost._fields, key=lambda field: getattr(cost, field))
    sums, bias_sums = _sums(way, grad_output, kept, spatial, weight_size, geometry, with_bias)
    taps = (weight_size[2], weight_size[3]) if len(weight_size) == 4 else None
    if sums is not None and taps is not None and feature is not None and geometry.groups == 1:
        grads = reduce_and_expand(sums, feature, grad_output.dtype, bias_sums, taps=taps)
        if grads is not None:
            grad_weight, grad_bias = grads
            return grad_weight, bias_grad(grad_output) if with_bias and grad_bias is None else grad_bias
    grad_bias = None
    if with_bias:
        grad_bias = bias_grad(grad_output) if bias_sums is None else bias_sums.sum(0).to(grad_output.dtype)
    if sums is not None and taps is not None:
        product = added_up(sums, taps, kept.shape[1])
    else:
        product = _library_sums(grad_output, kept, spatial, weight_size, geometry)
    product = product.float()
    if feature is None:
        return product.to(grad_output.dtype).contiguous(), grad_bias
    groups = geometry.groups
    grouped = product.reshape(groups, weight_size[0] // groups, kept.shape[1], -1)
    rows = feature.float().reshape(groups, 1, weight_size[1], kept.shape[1])
    return (rows @ grouped).reshape(tuple(weight_size)).to(grad_output.dtype), grad_bias


def costs_for(
    grad: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], geometry: Geometry
) -> Costs:
    """The cost of each way for these tensors; the batch of `core` as it is contracted."""
    shapes = tuple(None if shape is None else (shape[0], shape[1]) for shape in _shapes([None, *factors[1:]]))
    rows = grad.dim() == 4 and is_rows(grad)
    last = grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)
    return costs(tuple(core.shape), shapes, tuple(weight_size), geometry, grad.element_size(), rows, last)


def _sums(
    way: str,
    grad: torch.Tensor,
    core: torch.Tensor,
    spatial: Factors,
    weight_size: Sequence[int],
    geometry: Geometry,
    with_bias: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Partial sums of a way, and of the bias gradient where it has them; None for the expanded way."""
    if way == "expanded":
        return None, None
    given = [factor for factor in spatial if factor is not None]
    if way == "shifted":
        return shifted_sums(grad, core, given, weight_size, geometry), None
    run, dtype = (projected_sums, grad.dtype) if way == "projected" else (patch_sums, torch.float32)
    folded = folded_factor(given, grad.shape[2:], weight_size[2:], geometry, dtype)
    return run(grad, core, folded, weight_size[2:], with_bias) or (None, None)


def _library_sums(
    grad: torch.Tensor, core: torch.Tensor, spatial: Factors, weight_size: Sequence[int], geometry: Geometry
) -> torch.Tensor:
    """The expanded way for every output channel with every channel of the core, `(O, channels, *K)`."""
    image = core.float()
    for mode, factor in enumerate(spatial, start=2):
        image = image if factor is None else mode_product(image, factor.float(), mode)
    plain: list[torch.Tensor | None] = [None] * core.dim()
    thin = [weight_size[0], core.shape[1], *weight_size[2:]]
    image = image.to(core.dtype)
    if grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last):
        image = image.contiguous(memory_format=torch.channels_last)
    return _weight_grad_expanded(grad, image, plain, thin, geometry._replace(groups=1))


def convolution_weight_grad(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], *geometry: Any
) -> torch.Tensor:
    """`lance::convolution_weight_grad`; float64, and groups narrower than the channels' rank, take the reference."""
    return convolution_weight_grads(grad_output, core, factors, weight_size, Geometry.of(*geometry), with_bias=False)[0]


def convolution_weight_bias_grad(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], *geometry: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::convolution_weight_bias_grad`; the same."""
    grads = convolution_weight_grads(grad_output, core, factors, weight_size, Geometry.of(*geometry), with_bias=True)
    assert grads[1] is not None
    return grads[0], grads[1]
