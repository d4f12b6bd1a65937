"""Pooling that keeps less than its input: `max_pool` one byte an output element, the averages sizes only.

Both take two or three spatial dimensions; a one-dimensional pooling is a two-dimensional one over rows of height one.
The byte of `max_pool` is the position of the maximum inside its window, counted row by row over the kernel. As in ATen,
the first of equal values wins, and the last NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import MOST_NUMBER, check, check_floating
from lance_kernels.ops._layout import memory_format_of
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    not_differentiable,
    once_differentiable,
    register_triton,
)

MAX_WINDOW = 256


def max_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Max pooling that keeps the position of each maximum in its window, one byte an output element.

    Args:
        x: `(B, C, ...)` or `(C, ...)` with two or three spatial dimensions, any strides, float32, float64, bfloat16 or
            float16.
        kernel: window, one number a spatial dimension, at most 256 elements in all.
        stride: one number a spatial dimension.
        padding: one number a spatial dimension, at most half the window.
        dilation: one number a spatial dimension.
        ceil_mode: round the output's size up.

    Returns:
        `(B, C, ...)` pooled; values and gradient equal `torch.nn.functional.max_pool2d`'s (`max_pool3d`'s) bit for bit.
        A dilated window that steps over the whole input gives -inf and has no gradient.

    Raises:
        RuntimeError: the numbers do not fit `x`, or the window has more than 256 elements.
    """
    y: torch.Tensor = torch.ops.lance.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    return y


def avg_pool(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Average pooling that keeps sizes only.

    Args:
        x: `(B, C, ...)` or `(C, ...)` with two or three spatial dimensions, any strides and floating dtype.
        kernel: window, one number a spatial dimension.
        stride: one number a spatial dimension.
        padding: one number a spatial dimension.
        ceil_mode: round the output's size up.
        count_include_pad: count padded zeros in the average.
        divisor_override: divisor in place of the window's size.

    Returns:
        What `torch.nn.functional.avg_pool2d` (`avg_pool3d`) returns, with the same gradient.
    """
    y: torch.Tensor = torch.ops.lance.avg_pool(
        x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return y


def adaptive_avg_pool(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    """Adaptive average pooling that keeps sizes only.

    Args:
        x: `(B, C, ...)` or `(C, ...)` with two or three spatial dimensions, any strides and floating dtype.
        output_size: one number a spatial dimension.

    Returns:
        What `torch.nn.functional.adaptive_avg_pool2d` (`adaptive_avg_pool3d`) returns, with the same gradient;
        but for rounding where the output is one position, for which PyTorch takes a mean (and so do the layers).
    """
    y: torch.Tensor = torch.ops.lance.adaptive_avg_pool(x, output_size)
    return y


def _spatial(operator: str, x: torch.Tensor, kernel: Sequence[int]) -> int:
    spatial = len(kernel)
    check_floating(operator, "x", x)
    check(
        spatial in (2, 3) and x.dim() in (spatial + 1, spatial + 2),
        f"lance::{operator}: x has shape {tuple(x.shape)} and the window {list(kernel)}; expected two or three spatial "
        "dimensions after (B, C) or (C)",
    )
    return spatial


def pooled_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Spatial size of a pooled output, by ATen's rule: in ceil mode the last window starts inside the padded input."""
    out = []
    for length, window, step, pad, gap in zip(size, kernel, stride, padding, dilation):
        span = length + 2 * pad - gap * (window - 1) - 1 + (step - 1 if ceil_mode else 0)
        count = span // step + 1
        if ceil_mode and (count - 1) * step >= length + pad:
            count -= 1
        out.append(count)
    return out


def max_pooled_shape(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Shape of max pooling's output; refuses an input that is too small for the window."""
    spatial = len(kernel)
    size = pooled_size(x.shape[-spatial:], kernel, stride, padding, dilation, ceil_mode)
    check(min(size) > 0, f"lance::max_pool: x has shape {tuple(x.shape)}, too small for the window {list(kernel)}")
    return [*x.shape[:-spatial], *size]


def image_format(x: torch.Tensor, spatial: int) -> torch.memory_format:
    """The memory format of what is pooled; a volume without a batch only looks like a channels_last batch of images."""
    return memory_format_of(x) if x.dim() == spatial + 2 else torch.contiguous_format


def check_max_pool(
    x: torch.Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Refuses an image or window that max pooling does not take; returns the number of spatial dimensions."""
    spatial = _spatial("max_pool", x, kernel)
    check(
        len(stride) == len(padding) == len(dilation) == spatial
        and all(1 <= number <= MOST_NUMBER for number in (*stride, *dilation, *kernel)),
        f"lance::max_pool: stride {list(stride)}, padding {list(padding)} and dilation {list(dilation)} do not fit the "
        f"window {list(kernel)}; expected one number from 1 to {MOST_NUMBER} a spatial dimension",
    )
    window = 1
    for size in kernel:
        window *= size
    check(
        window <= MAX_WINDOW,
        f"lance::max_pool: the window {list(kernel)} has too many elements; expected at most {MAX_WINDOW}, one byte",
    )
    check(
        all(0 <= 2 * pad <= size for pad, size in zip(padding, kernel)),
        f"lance::max_pool: padding is {list(padding)}; expected at most half the window {list(kernel)}",
    )
    return spatial


def check_max_pool_grad(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> int:
    """Refuses what is not the gradient and offsets of a max pooling; returns the number of spatial dimensions."""
    spatial = check_max_pool(grad, kernel, stride, padding, dilation)
    check(
        grad.shape == offsets.shape and offsets.dtype == torch.uint8,
        f"lance::max_pool_grad: grad has shape {tuple(grad.shape)}, offsets {tuple(offsets.shape)} and dtype "
        f"{offsets.dtype}; expected the same shape, and torch.uint8",
    )
    pooled = list(grad.shape[-spatial:])
    check(
        len(size) == spatial
        and min(size) > 0
        and pooled_size(size, kernel, stride, padding, dilation, ceil_mode) == pooled,
        f"lance::max_pool_grad: size is {list(size)}, which does not pool to {pooled}, as grad is",
    )
    return spatial


def _plain_max_pool(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    two = len(args[0]) == 2
    operator = torch.ops.aten.max_pool2d_with_indices if two else torch.ops.aten.max_pool3d_with_indices
    # ATen refuses a volume without a batch whose strides look like those of a channels_last batch of images.
    y, indices = operator(x if x.dim() == len(args[0]) + 2 else x.contiguous(), *args)
    return y, indices


def _coordinates(
    indices: torch.Tensor, size: Sequence[int], dim: int, stride: int, padding: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input coordinate of each flat index along one spatial dimension, and where its window starts."""
    spatial = len(size)
    inner = 1
    for length in size[dim + 1 :]:
        inner *= length
    position = torch.arange(indices.shape[indices.dim() - spatial + dim], device=indices.device)
    start = (position * stride - padding).view([-1] + [1] * (spatial - 1 - dim))
    return indices // inner % size[dim], start


def max_pool_offsets_reference(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    spatial = check_max_pool(x, kernel, stride, padding, dilation)
    y, indices = _plain_max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    size = x.shape[-spatial:]
    offsets = torch.zeros_like(indices)
    for dim in range(spatial):
        coordinate, start = _coordinates(indices, size, dim, stride[dim], padding[dim])
        offsets = offsets * kernel[dim] + (coordinate - start) // dilation[dim]
    return y, offsets.to(torch.uint8)


def _max_pool_offsets_fake(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    spatial = check_max_pool(x, kernel, stride, padding, dilation)
    shape = max_pooled_shape(x, kernel, stride, padding, dilation, ceil_mode)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=image_format(x, spatial))
    return y, torch.empty_like(y, dtype=torch.uint8)


def max_pool_grad_reference(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    spatial = check_max_pool_grad(grad, offsets, size, kernel, stride, padding, dilation, ceil_mode)
    remaining = offsets.long()
    indices = torch.zeros_like(remaining)
    empty = torch.zeros_like(remaining, dtype=torch.bool)
    inner = 1
    for dim in reversed(range(spatial)):
        position = torch.arange(offsets.shape[offsets.dim() - spatial + dim], device=offsets.device)
        start = (position * stride[dim] - padding[dim]).view([-1] + [1] * (spatial - 1 - dim))
        # A dilated window may step over the whole input.
        empty |= torch.where(start < 0, start % dilation[dim], start) >= size[dim]
        indices += (start + remaining % kernel[dim] * dilation[dim]) * inner
        remaining = remaining // kernel[dim]
        inner *= size[dim]
    grad, indices, remaining = (tensor.masked_fill(empty, 0) for tensor in (grad, indices, remaining))
    if grad.device.type == "cpu":
        check(
            not remaining.any() and bool(((indices >= 0) & (indices < inner)).all()),
            "lance::max_pool_grad: offsets hold a position outside of the input; expected those of max_pool_offsets",
        )
    memory_format = image_format(offsets, spatial)
    x = torch.empty([*grad.shape[:-spatial], *size], dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    operator = (
        torch.ops.aten.max_pool2d_with_indices_backward
        if spatial == 2
        else torch.ops.aten.max_pool3d_with_indices_backward
    )
    grad_x: torch.Tensor = operator(grad, x, kernel, stride, padding, dilation, ceil_mode, indices)
    return grad_x


def _max_pool_grad_fake(grad: torch.Tensor, offsets: torch.Tensor, size: Sequence[int], *args: Any) -> torch.Tensor:
    check_max_pool_grad(grad, offsets, size, *args)
    shape = [*grad.shape[: -len(size)], *size]
    memory_format = image_format(offsets, len(size))
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        y, offsets = torch.ops.lance.max_pool_offsets(x, *args)
        ctx.save_for_backward(offsets)
        ctx.size, ctx.args = x.shape[-len(args[0]) :], args
        kept: torch.Tensor = y
        return kept

    @staticmethod
    @once_differentiable("max_pool")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (offsets,) = ctx.saved_tensors
        return torch.ops.lance.max_pool_grad(grad, offsets, ctx.size, *ctx.args), *[None] * len(ctx.args)


def _max_pool_autograd(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> torch.Tensor:
    if needs_grad(x):
        y: torch.Tensor = apply(_MaxPool, x, kernel, stride, padding, dilation, ceil_mode)
        return y
    with below_autograd():
        return max_pool(x, kernel, stride, padding, dilation, ceil_mode)


def _max_pool_reference(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> torch.Tensor:
    check_max_pool(x, kernel, stride, padding, dilation)
    return _plain_max_pool(x, kernel, stride, padding, dilation, ceil_mode)[0]


def _max_pool_fake(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> torch.Tensor:
    return _max_pool_offsets_fake(x, kernel, stride, padding, dilation, ceil_mode)[0]


def _plain_avg_pool(x: torch.Tensor, *args: Any) -> torch.Tensor:
    y: torch.Tensor = (torch.ops.aten.avg_pool2d if len(args[0]) == 2 else torch.ops.aten.avg_pool3d)(x, *args)
    return y


def _plain_adaptive(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    two = len(output_size) == 2
    operator = torch.ops.aten._adaptive_avg_pool2d if two else torch.ops.aten._adaptive_avg_pool3d
    y: torch.Tensor = operator(x, output_size)
    return y


class _AvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        ctx.size, ctx.memory_format, ctx.args = x.shape, memory_format_of(x), args
        return _plain_avg_pool(x, *args)

    @staticmethod
    @once_differentiable("avg_pool")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # ATen reads nothing of the input but its size and memory format.
        x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        two = len(ctx.args[0]) == 2
        operator = torch.ops.aten.avg_pool2d_backward if two else torch.ops.aten.avg_pool3d_backward
        return operator(grad, x, *ctx.args), *[None] * len(ctx.args)


class _AdaptiveAvgPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
        ctx.size, ctx.memory_format, ctx.two = x.shape, memory_format_of(x), len(output_size) == 2
        return _plain_adaptive(x, output_size)

    @staticmethod
    @once_differentiable("adaptive_avg_pool")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format)
        aten = torch.ops.aten
        operator = aten._adaptive_avg_pool2d_backward if ctx.two else aten._adaptive_avg_pool3d_backward
        return operator(grad, x), None


def _avg_pool_reference(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    _spatial("avg_pool", x, kernel)
    return _plain_avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)


def _avg_pool_autograd(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    args = (kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
    if needs_grad(x):
        _spatial("avg_pool", x, kernel)
        y: torch.Tensor = apply(_AvgPool, x, *args)
        return y
    with below_autograd():
        return avg_pool(x, *args)


def _check_adaptive(x: torch.Tensor, output_size: Sequence[int]) -> None:
    spatial = _spatial("adaptive_avg_pool", x, output_size)
    check(
        min(x.shape[-spatial - 1 :]) > 0 and min(output_size) >= 0,
        f"lance::adaptive_avg_pool: x has shape {tuple(x.shape)} and output_size is {list(output_size)}; expected an "
        "image that is not empty, and no negative size",
    )


def _adaptive_reference(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    _check_adaptive(x, output_size)
    return _plain_adaptive(x, output_size)


def _adaptive_autograd(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    if needs_grad(x):
        _check_adaptive(x, output_size)
        y: torch.Tensor = apply(_AdaptiveAvgPool, x, output_size)
        return y
    with below_autograd():
        return adaptive_avg_pool(x, output_size)


define(
    "max_pool_offsets(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode) "
    "-> (Tensor, Tensor)",
    reference=max_pool_offsets_reference,
    fake=_max_pool_offsets_fake,
    autograd=not_differentiable("max_pool_offsets"),
)
define(
    "max_pool_grad(Tensor grad, Tensor offsets, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "bool ceil_mode) -> Tensor",
    reference=max_pool_grad_reference,
    fake=_max_pool_grad_fake,
    autograd=not_differentiable("max_pool_grad"),
)
define(
    "max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode=False) -> Tensor",
    reference=_max_pool_reference,
    fake=_max_pool_fake,
    autograd=_max_pool_autograd,
)
define(
    "avg_pool(Tensor x, int[] kernel, int[] stride, int[] padding, bool ceil_mode=False, bool count_include_pad=True, "
    "int? divisor_override=None) -> Tensor",
    reference=_avg_pool_reference,
    fake=_avg_pool_reference,
    autograd=_avg_pool_autograd,
)
define(
    "adaptive_avg_pool(Tensor x, int[] output_size) -> Tensor",
    reference=_adaptive_reference,
    fake=_adaptive_reference,
    autograd=_adaptive_autograd,
)
register_triton("max_pool_offsets", file="pooling")
register_triton("max_pool_grad", file="pooling")
