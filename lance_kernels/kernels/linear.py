"""A linear layer's weight and bias gradients from its input's core on a GPU, `grad_output` read once, in Triton.

With `grad (batch, N, O)`, the core `(batch, K, D)` and the token factor `U (N, K)`, the first launch forms
`parts[split] = sum over its share of the batch of grad^T U core`, `(O, D)`: either projecting first, `(grad^T U) core`,
or expanding first, `grad^T (U core)`; without a token factor the core stands for `U core`. The second adds the parts up
in order and multiplies with the transposed feature factor. The bias gradient is a product with ones in the first.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import (
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
from lance_kernels.kernels._reduction import reduce_and_expand, sum_parts
from lance_kernels.ops.linear import (
    _check_weight_grad,
    _weight_bias_grad_reference,
    _weight_grad_plan,
    _weight_grad_reference,
)
from lance_kernels.ops.tucker import Factors, mode_product

MAX_RANK = 256


@triton.jit
def weight_grad_kernel(
    grad,  # (batch, tokens, outputs) by strides
    factor,  # (tokens, K); float32 when the core is expanded
    core,  # (batch, token_rank or tokens, feature_rank)
    parts,  # (splits, outputs, D)
    bias_parts,  # (splits, outputs)
    tokens,
    outputs,
    token_rank,
    feature_rank,
    chunks,
    units,
    splits,
    batch_step,
    token_step,
    output_step,
    OUTPUT_UNIT: tl.constexpr,
    OUTPUT_CONTIGUOUS: tl.constexpr,
    ALIGN: tl.constexpr,
    WAY: tl.constexpr,
    BIAS: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    STREAM: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Sizes and steps come divided by their units, so that the compiler sees what divides them.
    output_size = outputs * OUTPUT_UNIT
    output_stride = 1 if OUTPUT_CONTIGUOUS else tl.cast(output_step, tl.int64) * ALIGN
    tiles = tl.cdiv(output_size, STREAM)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    o = (tile * STREAM + tl.arange(0, STREAM)).to(tl.int64)  # (STREAM,)
    inside = o < output_size
    columns = grad + o * output_stride
    k = tl.arange(0, K)
    d = tl.arange(0, D)
    chunk_size = tl.cdiv(tl.cdiv(tokens, chunks), SUM) * SUM
    total = tl.zeros((STREAM, D), dtype=tl.float32)
    ones = tl.full((SUM, 16), 1.0, dtype=tl.float32).to(grad.dtype.element_ty)
    bias = tl.zeros((STREAM, 16), dtype=tl.float32)
    share = tl.cdiv(units, splits)
    for unit in range(split * share, tl.minimum((split + 1) * share, units)):
        batch, chunk = (unit // chunks).to(tl.int64), unit % chunks
        first = chunk * chunk_size
        last = tl.minimum(first + chunk_size, tokens)
        if WAY != "kept":
            corner = core + (batch * token_rank + k[:, None]) * feature_rank + d[None, :]
            filled = (k[:, None] < token_rank) & (d[None, :] < feature_rank)
            matrix = nearest(tl.load(corner, mask=filled, other=0.0), PRECISION).to(tl.float32)  # (K, D)
        sums = tl.zeros((STREAM, K), dtype=tl.float32)
        for start in range(first, last, SUM):
            n = (start + tl.arange(0, SUM)).to(tl.int64)  # (SUM,)
            present = n < last
            places = columns[:, None] + (batch * batch_step + n * token_step)[None, :] * ALIGN
            block = tl.load(places, mask=inside[:, None] & present[None, :], other=0.0)  # (STREAM, SUM)
            if WAY == "kept":
                entries = core + (batch * tokens + n)[:, None] * feature_rank + d[None, :]
                known = present[:, None] & (d[None, :] < feature_rank)
                rows = tl.load(entries, mask=known, other=0.0).to(block.dtype)  # (SUM, D)
                total = tl.dot(block, nearest(rows, PRECISION), total, input_precision=PRECISION)
            else:
                rows = tl.load(factor + n[:, None] * K + k[None, :], mask=present[:, None], other=0.0)  # (SUM, K)
                if WAY == "expand":
                    expanded = tl.dot(rows, matrix, input_precision=PRECISION).to(block.dtype)  # (SUM, D)
                    total = tl.dot(block, nearest(expanded, PRECISION), total, input_precision=PRECISION)
                else:
                    sums = tl.dot(block, rows, sums, input_precision=PRECISION)
            if BIAS:
                bias = tl.dot(block, ones, bias, input_precision=PRECISION)
        if WAY == "project":
            total = tl.dot(nearest(sums, PRECISION), matrix, total, input_precision=PRECISION)
    row = split.to(tl.int64) * output_size + o
    tl.store(parts + row[:, None] * D + d[None, :], total, mask=inside[:, None])
    if BIAS:
        # Every column is the same sum.
        tl.store(bias_parts + row, tl.max(bias, axis=1), mask=inside)


def tiles_for(way: str, first: int, second: int, outputs: int, tokens: int, itemsize: int) -> list[Tile]:
    """Tiles of the first launch for padded ranks of the tokens and the features."""
    terms = min(128 // itemsize, power_of_two(tokens))
    inner = second if way == "kept" else first
    # The core, and what is multiplied with it, lie in shared memory beside the loads in flight.
    operands = 0 if way == "kept" else first * second

    def stage(rows: int, terms: int) -> int:
        return (rows * itemsize + inner * (4 if way == "expand" else itemsize)) * terms

    def held(rows: int) -> int:
        return 4 * (operands + (rows * first if way == "project" else 0))

    def tile(rows: int, warps: int, terms: int = terms) -> Tile:
        return Tile(rows, terms, warps, stages_for(stage(rows, terms), held(rows)))

    listed = [tile(128, 4), tile(128, 8), tile(64, 4), tile(64, 8)]
    if itemsize == 4:
        listed = [tile._replace(stages=2) for tile in listed[1:]]
    listed = [tile for tile in listed if tile.stream <= max(64, power_of_two(outputs))]
    listed += [Tile(rows, 16, warps, 2) for rows, warps in ((64, 8), (32, 8), (16, 4))]

    def registers(tile: Tile) -> float:
        held = tile.stream * (inner + second) + operands + (tile.sum * second if way == "expand" else 0)
        return (1.5 if itemsize == 4 else 1.0) * held / (32 * tile.warps)  # float32 is a product in three parts

    return by_preference(
        listed,
        registers=registers,
        shared=lambda tile: tile.stages * stage(tile.stream, tile.sum) + held(tile.stream),
        rereads=lambda tile: inner / tile.stream,
    )


def linear_weight_grads(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Both gradients by two launches; None for what these do not cover.

    Args:
        grad_output: `(..., O)`, float32, bfloat16 or float16.
        core: the input's core, one rank a mode.
        factors: one `(size, rank)` matrix or None a mode of the input.
        with_bias: whether to sum `grad_output` up too.

    Returns:
        `(O, D)`, and `(O,)` or None, in the dtype of `grad_output`.
    """
    _check_weight_grad(grad_output, core, factors)
    feature, feature_rank = factors[-1], core.shape[-1]
    if grad_output.dtype == torch.float64 or not (grad_output.numel() and core.numel()) or feature_rank > MAX_RANK:
        return None
    projects = _projects(
        grad_output.shape, core.shape, tuple(None if factor is None else factor.shape for factor in factors)
    )
    token = factors[-2] if core.dim() > 1 else None
    if token is not None and token.shape[1] > MAX_RANK:
        token = None
    kept = core
    for mode, factor in enumerate(factors[:-1]):
        if factor is not None and not (mode == core.dim() - 2 and token is not None):
            kept = mode_product(kept.float(), factor.float(), mode)
    tokens = math.prod(grad_output.shape[:-1]) if token is None else token.shape[0]
    grad = grad_output.reshape(-1, tokens, grad_output.shape[-1])
    kept = kept.reshape(grad.shape[0], -1, feature_rank).contiguous()
    way = "kept" if token is None else "project" if projects else "expand"
    first, second = 16 if token is None else power_of_two(token.shape[1]), power_of_two(feature_rank)
    parts = _launch_parts(way, grad, kept, token, first, second, with_bias)
    if parts is None:
        return None
    sums, bias_sums = parts
    if feature is None:
        total, bias_grad = sum_parts(sums, grad.dtype, bias_sums if with_bias else None)
        return total[:, :feature_rank].contiguous(), bias_grad
    return reduce_and_expand(sums, feature, grad.dtype, bias_sums if with_bias else None)


@functools.lru_cache(maxsize=1024)
def _projects(grad: torch.Size, core: torch.Size, factors: tuple[torch.Size | None, ...]) -> bool:
    """Whether `grad_output` is projected, by the shapes."""
    return _weight_grad_plan(grad, core, factors)[0]


def _launch_parts(
    way: str,
    grad: torch.Tensor,
    core: torch.Tensor,
    token: torch.Tensor | None,
    first: int,
    second: int,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The first launch; None where the GPU has no room for its kernel.

    Args:
        way: `project`, `expand` or `kept`.
        grad: `(batch, tokens, O)`.
        core: `(batch, token rank or tokens, feature rank)`, contiguous.
        token: factor of the tokens.
        first: padded rank of the tokens.
        second: padded rank of the features.
        with_bias: whether to sum `grad` up too.

    Returns:
        `(splits, O, second)` and `(splits, O)`, float32; without a bias the second means nothing.
    """
    batch, tokens, outputs = grad.shape
    itemsize, precision = grad.element_size(), matmul_precision(grad.dtype)
    matrix = core
    if token is not None:
        matrix = kronecker([token], grad.dtype if way == "project" else torch.float32, first, precision)
    steps = grad.stride()
    unit = alignment(itemsize, outputs, *steps[:2]) if steps[2] == 1 else 1

    def start(tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        tiles = cdiv(outputs, tile.stream)
        chunks = 1 if 2 * batch * tiles >= 512 else cdiv(tokens, 4 * tile.sum)
        units = batch * chunks
        splits = splits_for(tiles, units, 4 * outputs * second, grad.numel() * itemsize)
        parts = grad.new_empty((splits, outputs, second), dtype=torch.float32)
        bias_parts = grad.new_empty((splits, outputs), dtype=torch.float32) if with_bias else parts
        weight_grad_kernel[(tiles * splits,)](
            grad,
            matrix,
            core,
            parts,
            bias_parts,
            tokens,
            outputs // unit,
            core.shape[1],
            core.shape[2],
            chunks,
            units,
            splits,
            steps[0] // unit,
            steps[1] // unit,
            steps[2] // unit,
            OUTPUT_UNIT=unit,
            OUTPUT_CONTIGUOUS=steps[2] == 1,
            ALIGN=unit,
            WAY=way,
            BIAS=with_bias,
            K=first,
            D=second,
            STREAM=tile.stream,
            SUM=tile.sum,
            PRECISION=precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return parts, bias_parts

    variant = (grad.dtype, precision, unit, with_bias)
    shape = (first, second, outputs, tokens, itemsize)
    return launch_fitting(f"linear_weight_grad, {way}", shape, variant, functools.partial(tiles_for, way), start)


def linear_weight_grad(grad_output: torch.Tensor, core: torch.Tensor, factors: Factors) -> torch.Tensor:
    """`lance::linear_weight_grad`; float64, and ranks above `MAX_RANK`, take the reference."""
    grads = linear_weight_grads(grad_output, core, factors, with_bias=False)
    return _weight_grad_reference(grad_output, core, factors) if grads is None else grads[0]


def linear_weight_bias_grad(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::linear_weight_bias_grad`; float64, and ranks above `MAX_RANK`, take the reference."""
    grads = linear_weight_grads(grad_output, core, factors, with_bias=True)
    if grads is None or grads[1] is None:
        return _weight_bias_grad_reference(grad_output, core, factors)
    return grads[0], grads[1]
