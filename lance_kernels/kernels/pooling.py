"""Max pooling whose windows' largest elements are kept as one byte each, in Triton.

Offset `p` of an output element is the place of its window's largest element within the window, counted over the
kernel's axes, the last fastest. In backward every input element gathers from the windows that can hold it,
`(kernel - 1) dilation / stride + 1` an axis, in the outputs' order, so that nothing is added atomically.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv
from lance_kernels.ops.pooling import (
    check_max_pool,
    check_max_pool_grad,
    image_format,
    max_pool_grad_reference,
    max_pool_offsets_reference,
    max_pooled_shape,
)

BLOCK = 1024
NARROW = 2**31 - BLOCK  # elements whose indices fit 32 bits


@triton.jit
def split(index, channels, depth, height, width, CHANNELS_LAST: tl.constexpr):
    """Image, channel and position of flat indices into a contiguous or channels_last batch."""
    if CHANNELS_LAST:
        channel = index % channels
        rest = index // channels
    else:
        channel = index * 0
        rest = index
    w = rest % width
    rest = rest // width
    h = rest % height
    rest = rest // height
    d = rest % depth
    image = rest // depth
    if not CHANNELS_LAST:
        channel = image % channels
        image = image // channels
    return image, channel, d, h, w


@triton.jit
def place(image, channel, d, h, w, channels, depth, height, width, CHANNELS_LAST: tl.constexpr):
    """The flat index of an element."""
    if CHANNELS_LAST:
        result = (((image * depth + d) * height + h) * width + w) * channels + channel
    else:
        result = (((image * channels + channel) * depth + d) * height + h) * width + w
    return result


@triton.constexpr_function
def unrolled(length, inner):
    """By how much a loop is unrolled whose body is another of `inner` turns."""
    return length if length * inner <= 9 else 1


@triton.jit
def offsets_kernel(
    x,
    y,
    offsets,
    total,  # elements of y
    channels,
    in_depth,
    in_height,
    in_width,
    out_depth,
    out_height,
    out_width,
    CHANNELS_LAST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = index < total
    image, channel, od, oh, ow = split(index, channels, out_depth, out_height, out_width, CHANNELS_LAST)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK], -1, dtype=tl.int32)
    for i in tl.range(0, KERNEL[0], loop_unroll_factor=unrolled(KERNEL[0], KERNEL[1] * KERNEL[2])):
        d = od * STRIDE[0] - PADDING[0] + i * DILATION[0]
        inside_d = inside & (d >= 0) & (d < in_depth)
        for j in tl.range(0, KERNEL[1], loop_unroll_factor=unrolled(KERNEL[1], KERNEL[2])):
            h = oh * STRIDE[1] - PADDING[1] + j * DILATION[1]
            inside_h = inside_d & (h >= 0) & (h < in_height)
            for k in tl.range(0, KERNEL[2], loop_unroll_factor=unrolled(KERNEL[2], 1)):
                w = ow * STRIDE[2] - PADDING[2] + k * DILATION[2]
                valid = inside_h & (w >= 0) & (w < in_width)
                source = place(image, channel, d, h, w, channels, in_depth, in_height, in_width, CHANNELS_LAST)
                value = tl.load(x + source, mask=valid, other=0.0).to(tl.float32)
                # The first of equals wins, the last of NaNs; a window of -inf is its first element.
                better = valid & ((value > best) | (value != value) | (at < 0))
                best = tl.where(better, value, best)
                at = tl.where(better, (i * KERNEL[1] + j) * KERNEL[2] + k, at)
    tl.store(y + index, best.to(y.dtype.element_ty), mask=inside)
    # A window that lies in the padding has no element, and the offset of its first.
    tl.store(offsets + index, tl.maximum(at, 0).to(tl.uint8), mask=inside)


@triton.jit
def window_over(
    place, back, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr
):
    """The window `back` ones before the last that starts at or before `place` of an axis of `size` windows.

    Returns its number, which of its taps lies on `place`, and whether there is such a window and tap.
    """
    window = (place + PADDING) // STRIDE - back
    gap = place + PADDING - window * STRIDE
    tap = gap // DILATION
    return window, tap, (window >= 0) & (window < size) & (tap < KERNEL) & (gap % DILATION == 0)


@triton.jit
def grad_kernel(
    grad,
    offsets,
    out,
    total,  # elements of out
    channels,
    in_depth,
    in_height,
    in_width,
    out_depth,
    out_height,
    out_width,
    CHANNELS_LAST: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Windows that can hold an element, of an axis.
    DEPTH: tl.constexpr = (KERNEL[0] - 1) * DILATION[0] // STRIDE[0] + 1
    HEIGHT: tl.constexpr = (KERNEL[1] - 1) * DILATION[1] // STRIDE[1] + 1
    WIDTH: tl.constexpr = (KERNEL[2] - 1) * DILATION[2] // STRIDE[2] + 1
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = index < total
    image, channel, d, h, w = split(index, channels, in_depth, in_height, in_width, CHANNELS_LAST)
    total_grad = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, DEPTH, loop_unroll_factor=unrolled(DEPTH, HEIGHT * WIDTH)):
        od, pd, over_d = window_over(d, DEPTH - 1 - i, out_depth, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0])
        for j in tl.range(0, HEIGHT, loop_unroll_factor=unrolled(HEIGHT, WIDTH)):
            oh, ph, over_h = window_over(h, HEIGHT - 1 - j, out_height, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1])
            for k in tl.range(0, WIDTH, loop_unroll_factor=unrolled(WIDTH, 1)):
                ow, pw, over_w = window_over(w, WIDTH - 1 - k, out_width, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2])
                over = inside & over_d & over_h & over_w
                source = place(image, channel, od, oh, ow, channels, out_depth, out_height, out_width, CHANNELS_LAST)
                chosen = (pd * KERNEL[1] + ph) * KERNEL[2] + pw
                chosen = over & (tl.load(offsets + source, mask=over, other=0).to(tl.int32) == chosen)
                total_grad += tl.load(grad + source, mask=chosen, other=0.0).to(tl.float32)
    tl.store(out + index, total_grad.to(out.dtype.element_ty), mask=inside)


def _three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
    """Values of two or three spatial dimensions as those of three."""
    return (fill, *values) if len(values) == 2 else tuple(values)  # type: ignore[return-value]


def _window(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, tuple[int, int, int]]:
    return {
        "KERNEL": _three(kernel, 1),
        "STRIDE": _three(stride, 1),
        "PADDING": _three(padding, 0),
        "DILATION": _three(dilation, 1),
    }


def _channels(shape: Sequence[int], spatial: int, last: bool) -> int:
    """Channels where they are the fastest dimension; else images and channels are one dimension."""
    return shape[-spatial - 1] if last else math.prod(shape[:-spatial])


def max_pool_offsets(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lance::max_pool_offsets`; float64 takes the reference."""
    if x.dtype == torch.float64:
        return max_pool_offsets_reference(x, kernel, stride, padding, dilation, ceil_mode)
    spatial = check_max_pool(x, kernel, stride, padding, dilation)
    memory_format = image_format(x, spatial)
    last = memory_format != torch.contiguous_format
    shape = max_pooled_shape(x, kernel, stride, padding, dilation, ceil_mode)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    offsets = torch.empty_like(y, dtype=torch.uint8)
    if y.numel():
        offsets_kernel[(cdiv(y.numel(), BLOCK),)](
            x.contiguous(memory_format=memory_format),
            y,
            offsets,
            y.numel(),
            _channels(shape, spatial, last),
            *_three(x.shape[-spatial:], 1),
            *_three(shape[-spatial:], 1),
            CHANNELS_LAST=last,
            **_window(kernel, stride, padding, dilation),
            WIDE=max(x.numel(), y.numel()) > NARROW,
            BLOCK=BLOCK,
        )
    return y, offsets


def max_pool_grad(
    grad: torch.Tensor,
    offsets: torch.Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """`lance::max_pool_grad`; float64 takes the reference."""
    if grad.dtype == torch.float64:
        return max_pool_grad_reference(grad, offsets, size, kernel, stride, padding, dilation, ceil_mode)
    spatial = check_max_pool_grad(grad, offsets, size, kernel, stride, padding, dilation, ceil_mode)
    memory_format = image_format(offsets, spatial)
    last = memory_format != torch.contiguous_format
    shape = [*grad.shape[:-spatial], *size]
    out = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if out.numel():
        grad_kernel[(cdiv(out.numel(), BLOCK),)](
            grad.contiguous(memory_format=memory_format),
            offsets.contiguous(memory_format=memory_format),
            out,
            out.numel(),
            _channels(shape, spatial, last),
            *_three(size, 1),
            *_three(grad.shape[-spatial:], 1),
            CHANNELS_LAST=last,
            **_window(kernel, stride, padding, dilation),
            WIDE=max(out.numel(), grad.numel()) > NARROW,
            BLOCK=BLOCK,
        )
    return out
