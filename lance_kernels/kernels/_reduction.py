"""What follows the launches that leave partial sums: they are added up in order, for the weight gradients expanded too.

    weight_grad[o, c, t] = sum_d (sum_s parts[s, o, t, d]) factor[c, d]

with one tap `t` for a linear layer. Every program that expands adds up the parts of its rows; many parts are added up
by a launch of their own before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import (
    PROGRAMS,
    Tile,
    cdiv,
    has_wide_units,
    kronecker,
    launch_fitting,
    matmul_precision,
    nearest,
    next_power_of_two,
)

# Rows and columns of the gradient that a program takes at once.
TILES = [Tile(128, 64, 8, 1), *(Tile(side, side, 4, 2) for side in (64, 32, 16))]
# A product in three parts holds operands in registers: those that do not spill, by the padded rank.
TILES_OF_THREE = {128: [Tile(32, 64, 8, 2), Tile(16, 32, 8, 2)], 256: [Tile(16, 32, 8, 2)]}
MAX_EXPANDED_SPLITS = 2  # that the programs which expand add up themselves
PITCH_UNIT = 8  # elements that divide the pitch of parts

SUM_WARPS, SUM_ELEMENTS = 4, 4096  # elements of all splits that a program which adds up has in flight
SUM_BLOCKS = (1024, 512, 256, 128)  # of the sum, at least a warp's 16-byte loads


@triton.jit
def add_up(parts, total, block, elements, splits, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """One block of the sum over splits, `LANES` of which are taken at once; `elements` are those of a split."""
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = index < elements
    sums = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    for first in range(0, splits, LANES):
        split = (first + tl.arange(0, LANES)).to(tl.int64)  # (LANES,)
        places = parts + split[:, None] * elements + index[None, :]
        sums += tl.load(places, mask=(split < splits)[:, None] & inside[None, :], other=0.0)
    tl.store(total + index, tl.sum(sums, axis=0).to(total.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    parts,  # (splits, elements)
    total,  # (elements,)
    bias_parts,  # (splits, outputs)
    bias,  # (outputs,)
    elements,
    outputs,
    splits,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The sum of parts, and that of the bias gradient's in programs behind it."""
    block, blocks = tl.program_id(0), tl.cdiv(elements, BLOCK)
    if block < blocks:
        add_up(parts, total, block, elements, splits, BLOCK, LANES)
    elif BIAS:
        add_up(bias_parts, bias, block - blocks, outputs, splits, BLOCK, LANES)


@triton.jit
def reduce_kernel(
    parts,  # (splits, outputs, TAPS_H, TAPS_W, D), an output's behind a pitch
    bias_parts,  # (splits, outputs)
    factor,  # (features, D) float32
    weight_grad,  # (outputs, features, HEIGHT, WIDTH)
    bias_grad,  # (outputs,)
    outputs,
    features,
    splits,
    shares,
    split_step,
    pitch,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS_W: tl.constexpr,
    TAPS: tl.constexpr,
    TURNED: tl.constexpr,
    PITCH_UNIT: tl.constexpr,
    BIAS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`weight_grad = (sum of parts) factor^T` without the padded taps, and the bias gradient's sum."""
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,), outputs and taps
    o, tap = row // TAPS, row % TAPS
    inside = (o < outputs) & (tap < HEIGHT * WIDTH)
    at = o * pitch * PITCH_UNIT + (tap // WIDTH * TAPS_W + tap % WIDTH) * D
    step = tl.cast(split_step, tl.int64) * PITCH_UNIT
    d = tl.arange(0, D)
    total = tl.zeros((ROWS, D), dtype=tl.float32)
    # Loads of several splits are in flight at once.
    for split in tl.range(0, splits, loop_unroll_factor=4):
        total += tl.load(parts + split * step + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    if BIAS:  # noqa: SIM102 - known when compiling, unlike the next
        if share == 0:
            bias = tl.zeros((ROWS,), dtype=tl.float32)
            for split in tl.range(0, splits, loop_unroll_factor=4):
                bias += tl.load(bias_parts + o + split * outputs, mask=inside, other=0.0)
            tl.store(bias_grad + o, bias.to(bias_grad.dtype.element_ty), mask=inside & (tap == 0))
    total = nearest(total, PRECISION)
    tiles = tl.cdiv(features, COLUMNS)
    size = tl.cdiv(tiles, shares)
    for column in range(share * size, tl.minimum((share + 1) * size, tiles)):
        c = (column * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)  # (COLUMNS,)
        rows = tl.load(factor + c[:, None] * D + d[None, :], mask=(c < features)[:, None], other=0.0)  # (COLUMNS, D)
        product = tl.dot(total, tl.trans(rows), input_precision=PRECISION)  # (ROWS, COLUMNS)
        if not TURNED:
            places = weight_grad + (o * features * (HEIGHT * WIDTH) + tap)[:, None] + (c * (HEIGHT * WIDTH))[None, :]
            tl.store(places, product.to(weight_grad.dtype.element_ty), mask=inside[:, None] & (c < features)[None, :])
        else:
            # The taps of a feature lie side by side, those of neighbouring features next to them.
            turned = tl.permute(tl.reshape(product, (ROWS // TAPS, TAPS, COLUMNS)), (0, 2, 1))
            turned = tl.reshape(turned, (ROWS // TAPS * COLUMNS, TAPS)).to(weight_grad.dtype.element_ty)
            entry = tl.arange(0, ROWS // TAPS * COLUMNS)  # outputs and features
            output = (tile * (ROWS // TAPS) + entry // COLUMNS).to(tl.int64)
            feature = column * COLUMNS + entry % COLUMNS
            place = weight_grad + (output * features + feature) * (HEIGHT * WIDTH)
            t = tl.arange(0, TAPS)
            known = ((output < outputs) & (feature < features))[:, None] & (t < HEIGHT * WIDTH)[None, :]
            tl.store(place[:, None] + t[None, :], turned, mask=known)


def sum_parts(
    parts: torch.Tensor,
    dtype: torch.dtype,
    bias_parts: torch.Tensor | None = None,
    bias_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds partial sums up in one launch, always in the same order.

    Args:
        parts: `(splits, ...)`, float32, contiguous.
        dtype: dtype of the sum.
        bias_parts: `(splits, O)`, float32, contiguous, to add up too.
        bias_dtype: dtype of their sum, `dtype` where it is None.

    Returns:
        `(...)`; and `(O,)` or None.
    """
    splits = parts.shape[0]
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    bias = None if bias_parts is None else parts.new_empty(bias_parts.shape[1:], dtype=bias_dtype or dtype)
    elements, outputs = total.numel(), 0 if bias is None else bias.numel()
    block = next((size for size in SUM_BLOCKS if cdiv(elements, size) >= PROGRAMS), SUM_BLOCKS[-1])
    sum_kernel[(cdiv(elements, block) + cdiv(outputs, block),)](
        parts,
        total,
        parts if bias_parts is None else bias_parts,
        total if bias is None else bias,
        elements,
        outputs,
        splits,
        BIAS=bias is not None,
        BLOCK=block,
        LANES=min(next_power_of_two(splits), SUM_ELEMENTS // block),
        num_warps=SUM_WARPS,
    )
    return total, bias


def tiles_for(rows: int, features: int, second: int, precision: str) -> list[Tile]:
    """Tiles for a padded rank, those first of which there are enough for a GPU."""
    tiles = TILES
    if precision == "tf32x3":
        tiles = [*TILES[:2], Tile(64, 32, 8, 2)] if has_wide_units() else []
        tiles += TILES_OF_THREE[max(second, 128)]
    counts = [cdiv(rows, tile.stream) * cdiv(features, tile.sum) for tile in tiles]
    return [tile for tile, count in zip(tiles, counts) if 2 * count >= PROGRAMS] or tiles[::-1]


def reduce_and_expand(
    parts: torch.Tensor,
    feature: torch.Tensor,
    dtype: torch.dtype,
    bias_parts: torch.Tensor | None = None,
    taps: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Launches the kernel, and before it one that adds many parts up; None where the GPU has no room for it.

    Args:
        parts: `(splits, O, padded rank)`, or with two padded taps between, float32, contiguous; two or less may have
            gaps between outputs, a multiple of `PITCH_UNIT` from one to the next.
        feature: factor of the features, `(features, rank)`.
        dtype: dtype of the gradients.
        bias_parts: `(splits, O)`, float32, for the bias gradient too.
        taps: kernel height and width, without padding.

    Returns:
        `(O, features)`, or `(O, features, *taps)`; and `(O,)` or None.
    """
    bias_grad = None
    if parts.shape[0] > MAX_EXPANDED_SPLITS:
        total, bias_grad = sum_parts(parts, torch.float32, bias_parts, dtype)
        parts, bias_parts = total.unsqueeze(0), None
    elif bias_parts is not None:
        bias_grad = parts.new_empty(bias_parts.shape[1], dtype=dtype)
    splits, outputs, *padded_taps, second = parts.shape
    features, precision = feature.shape[0], matmul_precision(dtype)
    weight_grad = parts.new_empty((outputs, features, *(taps or ())), dtype=dtype)
    height, width = taps or (1, 1)
    padded_width = padded_taps[1] if padded_taps else 1
    rows, padded = outputs * height * width, next_power_of_two(height * width)

    def start(tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        # Taps are padded to lie side by side when they are stored.
        turned = 1 < padded <= tile.stream
        row_tiles = cdiv(outputs * padded if turned else rows, tile.stream)
        shares = max(1, min(cdiv(features, tile.sum), PROGRAMS // row_tiles))
        reduce_kernel[(row_tiles * shares,)](
            parts,
            parts if bias_parts is None else bias_parts,
            kronecker([feature], torch.float32, second, precision),
            weight_grad,
            weight_grad if bias_grad is None else bias_grad,
            outputs,
            features,
            splits,
            shares,
            # A stride of one split, or of one output, may be any number.
            parts.stride(0) // PITCH_UNIT,
            parts.stride(1) // PITCH_UNIT,
            HEIGHT=height,
            WIDTH=width,
            TAPS_W=padded_width,
            TAPS=padded if turned else height * width,
            TURNED=turned,
            PITCH_UNIT=PITCH_UNIT,
            BIAS=bias_parts is not None,
            D=second,
            ROWS=tile.stream,
            COLUMNS=tile.sum,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return weight_grad, bias_grad

    variant = (dtype, bias_parts is not None, taps, tuple(padded_taps))
    return launch_fitting("weight_grad, sums", (rows, features, second, precision), variant, tiles_for, start)
