"""The second launch of the weight gradients: partial sums are added up in order and expanded by the feature factor.

    weight_grad[o, c, t] = sum_d (sum_s parts[s, o, t, d]) factor[c, d]

with one tap `t` for a linear layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import PROGRAMS, Tile, kronecker, launch_fitting, matmul_precision, nearest

# Rows and columns of the gradient that a program takes at once.
TILES = [Tile(side, side, 4, 2) for side in (64, 32, 16)]


@triton.jit
def reduce_kernel(
    parts,  # (splits, outputs, TAPS_H, TAPS_W, D)
    bias_parts,  # (splits, outputs)
    factor,  # (features, D) float32
    weight_grad,  # (outputs, features, HEIGHT, WIDTH)
    bias_grad,  # (outputs,)
    outputs,
    features,
    splits,
    shares,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    BIAS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`weight_grad = (sum of parts) factor^T` without the padded taps, and the bias gradient's sum."""
    tile, share = tl.program_id(0) // shares, tl.program_id(0) % shares
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # (ROWS,), outputs and taps
    o, tap = row // (HEIGHT * WIDTH), row % (HEIGHT * WIDTH)
    inside = o < outputs
    at = (o * TAPS_H + tap // WIDTH) * TAPS_W + tap % WIDTH
    step = outputs.to(tl.int64) * (TAPS_H * TAPS_W * D)
    d = tl.arange(0, D)
    total = tl.zeros((ROWS, D), dtype=tl.float32)
    # Loads of several splits are in flight at once.
    for split in tl.range(0, splits, loop_unroll_factor=4):
        total += tl.load(parts + split * step + at[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    if BIAS:  # noqa: SIM102 - known when compiling, unlike the next
        if share == 0:
            bias = tl.zeros((ROWS,), dtype=tl.float32)
            for split in tl.range(0, splits, loop_unroll_factor=4):
                bias += tl.load(bias_parts + o + split * outputs, mask=inside, other=0.0)
            tl.store(bias_grad + o, bias.to(bias_grad.dtype.element_ty), mask=inside)
    total = nearest(total, PRECISION)
    tiles = tl.cdiv(features, COLUMNS)
    size = tl.cdiv(tiles, shares)
    for column in range(share * size, tl.minimum((share + 1) * size, tiles)):
        c = (column * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)  # (COLUMNS,)
        rows = tl.load(factor + c[:, None] * D + d[None, :], mask=(c < features)[:, None], other=0.0)  # (COLUMNS, D)
        product = tl.dot(total, tl.trans(rows), input_precision=PRECISION)  # (ROWS, COLUMNS)
        places = weight_grad + (o * features * (HEIGHT * WIDTH) + tap)[:, None] + (c * (HEIGHT * WIDTH))[None, :]
        tl.store(places, product.to(weight_grad.dtype.element_ty), mask=inside[:, None] & (c < features)[None, :])


def tiles_for(rows: int, features: int, second: int) -> list[Tile]:
    """Tiles for a padded rank, those first of which there are enough for a GPU."""
    counts = [triton.cdiv(rows, tile.stream) * triton.cdiv(features, tile.sum) for tile in TILES]
    return [tile for tile, count in zip(TILES, counts) if 2 * count >= PROGRAMS] or TILES[::-1]


def reduce_and_expand(
    parts: torch.Tensor,
    feature: torch.Tensor,
    dtype: torch.dtype,
    bias_parts: torch.Tensor | None = None,
    taps: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Launches the kernel; None where the GPU has no room for it.

    Args:
        parts: `(splits, O, padded rank)`, or with two padded taps between, float32, contiguous.
        feature: factor of the features, `(features, rank)`.
        dtype: dtype of the gradients.
        bias_parts: `(splits, O)`, float32, for the bias gradient too.
        taps: kernel height and width, without padding.

    Returns:
        `(O, features)`, or `(O, features, *taps)`; and `(O,)` or None.
    """
    parts = parts.contiguous()
    splits, outputs, *padded_taps, second = parts.shape
    features, precision = feature.shape[0], matmul_precision(dtype)
    weight_grad = parts.new_empty((outputs, features, *(taps or ())), dtype=dtype)
    height, width = taps or (1, 1)
    padded_height, padded_width = padded_taps or (1, 1)
    rows = outputs * height * width
    bias_grad = None if bias_parts is None else parts.new_empty(outputs, dtype=dtype)

    def start(tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        row_tiles = triton.cdiv(rows, tile.stream)
        shares = max(1, min(triton.cdiv(features, tile.sum), PROGRAMS // row_tiles))
        reduce_kernel[(row_tiles * shares,)](
            parts,
            parts if bias_parts is None else bias_parts,
            kronecker([feature], torch.float32, second, precision),
            weight_grad,
            parts if bias_grad is None else bias_grad,
            outputs,
            features,
            splits,
            shares,
            HEIGHT=height,
            WIDTH=width,
            TAPS_H=padded_height,
            TAPS_W=padded_width,
            BIAS=bias_grad is not None,
            D=second,
            ROWS=tile.stream,
            COLUMNS=tile.sum,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return weight_grad, bias_grad

    variant = (dtype, precision, bias_grad is not None, taps, tuple(padded_taps))
    return launch_fitting("weight_grad, sums", (rows, features, second), variant, tiles_for, start)
