"""Two ways of `convolution_weight_grad` on a GPU that leave the large product to the library, 16-bit.

The shifted factors `V (H', i, k)` and `W (W', j, l)` of `lance_kernels/ops/convolution_weight_grad.py` make one matrix,
`S[h'w', ij, kl] = V[h', i, k] W[w', j, l]`. Either `grad_output` is projected,

    Q[b, o, ij, kl] = sum_h'w' grad[b, o, h'w'] S[h'w', ij, kl]       by the library
    sums[o, ij, q] = sum_bkl Q[b, o, ij, kl] core[b, q, kl]           `contract_kernel`

or the core is expanded to the patches of an image of its channels,

    P[b, h'w', ij, q] = sum_kl S[h'w', ij, kl] core[b, q, kl]         `patches_kernel`
    sums[o, ij, q] = sum_bh'w' grad[b, o, h'w'] P[b, h'w', ij, q]     by the library

A column of ones in `S` or `P` gives the bias gradient from the same read. The library's results are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import (
    Tile,
    cdiv,
    has_wide_units,
    launch_fitting,
    nearest,
    nearest_tf32,
    power_of_two,
    splits_for,
)
from lance_kernels.kernels._reduction import MAX_EXPANDED_SPLITS, sum_parts
from lance_kernels.ops._prepared import prepared
from lance_kernels.ops.convolution import Geometry
from lance_kernels.ops.convolution_weight_grad import shifted_rows

MAX_FOLDED = 2**18  # elements of S, half a megabyte
MAX_RANKS = 256  # of both spatial modes together
MAX_CONTRACTED = 2**13  # padded ranks times padded channels that `contract_kernel` has the registers for
ONES = 8  # columns that one of ones may take, to keep rows at 16 bytes
# What Q takes for a share of the batch stays in the L2 cache; P is made for as many images as this allows.
PROJECTED_BYTES, PATCHES_BYTES = 24 * 2**20, 32 * 2**20
PARTS_BYTES, LIBRARY_TILE, LIBRARY_PROGRAMS = 12 * 2**20, 128, 264
COPIED = 64  # outputs and positions that a program copies


def slots(ranks: int) -> int:
    """Columns of S that the ranks of a tap take: rows of Q are read 16 bytes at a time."""
    return -(-ranks // 4) * 4


def columns(taps: int, ranks: int) -> int:
    """Columns of S."""
    return cdiv(taps * slots(ranks) + 1, ONES) * ONES


@triton.jit
def contract_kernel(
    projected,  # (images, outputs, pitch) float32
    core,  # (images, channels, ranks)
    parts,  # (splits, outputs * TAPS, CHANNELS)
    bias_parts,  # (splits, outputs)
    images,
    outputs,
    channels,
    ranks,
    pitch,
    splits,
    TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    IMAGES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    step = tl.cast(outputs, tl.int64) * pitch * 4
    share = tl.cdiv(images, splits)
    first, last = split * share, tl.minimum((split + 1) * share, images)
    row = tile * ROWS + tl.arange(0, ROWS)  # (ROWS,), outputs and taps
    inside = row < outputs * TAPS
    term = tl.arange(0, IMAGES * RANKS)  # (IMAGES * RANKS,), images and ranks
    kl = term % RANKS
    c = tl.arange(0, CHANNELS)
    start = (row // TAPS).to(tl.int64) * pitch * 4 + row % TAPS * SLOTS
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    bias = tl.zeros((ROWS,), dtype=tl.float32)
    for begin in range(first, last, IMAGES):
        image = begin + term // RANKS
        known = (image < last) & (kl < ranks)
        place = image.to(tl.int64)
        entries = projected + start[:, None] + (place * step + kl)[None, :]
        block = tl.load(entries, mask=inside[:, None] & known[None, :], other=0.0)  # (ROWS, IMAGES * RANKS)
        thin = core + (place * channels * ranks + kl)[:, None] + c[None, :] * ranks
        kernel = tl.load(thin, mask=known[:, None] & (c < channels)[None, :], other=0.0)  # (IMAGES * RANKS, CHANNELS)
        total = tl.dot(nearest(block, "tf32"), kernel.to(tl.float32), total, input_precision="tf32")
        if BIAS:
            ones = projected + start[:, None] + (place * step + TAPS * SLOTS)[None, :]
            counted = (inside & (row % TAPS == 0))[:, None] & (known & (kl == 0))[None, :]
            bias += tl.sum(tl.load(ones, mask=counted, other=0.0), axis=1)
    line = split.to(tl.int64) * outputs * TAPS + row
    tl.store(parts + line[:, None] * CHANNELS + c[None, :], total, mask=inside[:, None])
    if BIAS:
        tl.store(bias_parts + split.to(tl.int64) * outputs + row // TAPS, bias, mask=inside & (row % TAPS == 0))


@triton.jit
def patches_kernel(
    folded,  # (positions, pitch), S, float32
    core,  # (images, channels, ranks)
    patches,  # (images, positions, width * 8)
    positions,
    channels,
    ranks,
    pitch,
    width,
    TAPS: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
):
    tiles = tl.cdiv(positions * TAPS, ROWS)
    image, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    row = tile * ROWS + tl.arange(0, ROWS)  # (ROWS,), positions and taps
    inside = row < positions * TAPS
    kl = tl.arange(0, RANKS)
    c = tl.arange(0, CHANNELS)
    start = (row // TAPS) * pitch * 8 + row % TAPS * SLOTS
    block = tl.load(
        folded + start[:, None] + kl[None, :], mask=inside[:, None] & (kl < ranks)[None, :], other=0.0
    )  # (ROWS, RANKS)
    thin = core + image * channels * ranks + c[None, :] * ranks + kl[:, None]
    kernel = tl.load(thin, mask=(c < channels)[None, :] & (kl < ranks)[:, None], other=0.0)  # (RANKS, CHANNELS)
    made = tl.dot(block, kernel.to(tl.float32), input_precision="tf32").to(patches.dtype.element_ty)
    line = patches + (image * positions + row // TAPS) * width * 8
    tl.store(line[:, None] + (row % TAPS * CHANNELS)[:, None] + c[None, :], made, mask=inside[:, None])
    if BIAS:
        one = tl.full((ROWS,), 1.0, dtype=tl.float32).to(patches.dtype.element_ty)
        tl.store(line + TAPS * CHANNELS, one, mask=inside & (row % TAPS == 0))


@triton.jit
def channels_last_kernel(
    grad,  # (images, outputs, positions) by strides
    columns,  # (images, positions, outputs)
    outputs,
    positions,
    image_step,
    output_step,
    SIDE: tl.constexpr,
):
    across, down = tl.cdiv(positions, SIDE), tl.cdiv(outputs, SIDE)
    image, tile = (tl.program_id(0) // (across * down)).to(tl.int64), tl.program_id(0) % (across * down)
    o = (tile // across * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    p = (tile % across * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    known = (o < outputs)[:, None] & (p < positions)[None, :]
    block = tl.load(grad + image * image_step + o[:, None] * output_step + p[None, :], mask=known, other=0.0)
    places = columns + image * positions * outputs + p[:, None] * outputs + o[None, :]
    tl.store(places, tl.trans(block), mask=tl.trans(known))


def folded_factor(
    spatial: Sequence[torch.Tensor],
    output: Sequence[int],
    kernel: Sequence[int],
    geometry: Geometry,
    dtype: torch.dtype,
) -> torch.Tensor:
    """S with a column of ones behind the taps' columns, `(H' * W', columns)`, kept while the factors do not change.

    Args:
        spatial: the factors of height and width.
        output: height and width of the output.
        kernel: height and width of the kernel.
        geometry: the convolution's.
        dtype: dtype of the result.
    """

    def make() -> torch.Tensor:
        shifted = [
            shifted_rows(factor.float(), index, output[index], kernel[index], geometry)
            for index, factor in enumerate(spatial)
        ]
        positions, taps = math.prod(output), math.prod(kernel)
        product = torch.einsum("hik,wjl->hwijkl", *shifted).reshape(positions, taps, -1)
        padded = product.new_zeros(positions, columns(taps, product.shape[2]), dtype=dtype)
        places = padded[:, : taps * slots(product.shape[2])].view(positions, taps, -1)
        places[:, :, : product.shape[2]] = product
        padded[:, taps * slots(product.shape[2])] = 1
        return nearest_tf32(padded) if dtype == torch.float32 else padded

    return prepared(spatial, ("folded", dtype, *output, *kernel, geometry), make)


def has_flat_images(grad: torch.Tensor) -> bool:
    """Whether the positions of an image lie side by side."""
    return grad.stride(3) == 1 and (grad.stride(2) == grad.shape[3] or grad.shape[2] == 1)


def is_rows(grad: torch.Tensor) -> bool:
    """Whether an image of `grad` is a matrix whose rows of positions the library takes as they are."""
    wide = grad.stride(1) >= grad.shape[2] * grad.shape[3]
    return has_flat_images(grad) and wide and not (grad.stride(0) % 8 or grad.stride(1) % 8)


def as_matrices(grad: torch.Tensor, columns_first: bool) -> torch.Tensor:
    """`grad` as matrices `(B, O, H' * W')`; copied to channels_last where its layout allows no product.

    Args:
        grad: `(B, O, H', W')`.
        columns_first: whether only channels_last will do.
    """
    if not columns_first and is_rows(grad):
        return grad.flatten(2)
    batch, outputs, positions = grad.shape[0], grad.shape[1], grad.shape[2] * grad.shape[3]
    if has_flat_images(grad) and not grad.is_contiguous(memory_format=torch.channels_last):
        columns = grad.new_empty((batch, positions, outputs))
        tiles = cdiv(outputs, COPIED) * cdiv(positions, COPIED)
        channels_last_kernel[(batch * tiles,)](
            grad, columns, outputs, positions, grad.stride(0), grad.stride(1), SIDE=COPIED, num_warps=4
        )
        return columns.mT
    columns = grad.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return columns.reshape(batch, positions, outputs).mT


def projected_sums(
    grad: torch.Tensor, core: torch.Tensor, folded: torch.Tensor, kernel: Sequence[int], with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Projects `grad` first; None where the GPU has no room for the kernel.

    Args:
        grad: `(B, O, H', W')`, bfloat16 or float16.
        core: `(B, channels, rank_H, rank_W)`.
        folded: from `folded_factor`, in the dtype of `grad`; float32 for `patch_sums`, which rounds what it expands to.
        kernel: height and width of the kernel.
        with_bias: whether to sum `grad` up too.

    Returns:
        Partial sums, float32: `(splits, O, kernel height, kernel width, padded channels)`, and `(splits, O)` or None.
    """
    batch, outputs, taps = grad.shape[0], grad.shape[1], math.prod(kernel)
    channels, ranks = core.shape[1], math.prod(core.shape[2:])
    core, width, terms = core.contiguous(), power_of_two(channels), power_of_two(ranks)
    pitch = folded.shape[1]
    at_once = max(1, min(batch, PROJECTED_BYTES // (4 * outputs * pitch)))
    shares = cdiv(batch, at_once)
    at_once = cdiv(batch, shares)

    def start(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = cdiv(outputs * taps, tile.stream)
        splits = splits_for(tiles, at_once, 4 * outputs * taps * width * shares, grad.numel() * 2)
        parts = grad.new_empty((shares * splits, outputs, *kernel, width), dtype=torch.float32)
        bias_parts = grad.new_empty((shares * splits, outputs), dtype=torch.float32) if with_bias else parts
        for share, first in enumerate(range(0, batch, at_once)):
            images = min(at_once, batch - first)
            matrices = as_matrices(grad[first : first + images], columns_first=False)
            projected = wide_product(matrices, folded.expand(images, -1, -1))
            contract_kernel[(tiles * splits,)](
                projected,
                core[first:],
                parts[share * splits :],
                bias_parts[share * splits :],
                images,
                outputs,
                channels,
                ranks,
                pitch // 4,
                splits,
                TAPS=taps,
                SLOTS=slots(ranks),
                RANKS=terms,
                IMAGES=tile.sum // terms,
                CHANNELS=width,
                ROWS=tile.stream,
                BIAS=with_bias,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return parts, bias_parts

    shape, variant = (outputs, taps, ranks, width), (grad.dtype, with_bias)
    found = launch_fitting("convolution_weight_grad, contract", shape, variant, contract_tiles_for, start)
    return None if found is None else (found[0], found[1] if with_bias else None)


def contract_tiles_for(outputs: int, taps: int, ranks: int, width: int) -> list[Tile]:
    """Tiles of `contract_kernel`, which sum over the ranks of some images at once."""
    terms = max(64, power_of_two(ranks))
    if terms > 64:
        return [Tile(4096 // terms, terms, 8, 2), Tile(16, terms, 8, 1)]
    # Operands of other matrix units lie in registers.
    first = [Tile(64, terms, 4, 3), Tile(64, terms, 4, 2)] if has_wide_units() else [Tile(64, terms, 8, 2)]
    return [*first, Tile(32, terms, 4, 2), Tile(16, terms, 4, 1)]


def patch_sums(
    grad: torch.Tensor, core: torch.Tensor, folded: torch.Tensor, kernel: Sequence[int], with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Expands the core first; arguments and results as those of `projected_sums`, whose parts it returns as a view."""
    batch, outputs, taps = grad.shape[0], grad.shape[1], math.prod(kernel)
    channels, ranks, positions = core.shape[1], math.prod(core.shape[2:]), folded.shape[0]
    core, padded = core.contiguous(), power_of_two(core.shape[1])
    width = taps * padded + (ONES if with_bias else 0)
    at_once = max(1, min(batch, PATCHES_BYTES // (2 * positions * width)))
    groups = _groups(at_once, batch, outputs, width)

    def start(tile: Tile) -> torch.Tensor:
        products = []
        for first in range(0, batch, at_once):
            count = min(at_once, batch - first)
            patches = grad.new_empty((count, positions, width))
            patches_kernel[(count * cdiv(positions * taps, tile.stream),)](
                folded,
                core[first:],
                patches,
                positions,
                channels,
                ranks,
                folded.shape[1] // 8,
                width // 8,
                TAPS=taps,
                SLOTS=slots(ranks),
                RANKS=power_of_two(ranks),
                CHANNELS=padded,
                ROWS=tile.stream,
                BIAS=with_bias,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
            parts = groups if count % groups == 0 else 1
            matrices = as_matrices(grad[first : first + count], columns_first=True).mT
            matrices = matrices.reshape(parts, -1, outputs)
            products.append(wide_product(matrices.mT, patches.view(parts, -1, width)))
        return products[0] if len(products) == 1 else torch.cat(products)

    shape = (positions * taps, ranks, padded)
    parts = launch_fitting("convolution_weight_grad, patches", shape, (grad.dtype, with_bias), patch_tiles_for, start)
    if parts is None:
        return None
    if len(parts) > MAX_EXPANDED_SPLITS:
        parts = sum_parts(parts, torch.float32)[0].unsqueeze(0)
    sums = parts[:, :, : taps * padded].unflatten(2, (*kernel, padded))
    return sums, parts[:, :, taps * padded].contiguous() if with_bias else None


def patch_tiles_for(rows: int, ranks: int, width: int) -> list[Tile]:
    """Tiles of `patches_kernel`."""
    return [Tile(rows, power_of_two(ranks), 4, 1) for rows in (128, 64, 16)]


def _groups(images: int, batch: int, outputs: int, width: int) -> int:
    """Products that a share of the batch is taken in, a divisor of its images; they fill a GPU if there is room."""
    tiles = cdiv(outputs, LIBRARY_TILE) * cdiv(width, LIBRARY_TILE)
    most = max(1, min(LIBRARY_PROGRAMS // tiles, PARTS_BYTES * images // (4 * outputs * width * batch)))
    return max(count for count in range(1, most + 1) if images % count == 0)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product of 16-bit matrices in float32."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())
