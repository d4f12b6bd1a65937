"""`linear_given_core`, `convolution_given_core`: as the operators that make the core, for a core made before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import convolution, convolution_given_core, linear, linear_given_core
from tests.ops.cases import DTYPES, cast, factored, geometries, orthonormal

BITS = (0, 8, 4, 2, 1)


def leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def assert_like(mine, makers, inputs):
    """Equal values, and equal gradients of every input, bit for bit."""
    assert torch.equal(mine, makers)
    grad = torch.randn(mine.shape).to(mine.dtype)
    pairs = zip(torch.autograd.grad(mine, inputs, grad), torch.autograd.grad(makers, inputs, grad), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from(BITS),
)
def test_linear(data, shape, dtype, bits):
    inputs = leaves(shape, (3, shape[-1]), (3,), dtype=dtype)
    factors = cast(data.draw(factored(tuple(shape))), dtype)
    y, core = linear(*inputs, factors, bits)
    assert_like(linear_given_core(*inputs, core, factors, bits), y, inputs)


@given(data=st.data(), geometry=geometries(), dtype=st.sampled_from(DTYPES), bits=st.sampled_from(BITS))
def test_convolution(data, geometry, dtype, bits):
    inputs = leaves(geometry.input_size, geometry.weight_size, (geometry.outputs,), dtype=dtype)
    factors = cast(data.draw(factored(geometry.input_size)), dtype)
    y, core = convolution(*inputs, *geometry.arguments, factors, bits, geometry.mode)
    mine = convolution_given_core(*inputs, *geometry.arguments, core, factors, bits, geometry.mode)
    assert_like(mine, y, inputs)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_linear(dtype, bits):
    x, weight, bias = leaves((3, 4, 6), (5, 6), (5,), dtype=dtype)
    factors = [None, orthonormal(4, 2, dtype), orthonormal(6, 3, dtype)]
    core = linear(x, weight, bias, factors, bits)[1]
    opcheck(torch.ops.lance.linear_given_core.default, (x, weight, bias, core, factors, bits))


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_opcheck_convolution(mode, bits):
    x, weight, bias = leaves((2, 4, 7, 8), (6, 2, 3, 2), (6,))
    factors = [None, orthonormal(4, 2, torch.float32), orthonormal(7, 3, torch.float32), None]
    numbers = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    core = convolution(x, weight, bias, *numbers, factors, bits, mode)[1]
    operator = torch.ops.lance.convolution_given_core.default
    opcheck(operator, (x, weight, bias, *numbers, core, factors, bits, mode))


def following(function, factors):
    """`function` of `x` and its core: at full rank the core follows every change of `x`."""
    return lambda x, *rest: function(x, *rest, torch.ops.lance.tucker_project(x.detach(), factors))


def test_gradcheck_linear():
    x, weight, bias = leaves((3, 4, 6), (5, 6), (5,), dtype=torch.float64)
    factors = [orthonormal(size, size) for size in x.shape]
    function = following(lambda x, w, b, core: linear_given_core(x, w, b, core, factors), factors)
    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spatial", [(7,), (6, 5), (5, 4, 3)])
def test_gradcheck_convolution(spatial, groups, mode):
    size, kernel = (2, 4, *spatial), [2] * len(spatial)
    x, weight, bias = leaves(size, (6, 4 // groups, *kernel), (6,), dtype=torch.float64)
    factors = [orthonormal(extent, extent) for extent in size]
    ones = [1] * len(spatial)
    numbers = ([2] * len(spatial), ones, ones, groups)
    function = following(
        lambda x, w, b, core: convolution_given_core(x, w, b, *numbers, core, factors, 0, mode), factors
    )
    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)


def test_keeps_the_core_it_was_given_and_not_the_input():
    x, weight = leaves((2, 4, 8, 8), (6, 4, 3, 3))
    factors = [None, None, orthonormal(8, 2, torch.float32), orthonormal(8, 3, torch.float32)]
    core = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, factors, 4)[1]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        convolution_given_core(x, weight, None, [1, 1], [1, 1], [1, 1], 1, core, factors, 4)
    assert core.data_ptr() in kept
    assert x.data_ptr() not in kept


def test_second_derivatives_are_refused():
    x, weight = leaves((4, 6), (3, 6))
    core = linear(x, weight, None, [None, None])[1]
    y = linear_given_core(x, weight, None, core, [None, None])
    (grad,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="is differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs = leaves((4, 6), (3, 6), (3,))
    factors = [None, orthonormal(6, 2, torch.float32)]
    with torch.autocast("cpu", dtype):
        y, core = linear(*inputs, factors)
        mine = linear_given_core(*inputs, core, factors)
    assert mine.dtype == dtype
    assert_like(mine, y, inputs)


def test_flops_are_those_of_the_product():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
    factors = [None, orthonormal(4, 2, torch.float32), None, None]
    core = torch.ops.lance.tucker_project(x, factors)
    with FlopCounterMode(display=False) as counter:
        convolution_given_core(x, weight, None, [1, 1], [1, 1], [1, 1], 1, core, factors)
    assert counter.get_total_flops() == 2 * 2 * 6 * 4 * 9 * 64
    with FlopCounterMode(display=False) as counter:
        linear_given_core(torch.randn(5, 6), torch.randn(3, 6), None, torch.randn(5, 6), [None, None])
    assert counter.get_total_flops() == 2 * 5 * 6 * 3


@pytest.mark.parametrize(
    ("core", "bits", "message"),
    [
        (
            torch.randn(4, 3),
            0,
            r"core is torch.float32 of shape \(4, 3\) on cpu; expected torch.float32 of shape \(4, 2",
        ),
        (torch.randn(4, 2).double(), 0, "core is torch.float64"),
        (torch.randn(4, 2), 4, "expected torch.uint8 of shape"),
        (torch.randn(4, 2, device="meta"), 0, "on meta; expected torch.float32 of shape"),
    ],
)
def test_refusals(core, bits, message):
    factors = [None, orthonormal(6, 2, torch.float32)]
    with pytest.raises(RuntimeError, match=message):
        linear_given_core(torch.randn(4, 6), torch.randn(3, 6), None, core, factors, bits)
    with pytest.raises(RuntimeError, match="factors require a gradient"):
        linear_given_core(
            torch.randn(4, 6), torch.randn(3, 6), None, torch.randn(4, 2), [None, torch.randn(6, 2, requires_grad=True)]
        )
