"""`convolution` and `convolution_weight_grad` against autograd on `x_hat` in float64, in every geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import convolution, convolution_weight_grad, pack_core, tucker_project, unpack_core
from lance_kernels.ops.convolution import Geometry as OperatorGeometry
from lance_kernels.ops.convolution_weight_grad import _weight_grad
from tests.ops.cases import (
    DTYPES,
    LAYOUTS,
    approximation,
    assert_near,
    cast,
    dense,
    factored,
    geometries,
    lay_out,
    orthonormal,
)


def true_weight_grad(geometry, x_hat, grad):
    weight = torch.zeros(geometry.weight_size, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(geometry.convolve(x_hat, weight, None), weight, grad.double())
    return gradient


def output_of(geometry, dtype=torch.float64):
    return geometry.convolve(
        torch.zeros(geometry.input_size, dtype=dtype), torch.zeros(geometry.weight_size, dtype=dtype), None
    )


@given(data=st.data(), geometry=geometries(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_weight_grad_is_that_of_the_approximation(data, geometry, dtype, layout):
    factors = cast(data.draw(factored(geometry.input_size)), dtype)
    core = tucker_project(torch.randn(geometry.input_size).to(dtype), factors)
    grad = lay_out(torch.randn(output_of(geometry).shape).to(dtype), layout)
    actual = convolution_weight_grad(grad, core, factors, geometry.weight_size, *geometry.arguments, geometry.mode)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    expected = true_weight_grad(geometry, dense(core, factors, transpose=False), grad)
    assert_near(actual, expected, factor=2, terms=grad.numel() // geometry.outputs)


@given(data=st.data(), geometry=geometries())
def test_shifted_and_expanded_ways_agree(data, geometry):
    factors = [
        factor if factor is not None or mode < 2 else orthonormal(geometry.input_size[mode], 2)
        for mode, factor in enumerate(data.draw(factored(geometry.input_size)))
    ]
    core = tucker_project(torch.randn(geometry.input_size, dtype=torch.float64), factors)
    grad = torch.randn(output_of(geometry).shape, dtype=torch.float64)
    numbers = OperatorGeometry.of(*geometry.arguments, geometry.mode)
    shifted, expanded = (
        _weight_grad(grad, core, factors, geometry.weight_size, numbers, shifts=shifts) for shifts in (True, False)
    )
    expected = true_weight_grad(geometry, dense(core, factors, transpose=False), grad)
    assert_near(shifted, expected, factor=10)
    assert_near(expanded, expected, factor=10)


@given(data=st.data(), geometry=geometries(), layout=st.sampled_from(LAYOUTS), bias=st.booleans())
def test_forward_and_gradients(data, geometry, layout, bias):
    x = lay_out(torch.randn(geometry.input_size, dtype=torch.float64), layout).requires_grad_()
    weight = torch.randn(geometry.weight_size, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(geometry.outputs, dtype=torch.float64, requires_grad=True) if bias else None
    factors = data.draw(factored(geometry.input_size))
    y, core = convolution(x, weight, offset, *geometry.arguments, factors, padding_mode=geometry.mode)
    expected = geometry.convolve(x, weight, offset)
    assert_near(y.detach(), expected.detach(), factor=10)
    assert_near(core, dense(x.detach(), factors), factor=10)
    grad = torch.randn_like(y)
    y.backward(grad)
    (grad_x,) = torch.autograd.grad(expected, x, grad, retain_graph=True)
    assert_near(x.grad, grad_x, factor=10)
    assert_near(weight.grad, true_weight_grad(geometry, approximation(x.detach(), factors), grad), factor=10)
    if offset is not None:
        assert_near(offset.grad, grad.transpose(0, 1).flatten(1).sum(1), factor=10)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("spatial", [(7,), (6, 5), (5, 4, 3)])
def test_full_rank_is_the_plain_gradient(spatial, groups, mode):
    size = (2, 4, *spatial)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 4 // groups, *[2] * len(spatial), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    factors = [orthonormal(extent, extent) for extent in size]
    ones = [1] * len(spatial)
    arguments = ([2] * len(spatial), ones, ones, groups, factors, 0, mode)
    assert torch.autograd.gradcheck(
        lambda *tensors: convolution(*tensors, *arguments)[0], (x, weight, bias), fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_has_the_bits_of_torch(dtype):
    x, weight = torch.randn(2, 6, 9, 9).to(dtype), torch.randn(8, 3, 3, 3).to(dtype)
    y, _ = convolution(x, weight, None, [2, 2], [1, 1], [1, 1], 2, [None] * 4)
    assert torch.equal(y, torch.conv2d(x, weight, None, 2, 1, 1, 2))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packed_core_gives_the_gradient_of_what_it_unpacks_to(bits):
    x, weight = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3, requires_grad=True)
    factors = [None, *(orthonormal(size, 3, torch.float32) for size in (6, 8, 8))]
    arguments = ([1, 1], [1, 1], [1, 1], 1)
    y, packed = convolution(x, weight, None, *arguments, factors, core_bits=bits)
    grad = torch.randn_like(y)
    y.backward(grad)
    core = tucker_project(x, factors)
    assert torch.equal(packed, pack_core(core, bits))
    unpacked = unpack_core(packed, core.shape, bits, torch.float32)
    assert torch.equal(weight.grad, convolution_weight_grad(grad, unpacked, factors, weight.shape, *arguments))


def test_empty_batch_gives_zero_gradients():
    x, weight = torch.randn(0, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    factors = [None, None, orthonormal(8, 2, torch.float32), orthonormal(8, 3, torch.float32)]
    y, core = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, factors)
    assert core.shape == (0, 3, 2, 3)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_keeps_only_what_the_backward_pass_needs(needs_x, needs_weight, mode):
    x = torch.randn(2, 3, 8, 8, requires_grad=needs_x)
    weight = torch.randn(4, 3, 3, 3, requires_grad=needs_weight)
    factors = [None, None, orthonormal(8, 2, torch.float32), orthonormal(8, 3, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, core = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, factors, padding_mode=mode)
    allowed = {core.data_ptr()} if needs_weight else set()
    allowed |= {weight.data_ptr()} if needs_x else set()
    allowed |= {factor.data_ptr() for factor in factors if factor is not None}
    assert {tensor.data_ptr() for tensor in kept} == allowed


def test_second_derivative_is_refused_even_for_a_constant_gradient():
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    y, _ = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, [None] * 4)
    (grad,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="lance::convolution is differentiable once"):
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype):
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y, core = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, [None, None, None, torch.eye(8)])
        plain = torch.conv2d(x, weight, None, 1, 1)
    assert y.dtype == core.dtype == dtype
    assert torch.equal(y, plain)
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("core_bits", [0, 4])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_opcheck(mode, core_bits):
    x, weight = torch.randn(2, 4, 7, 8, requires_grad=True), torch.randn(6, 2, 3, 2, requires_grad=True)
    factors = [None, orthonormal(4, 2, torch.float32), orthonormal(7, 3, torch.float32), None]
    arguments = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    opcheck(torch.ops.lance.convolution.default, (x, weight, None, *arguments, factors, core_bits, mode))
    grad = torch.randn_like(convolution(x, weight, None, *arguments, factors, 0, mode)[0])
    core = tucker_project(x.detach(), factors)
    for operator in (torch.ops.lance.convolution_weight_grad, torch.ops.lance.convolution_weight_bias_grad):
        opcheck(operator.default, (grad, core, factors, [6, 2, 3, 2], *arguments, mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bias_gradient_beside_the_weight_gradient(dtype):
    grad, factors = torch.randn(3, 6, 8, 8).to(dtype), [None, orthonormal(4, 2, torch.float32), None, None]
    core, arguments = torch.randn(3, 2, 8, 8).to(dtype), ([6, 4, 3, 3], [1, 1], [1, 1], [1, 1], 1)
    weight_grad, bias_grad = torch.ops.lance.convolution_weight_bias_grad(grad, core, factors, *arguments)
    assert torch.equal(weight_grad, convolution_weight_grad(grad, core, factors, *arguments))
    assert_near(bias_grad, grad.double().sum((0, 2, 3)))


def test_bias_gradient_without_a_weight_gradient():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3)
    bias, factors = torch.randn(6, requires_grad=True), [None, orthonormal(4, 2, torch.float32), None, None]
    y, _ = convolution(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, factors)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert_near(bias.grad, grad.double().sum((0, 2, 3)))


def test_flops_in_and_below_autograd():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3, requires_grad=True)
    factors = [None, orthonormal(4, 2, torch.float32), None, None]
    expected = 2 * 2 * 6 * 4 * 9 * 64 + 2 * 2 * 4 * 64 * 2
    for context in (torch.enable_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counter:
            convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, factors)
        assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        convolution_weight_grad(
            torch.randn(2, 6, 8, 8), torch.randn(2, 2, 8, 8), factors, weight.shape, [1, 1], [1, 1], [1, 1], 1
        )
    assert counter.get_total_flops() == 2 * 2 * 6 * 64 * 9 * 2 + 2 * 2 * 6 * 4 * 9


VALID = {
    "x": (2, 4, 7, 7),
    "weight": (6, 2, 3, 3),
    "bias": None,
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "groups": 2,
    "mode": "zeros",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": (6, 3, 3, 3)}, r"weight has size \(6, 3, 3, 3\).*groups is 2; expected C = "),
        ({"weight": (5, 2, 3, 3)}, r"weight has size \(5, 2, 3, 3\).*O a multiple of groups"),
        ({"weight": (6, 2, 3)}, r"weight has size \(6, 2, 3\) and the input \(2, 4, 7, 7\)"),
        ({"weight": (6, 2, 10, 3)}, r"larger than the padded input"),
        ({"bias": (5,)}, r"bias has shape \(5,\); expected \(6,\)"),
        ({"stride": [0, 1]}, r"stride is \[0, 1\]; expected 2 numbers from 1 to 2147483647"),
        ({"dilation": [1]}, r"dilation is \[1\]; expected 2 numbers"),
        ({"padding": [1, 1, 1]}, r"padding is \[1, 1, 1\]; expected 2 or 4 numbers"),
        ({"padding": [-1, 1]}, r"padding is \[-1, 1\]"),
        ({"groups": 0}, "groups is 0"),
        ({"mode": "mirror"}, "padding_mode is 'mirror'; expected one of zeros, reflect, replicate, circular"),
        ({"mode": "reflect", "padding": [7, 1]}, r"padding \[7, 1\] is too large for reflect padding"),
        ({"x": (2, 4), "weight": (6, 2)}, "one to three spatial modes"),
    ],
)
def test_refusals(changed, message):
    case = {**VALID, **changed}
    tensors = [None if case[name] is None else torch.randn(case[name]) for name in ("x", "weight", "bias")]
    numbers = [case[name] for name in ("stride", "padding", "dilation", "groups")]
    with pytest.raises(RuntimeError, match=message):
        convolution(*tensors, *numbers, [None] * tensors[0].dim(), 0, case["mode"])


def test_weight_grad_refusals():
    core, numbers = torch.randn(2, 4, 7, 7), ([1, 1], [1, 1], [1, 1], 1)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \(2, 6, 7, 6\); expected \(2, 6, 7, 7\)"):
        convolution_weight_grad(torch.randn(2, 6, 7, 6), core, [None] * 4, (6, 4, 3, 3), *numbers)
    with pytest.raises(RuntimeError, match=r"core is torch.float64 on cpu; expected torch.float32 on cpu"):
        convolution_weight_grad(torch.randn(2, 6, 7, 7), core.double(), [None] * 4, (6, 4, 3, 3), *numbers)


@pytest.mark.parametrize("bits", [0, 8])
def test_a_float16_core_of_small_inputs_keeps_them(bits):
    x, weight = (torch.randn(2, 64, 32, 32) * 1e-4).half(), torch.randn(8, 64, 3, 3).half().requires_grad_()
    factors = [None, *(orthonormal(size, size).float() for size in (64, 32, 32))]
    y, _ = convolution(x, weight, None, [1, 1], [1, 1], [1, 1], 1, factors, bits)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, weight, grad)
    expected = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert (found.double() - expected).norm() <= 0.02 * expected.norm()
