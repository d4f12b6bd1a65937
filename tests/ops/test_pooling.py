"""Pooling: PyTorch's values and gradients bit for bit, from one byte an output element or from sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import adaptive_avg_pool, avg_pool, max_pool
from lance_kernels.ops.pooling import max_pool_grad_reference, max_pool_offsets_reference
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import assert_compiles, assert_same_bits, forward_backward, held_bytes, lay_out


@st.composite
def windows(draw):
    spatial = draw(st.sampled_from((2, 2, 2, 3)))
    kernel = [draw(st.integers(1, 4)) for _ in range(spatial)]
    stride = [draw(st.integers(1, 3)) for _ in range(spatial)]
    padding = [draw(st.integers(0, size // 2)) for size in kernel]
    dilation = [draw(st.integers(1, 2)) for _ in range(spatial)]
    size = [draw(st.integers(4, 9)) for _ in range(spatial)]
    leading = draw(st.sampled_from(((2, 3), (3,), (1, 17), (0, 2))))
    spans = [gap * (window - 1) + 1 for gap, window in zip(dilation, kernel)]
    assume(all(length + 2 * pad >= span for length, pad, span in zip(size, padding, spans)))
    return (*leading, *size), kernel, stride, padding, dilation, draw(st.booleans())


@given(window=windows(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), special=st.booleans())
def test_max_pool_equals_pytorch(window, dtype, layout, special):
    shape, kernel, stride, padding, dilation, ceil_mode = window
    x = torch.randint(-2, 3, shape).to(dtype)
    if special:
        x = torch.where(torch.rand(shape) < 0.1, torch.nan, x)
        x = torch.where(torch.rand(shape) < 0.1, -torch.inf, x)
    x = lay_out(x, layout)
    plain = F.max_pool2d if len(kernel) == 2 else F.max_pool3d
    expected = plain(x, kernel, stride, padding, dilation, ceil_mode)
    grad = torch.randn_like(expected)
    y, (grad_x,) = forward_backward(lambda x: max_pool(x, kernel, stride, padding, dilation, ceil_mode), [x], grad)
    _, (expected_grad,) = forward_backward(lambda x: plain(x, kernel, stride, padding, dilation, ceil_mode), [x], grad)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


@given(window=windows(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), count=st.booleans())
def test_avg_pool_equals_pytorch(window, dtype, layout, count):
    shape, kernel, stride, padding, _, ceil_mode = window
    assume(0 not in shape)
    x = lay_out(torch.randn(shape).to(dtype), layout)
    plain = F.avg_pool2d if len(kernel) == 2 else F.avg_pool3d
    args = (kernel, stride, padding, ceil_mode, count)
    grad = torch.randn_like(plain(x, *args))
    y, (grad_x,) = forward_backward(lambda x: avg_pool(x, *args), [x], grad)
    expected, (expected_grad,) = forward_backward(lambda x: plain(x, *args), [x], grad)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


@given(
    shape=st.sampled_from(((2, 3, 7, 5), (3, 4, 6), (1, 2, 4, 5, 6))),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(1, 3),
)
def test_adaptive_avg_pool_equals_pytorch(shape, dtype, layout, size):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    spatial = 3 if len(shape) == 5 else 2
    plain = torch.ops.aten._adaptive_avg_pool2d if spatial == 2 else torch.ops.aten._adaptive_avg_pool3d
    grad = torch.randn_like(plain(x, [size] * spatial))
    y, (grad_x,) = forward_backward(lambda x: adaptive_avg_pool(x, [size] * spatial), [x], grad)
    expected, (expected_grad,) = forward_backward(lambda x: plain(x, [size] * spatial), [x], grad)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


def test_what_is_held():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert held_bytes(lambda: max_pool(x, [2, 2], [2, 2], [0, 0], [1, 1])) == 2 * 3 * 4 * 4
    assert held_bytes(lambda: avg_pool(x, [2, 2], [2, 2], [0, 0])) == 0
    assert held_bytes(lambda: adaptive_avg_pool(x, [2, 2])) == 0


def test_refusals():
    x = torch.randn(2, 3, 40, 40)
    for window in ([17, 17], [2**30, 2**2]):
        with pytest.raises(RuntimeError, match="too many elements"):
            max_pool(x, window, [1, 1], [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="at most half the window"):
        max_pool(x, [2, 2], [1, 1], [2, 0], [1, 1])
    with pytest.raises(RuntimeError, match="two or three spatial"):
        avg_pool(x[0, 0], [2, 2], [1, 1], [0, 0])


@pytest.mark.parametrize("grad_of", [torch.ops.lance.max_pool_grad, max_pool_grad_reference])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_windows_outside_the_input_have_no_gradient(layout, grad_of):
    window = ([1, 2], [1, 1], [0, 1], [1, 2], False)
    y, offsets = torch.ops.lance.max_pool_offsets(lay_out(torch.randn(2, 3, 2, 1), layout), *window)
    assert (y == -torch.inf).all()
    assert (grad_of(torch.ones_like(y), offsets, [2, 1], *window) == 0).all()


@pytest.mark.parametrize(
    "window",
    [
        ([2, 2], [1], [0, 0], [1, 1]),
        ([2**60, 16], [1, 1], [2**59, 8], [1, 1]),  # as many elements as 64 bits make 0
        ([3, 1], [1, 1], [0, 0], [2**63 - 1, 1]),
    ],
)
@pytest.mark.parametrize("function", [torch.ops.lance.max_pool_offsets, max_pool_offsets_reference])
def test_numbers_that_overflow_are_refused(window, function):
    with pytest.raises(RuntimeError, match="expected one number from 1 to 2147483647"):
        function(torch.randn(1, 1, 4, 4), *window, False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = lay_out(torch.randn(2, 3, 7, 6), layout).requires_grad_()
    window = ([3, 2], [2, 1], [1, 0], [1, 2], True)
    lance = torch.ops.lance
    opcheck(lance.max_pool, (x, *window))
    opcheck(lance.avg_pool, (x, *window[:3]))
    opcheck(lance.adaptive_avg_pool, (x, [2, 3]))
    _, offsets = lance.max_pool_offsets(x.detach(), *window)
    opcheck(lance.max_pool_offsets, (x.detach(), *window))
    opcheck(lance.max_pool_grad, (torch.randn(offsets.shape), offsets, [7, 6], *window))


def test_compiles():
    def function(x):
        y = avg_pool(max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1]), [2, 2], [1, 1], [0, 0])
        return adaptive_avg_pool(y, [2, 2])

    assert_compiles(function, [torch.randn(2, 3, 9, 9)])
