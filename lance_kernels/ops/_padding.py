"""Padding as a look-up of rows, so that a factor can be padded and shifted in place of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

MODES = ("zeros", "reflect", "replicate", "circular")


def padded_rows(size: int, before: int, after: int, mode: str, device: torch.device) -> torch.Tensor:
    """Row of the unpadded mode that each row of the padded one shows.

    Args:
        size: rows of the unpadded mode.
        before: rows added in front.
        after: rows added behind.
        mode: "zeros", "reflect", "replicate" or "circular".
        device: device of the result.

    Returns:
        `(before + size + after,)` int64; `size` stands for a row of zeros.
    """
    rows = torch.arange(-before, size + after, device=device)
    if mode == "zeros":
        return torch.where((rows >= 0) & (rows < size), rows, size)
    if mode == "replicate":
        return rows.clamp(0, size - 1)
    if mode == "circular":
        return rows % size
    rows = rows.abs()
    return torch.where(rows >= size, 2 * (size - 1) - rows, rows)


def shifted_factor(
    factor: torch.Tensor, rows: torch.Tensor, outputs: int, kernel: int, stride: int, dilation: int
) -> torch.Tensor:
    """`V[h', i, k] = U_padded[stride * h' + dilation * i, k]`, the factor as each kernel tap meets it.

    Args:
        factor: `(size, rank)`.
        rows: `(padded size,)`, from `padded_rows`.
        outputs: positions of the output along this mode.
        kernel: taps of the kernel along this mode.
        stride: the convolution's stride along this mode.
        dilation: the convolution's dilation along this mode.

    Returns:
        `(outputs, kernel, rank)`.
    """
    padded = torch.cat([factor, factor.new_zeros(1, factor.shape[1])])
    output = torch.arange(outputs, device=factor.device).unsqueeze(1)
    tap = torch.arange(kernel, device=factor.device)
    return padded[rows[stride * output + dilation * tap]]


def pad_pairs(padding: Sequence[int], dimensions: int) -> list[tuple[int, int]]:
    """Padding as one (before, after) pair a spatial dimension, from one or two numbers each."""
    if len(padding) == dimensions:
        return [(amount, amount) for amount in padding]
    return [(padding[2 * index], padding[2 * index + 1]) for index in range(dimensions)]


def pad_spatial(x: torch.Tensor, pairs: Sequence[tuple[int, int]], mode: str) -> torch.Tensor:
    """Pads the trailing modes of `x` as `torch.nn.Conv2d` does before it convolves."""
    if not any(before or after for before, after in pairs):
        return x
    amounts = [amount for pair in reversed(pairs) for amount in pair]
    return F.pad(x, amounts, mode="constant" if mode == "zeros" else mode)


def unpad_spatial_grad(
    grad: torch.Tensor, sizes: Sequence[int], pairs: Sequence[tuple[int, int]], mode: str
) -> torch.Tensor:
    """Gradient of `pad_spatial`: every padded row's gradient is added to the row it shows."""
    for index, (size, (before, after)) in enumerate(zip(sizes, pairs)):
        dim = grad.dim() - len(sizes) + index
        if not before and not after:
            continue
        if mode == "zeros":
            grad = grad.narrow(dim, before, size)
        else:
            rows = padded_rows(size, before, after, mode, grad.device)
            shape = [*grad.shape[:dim], size, *grad.shape[dim + 1 :]]
            grad = grad.new_zeros(shape).index_add_(dim, rows, grad)
    return grad
