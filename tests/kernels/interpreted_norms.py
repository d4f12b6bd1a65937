"""Runs the kernels of batch norm, rows in 8 bits and max pooling under Triton's interpreter; a test starts it."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
import triton
import triton.language as tl

from lance_kernels.kernels import batch_norm, pooling, quantize_rows
from lance_kernels.ops._layout import memory_order
from lance_kernels.ops.batch_norm import frozen_grad_reference, mask_reference, relu_grad_reference
from lance_kernels.ops.mask import condition, pack_bits
from lance_kernels.ops.pooling import max_pool_grad_reference, max_pool_offsets_reference
from lance_kernels.ops.quantize_rows import dequantize_reference, quantize_reference
from tests.kernels.strict import strict
from tests.ops.companion_cases import assert_same_bits, with_special

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMAGES = [(1, 1, 1), (2, 3, 5), (2, 5, 3, 7), (0, 4, 2, 2), (2, 8, 11, 17), (3, 24, 7, 8), (9, 16)]
ELEMENTS = [(0, 5, 7), (2048, 24, 56), (3 * 2**33, 8, 1), (5 * 2**31, 3, 3 * 2**30 + 5), (2**31, 2, 2**31 + 8)]
WINDOWS = [  # kernel, stride, padding, dilation, ceil mode
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3), (1, 2), (0, 1), (2, 1), True),
    ((2, 2), (3, 3), (1, 0), (1, 1), False),
    ((2, 2, 3), (2, 1, 2), (1, 1, 0), (1, 2, 1), True),
    ((5, 4), (1, 1), (2, 2), (1, 1), False),  # more windows over an element than are unrolled
    ((3, 3, 2), (1, 1, 1), (1, 1, 1), (1, 2, 2), False),
    ((2, 3), (1, 3), (1, 0), (4, 2), True),
]
ROWS = [((6, 10), 1, 6), ((2, 3, 4, 5), 2, 3), ((1, 1), 1, 1), ((0, 4), 1, 4), ((40, 33, 7), 40, 33), ((3, 2100), 1, 3)]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` with its channels fastest in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def close(found: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Asserts equality to a few units of rounding of values of `scale`, NaN for NaN."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=4 * eps * scale, equal_nan=True)


def check_batch_norm(shape: tuple[int, ...], dtype: torch.dtype, last: bool, affine: bool, high: float | None) -> None:
    x, grad = with_special(shape, dtype), with_special(shape, dtype)
    if last:
        x, grad = channels_last(x), channels_last(grad)
    order, channels = memory_order(x), shape[1]
    weight, bias, mean = torch.randn(1).expand(channels), torch.randn(channels, 2)[:, 1], torch.randn(channels)
    var = torch.rand(channels) + 0.1
    args = (weight if affine else None, bias if affine else None, mean, var, 1e-5, high)
    y, bits = batch_norm.batch_norm_relu_mask(x, *args, order)
    expected, _ = mask_reference(x, *args, order)
    close(y, expected, 100.0)
    assert y.stride() == expected.stride()
    # Where the result is inside the bounds the bit is set, and where it is on one it may be rounded there.
    flat = y.permute(*order).contiguous()
    own = condition(flat, None if high is None else 0.0, high, None)
    assert torch.equal(bits, pack_bits(own))
    scale = args[0], var, 1e-5, order
    close(batch_norm.batch_norm_relu_grad(grad, bits, *scale), relu_grad_reference(grad, bits, *scale))
    close(batch_norm.batch_norm_frozen_grad(grad, *scale), frozen_grad_reference(grad, *scale))


@triton.jit
def look_up_kernel(table, out, start, channels, inner, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    first, second = batch_norm.look_up(table, start, channels, inner, ALIGNED, BLOCK)
    index = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + index, (first + second).to(tl.int32) + tl.zeros_like(index))


def check_channels(start: int, channels: int, inner: int) -> None:
    """The channels of elements far beyond 32 bits."""
    table, out = torch.arange(channels).float().repeat(2, 1), torch.empty(512, dtype=torch.int32)
    expected = (start + torch.arange(512)) // inner % channels
    aligned = "inner" if inner % 8 == 0 else "channels" if inner == 1 else "neither"
    for kind in {aligned, "neither"}:
        look_up_kernel[(1,)](table, out, start, channels, inner, ALIGNED=kind, BLOCK=512)
        assert torch.equal(out, 2 * expected.int())


def check_rows(shape: tuple[int, ...], outer: int, rows: int, dtype: torch.dtype, centered: bool) -> None:
    x = torch.randn(shape).to(dtype)
    if x.numel() > 8:
        with_rows = x.view(outer, rows, -1)
        with_rows[:, 0] = 0  # a row without a step: that of its largest has no inverse
        with_rows[0, 0, 0] = 1e-37
        with_rows[0, -1, 0] = float("nan") if centered else float("inf")
    center = torch.randn(rows) if centered else None
    order = memory_order(x)
    codes, steps = quantize_rows.quantize_rows(x, center, outer, rows, order)
    expected, expected_steps = quantize_reference(x, center, outer, rows, order)
    assert torch.equal(codes, expected)
    assert torch.equal(steps.isnan(), expected_steps.isnan())
    assert torch.equal(steps.nan_to_num(), expected_steps.nan_to_num())
    values = quantize_rows.dequantize_rows(codes, steps, outer, x, order)
    assert_same_bits(values, dequantize_reference(codes, steps, outer, x, order))


def check_max_pool(window: tuple[object, ...], dtype: torch.dtype, last: bool, batched: bool) -> None:
    spatial = len(window[0])  # type: ignore[arg-type]
    shape = (2, 5, *(9, 8, 7)[:spatial])
    x = with_special(shape, dtype)
    if not batched:
        # A volume whose strides are those of a channels_last batch of images.
        x = x[0].to(memory_format=torch.channels_last) if last and spatial == 3 else x[0]
    elif last:
        x = channels_last(x)
    y, offsets = pooling.max_pool_offsets(x, *window)
    expected, expected_offsets = max_pool_offsets_reference(x, *window)
    assert_same_bits(y, expected)
    assert torch.equal(offsets, expected_offsets)
    assert y.stride() == offsets.stride()
    # Whole numbers, whose sums do not round: an infinity minus an infinity aside, any order gives the same.
    grad = torch.randint(-8, 8, y.shape).to(dtype)
    size = x.shape[-spatial:]
    if last and not batched and spatial == 3:
        offsets = offsets.to(memory_format=torch.channels_last)
    found = pooling.max_pool_grad(grad, offsets, size, *window)
    assert_same_bits(found.abs(), max_pool_grad_reference(grad, offsets, size, *window).abs())
    assert torch.equal(found, max_pool_grad_reference(grad, offsets, size, *window))


def check_windows_outside() -> None:
    """What windows hold outside of the input adds nothing to the gradient; dilation allows windows wholly outside."""
    window = ((2, 2), (1, 1), (1, 1), (4, 4), False)
    y, offsets = pooling.max_pool_offsets(torch.randn(2, 3, 3, 4), *window)
    assert torch.equal(y, torch.full((2, 3, 1, 2), float("-inf")))
    assert not offsets.any()
    assert torch.equal(pooling.max_pool_grad(torch.ones_like(y), offsets, (3, 4), *window), torch.zeros(2, 3, 3, 4))
    window = ((2, 2), (1, 1), (1, 1), (5, 5), False)
    offsets = torch.arange(4, dtype=torch.uint8).repeat(9).view(1, 1, 6, 6)
    found = pooling.max_pool_grad(torch.ones(1, 1, 6, 6), offsets, (9, 9), *window)
    expected = torch.zeros(9 + 2, 9 + 2)
    for i, j in itertools.product(range(6), repeat=2):
        tap = int(offsets[0, 0, i, j])
        expected[i + 5 * (tap // 2), j + 5 * (tap % 2)] += 1
    assert torch.equal(found[0, 0], expected[1:-1, 1:-1])


def main() -> None:
    torch.manual_seed(0)
    cases = 0
    for shape, dtype, last, affine, high in itertools.product(
        IMAGES, DTYPES, (False, True), (False, True), (None, 6.0)
    ):
        for narrow in (2**31, 0):
            with mock.patch.object(batch_norm, "NARROW", narrow):
                check_batch_norm(shape, dtype, last, affine, high)
        cases += 1
    for numbers in ELEMENTS:
        check_channels(*numbers)
        cases += 1
    for (shape, outer, rows), dtype, centered in itertools.product(ROWS, DTYPES, (False, True)):
        check_rows(shape, outer, rows, dtype, centered)
        cases += 1
    for window, dtype, (last, batched) in itertools.product(
        WINDOWS, DTYPES, ((False, True), (True, True), (False, False), (True, False))
    ):
        for narrow in (2**31, 0):
            with mock.patch.object(pooling, "NARROW", narrow):
                check_max_pool(window, dtype, last, batched)
        cases += 1
    check_windows_outside()
    cases += 1
    print(f"{cases} cases")


if __name__ == "__main__":
    with strict():
        main()
