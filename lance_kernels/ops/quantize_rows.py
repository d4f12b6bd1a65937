"""Tensors in 8 bits with one step a row: what norms and attention keep in place of their inputs.

The memory of a tensor is read as `(outer, rows, inner)`; a row has one step, the largest deviation from its center over
127, and `code = round((x - center) / step)`. The error of an element is at most half its row's step. A row that holds
NaN or an infinity comes back as NaN, and so does one of float64 whose step is beyond float32 (deviations above 4.3e40).
A row whose step has no finite inverse in float32 (deviations below 3.8e-37) comes back as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import accumulation_dtype, check, check_floating
from lance_kernels.ops._layout import check_order, empty_in_order, from_order, in_order
from lance_kernels.ops._registry import define, not_differentiable, register_triton


def quantize_rows(
    x: torch.Tensor, center: torch.Tensor | None, outer: int, rows: int, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a tensor's deviations from a center to 8 bits.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.
        center: `(rows,)`, subtracted first; None for zero.
        outer: with `rows`, how memory is read: `(outer, rows, inner)` in the given order of dimensions.
        rows: number of rows.
        order: the dimensions of `x` from the slowest to the fastest.

    Returns:
        Codes, int8, `(numel,)` in that order, and steps, float32, `(rows,)`. Not differentiable.

    Raises:
        RuntimeError: `outer` and `rows` do not divide the number of elements, or shapes do not fit.
    """
    codes, steps = torch.ops.lance.quantize_rows(x, center, outer, rows, order)
    return codes, steps


def dequantize_rows(
    codes: torch.Tensor, steps: torch.Tensor, outer: int, like: torch.Tensor, order: Sequence[int]
) -> torch.Tensor:
    """The deviations that `quantize_rows` rounded, `code * step`.

    Args:
        codes: int8, `(numel,)`.
        steps: float32, `(rows,)`.
        outer: as in `quantize_rows`.
        like: gives shape and dtype; its values are not read.
        order: the dimensions from the slowest to the fastest.

    Returns:
        Shape and dtype of `like`, memory in `order`.
    """
    out: torch.Tensor = torch.ops.lance.dequantize_rows(codes, steps, outer, like, order)
    return out


def check_quantize(x: torch.Tensor, center: torch.Tensor | None, outer: int, rows: int, order: Sequence[int]) -> None:
    check_floating("quantize_rows", "x", x)
    check_order("quantize_rows", x, order)
    check(
        x.numel() == 0 or (outer > 0 and rows > 0 and x.numel() % (outer * rows) == 0),
        f"lance::quantize_rows: outer {outer} and rows {rows} do not divide x, of shape {tuple(x.shape)}",
    )
    check(
        center is None or (center.dim() == 1 and center.shape[0] == rows),
        f"lance::quantize_rows: center has shape {None if center is None else tuple(center.shape)}; expected ({rows},)",
    )


def quantize_reference(
    x: torch.Tensor, center: torch.Tensor | None, outer: int, rows: int, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantize(x, center, outer, rows, order)
    if x.numel() == 0:
        return x.new_empty([0], dtype=torch.int8), x.new_zeros([rows], dtype=torch.float32)
    flat = in_order(x, order).view(outer, rows, -1).to(accumulation_dtype(x.dtype))
    if center is not None:
        flat = flat - center.to(flat.dtype)[:, None]
    largest = flat.abs().amax(dim=(0, 2))
    steps = torch.where(largest.isfinite(), largest / 127, torch.nan).to(torch.float32)
    steps = torch.where((1 / steps).isinf(), 0.0, steps)
    inverse = torch.where(steps > 0, 1 / steps, 0.0).to(flat.dtype)
    codes = torch.round(flat * inverse[:, None]).nan_to_num(0).clamp(-127, 127)
    return codes.to(torch.int8).view(-1), steps


def _quantize_fake(
    x: torch.Tensor, center: torch.Tensor | None, outer: int, rows: int, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    check_quantize(x, center, outer, rows, order)
    return x.new_empty([x.numel()], dtype=torch.int8), x.new_empty([rows], dtype=torch.float32)


def check_dequantize(
    codes: torch.Tensor, steps: torch.Tensor, outer: int, like: torch.Tensor, order: Sequence[int]
) -> None:
    check_floating("dequantize_rows", "like", like)
    check_order("dequantize_rows", like, order)
    check(
        codes.dtype == torch.int8 and codes.dim() == 1 and codes.shape[0] == like.numel(),
        f"lance::dequantize_rows: codes has dtype {codes.dtype} and shape {tuple(codes.shape)}; expected torch.int8 "
        f"and {(like.numel(),)}, one an element of {tuple(like.shape)}",
    )
    check_floating("dequantize_rows", "steps", steps)
    rows = outer * steps.shape[0] if steps.dim() == 1 else 0
    check(
        steps.dim() == 1 and (like.numel() == 0 or (rows > 0 and like.numel() % rows == 0)),
        f"lance::dequantize_rows: steps has shape {tuple(steps.shape)}; expected one a row, {outer} times as many "
        f"dividing the elements of {tuple(like.shape)}",
    )


def dequantize_reference(
    codes: torch.Tensor, steps: torch.Tensor, outer: int, like: torch.Tensor, order: Sequence[int]
) -> torch.Tensor:
    check_dequantize(codes, steps, outer, like, order)
    shape = [like.shape[dim] for dim in order]
    if like.numel() == 0:
        return from_order(like.new_empty(shape), order)
    values = codes.view(outer, steps.shape[0], -1).to(accumulation_dtype(like.dtype)) * steps[:, None]
    return from_order(values.to(like.dtype).view(shape), order)


def _dequantize_fake(
    codes: torch.Tensor, steps: torch.Tensor, outer: int, like: torch.Tensor, order: Sequence[int]
) -> torch.Tensor:
    check_dequantize(codes, steps, outer, like, order)
    return empty_in_order(like, order)


def placeholder(shape: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    """A tensor that gives shape and dtype to `dequantize_rows` and takes no memory."""
    return like.new_empty(()).expand(shape)


define(
    "quantize_rows(Tensor x, Tensor? center, SymInt outer, SymInt rows, int[] order) -> (Tensor, Tensor)",
    reference=quantize_reference,
    fake=_quantize_fake,
    autograd=not_differentiable("quantize_rows"),
)
define(
    "dequantize_rows(Tensor codes, Tensor steps, SymInt outer, Tensor like, int[] order) -> Tensor",
    reference=dequantize_reference,
    fake=_dequantize_fake,
    autograd=not_differentiable("dequantize_rows"),
)
register_triton("quantize_rows")
register_triton("dequantize_rows", file="quantize_rows")
