"""`relu`, `hardtanh` and `leaky_relu`: bit for bit PyTorch's, at one bit an element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import hardtanh, hardtanh_, leaky_relu, leaky_relu_, relu, relu_
from lance_kernels.ops.mask import pack_bits, unpack_bits
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import (
    assert_compiles,
    assert_same_bits,
    forward_backward,
    held_bytes,
    lay_out,
    with_special,
)

shapes = st.lists(st.integers(0, 9), min_size=0, max_size=5).map(tuple)

PAIRS = {
    "relu": (relu, F.relu),
    "relu6": (lambda x: hardtanh(x, 0.0, 6.0), F.relu6),
    "hardtanh": (hardtanh, F.hardtanh),
    "leaky_relu": (leaky_relu, F.leaky_relu),
    "negative slope": (lambda x: leaky_relu(x, -0.5), lambda x: F.leaky_relu(x, -0.5)),
}
IN_PLACE = {
    "relu": (relu_, F.relu_),
    "relu6": (lambda x: hardtanh_(x, 0.0, 6.0), lambda x: F.hardtanh_(x, 0.0, 6.0)),
    "leaky_relu": (leaky_relu_, F.leaky_relu_),
}


def without_nan(name: str, x: torch.Tensor) -> torch.Tensor:
    # ATen's own gradient of hardtanh at NaN depends on the vector lane.
    return x.nan_to_num(2.0, posinf=torch.inf, neginf=-torch.inf) if name in ("relu6", "hardtanh") else x


@given(name=st.sampled_from(list(PAIRS)), shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_values_and_gradients_have_the_same_bits(name, shape, dtype, layout):
    ours, plain = PAIRS[name]
    x = lay_out(without_nan(name, with_special(shape, dtype)), layout)
    grad = with_special(shape, dtype)
    y, (grad_x,) = forward_backward(ours, [x], grad)
    expected, (expected_grad,) = forward_backward(plain, [x], grad)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


@given(name=st.sampled_from(list(IN_PLACE)), shape=shapes, dtype=st.sampled_from(DTYPES))
def test_in_place_has_the_same_bits(name, shape, dtype):
    ours, plain = IN_PLACE[name]
    x, grad = without_nan(name, with_special(shape, dtype)), with_special(shape, dtype)
    y, (grad_x,) = forward_backward(lambda x: ours(x * 1), [x], grad)
    expected, (expected_grad,) = forward_backward(lambda x: plain(x * 1), [x], grad)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


def test_in_place_returns_its_argument_and_refuses_leaves():
    x = torch.randn(5, requires_grad=True)
    doubled = x * 2
    assert relu_(doubled) is doubled
    with pytest.raises(RuntimeError, match="leaf"):
        relu_(x)
    with pytest.raises(RuntimeError, match="slope is -1"):
        leaky_relu_(x * 2, -1.0)


def test_in_place_on_a_view_reaches_the_base():
    x = torch.randn(4, 6, requires_grad=True)
    base = x * 1
    relu_(base[:, :3])
    (grad,) = torch.autograd.grad(base.sum(), x)
    expected = torch.ones_like(x)
    expected[:, :3] = (x[:, :3] > 0).float()
    assert torch.equal(grad, expected)


def test_nan_passes_the_gradient_on():
    x = torch.full((40,), torch.nan)
    for function in (relu, hardtanh):
        _, (grad,) = forward_backward(function, [x])
        assert torch.equal(grad, torch.ones(40))


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000])
def test_bits_pack_and_unpack(numel):
    bits = torch.rand(numel) < 0.5
    assert torch.equal(unpack_bits(pack_bits(bits), numel), bits)


def test_holds_one_bit_an_element():
    x = torch.randn(3, 37, requires_grad=True)
    assert held_bytes(lambda: relu(x)) == (3 * 37 + 7) // 8
    with torch.no_grad():
        assert held_bytes(lambda: relu(x)) == 0
    assert held_bytes(lambda: relu(x.detach())) == 0


@given(shape=shapes, layout=st.sampled_from(LAYOUTS))
def test_bits_follow_the_memory_order(shape, layout):
    x = lay_out(torch.randn(shape), layout)
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    mask = torch.ops.lance.pack_mask(x > 0, order)
    assert torch.equal(torch.ops.lance.unpack_mask(mask, x, order), x > 0)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_in_place_on_a_view_that_negates(requires_grad):
    # Of a copy: a leaf could not be written to.
    whole = torch.randn(9, dtype=torch.complex64, requires_grad=requires_grad).clone()
    view = whole.conj().imag
    expected = view.relu()
    relu_(view)
    assert view.is_neg()
    assert torch.equal(view, expected)


def test_second_derivative_raises():
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = lay_out(torch.randn(2, 3, 4, 5), layout)
    order = [0, 1, 2, 3] if layout == "contiguous" else [0, 2, 3, 1]
    lance = torch.ops.lance
    for operator, args in (
        (lance.relu, ()),
        (lance.hardtanh, (0.0, 6.0)),
        (lance.leaky_relu, (0.1,)),
    ):
        opcheck(operator, (x.clone().requires_grad_(), *args))
    opcheck(lance.masked_activation, (x, 0.0, 6.0, None, order))
    opcheck(lance.masked_activation_, (x.clone(), None, None, None, order))
    mask = lance.pack_mask(x > 0, order)
    opcheck(lance.pack_mask, (x > 0, order))
    opcheck(lance.unpack_mask, (mask, x, order))
    opcheck(lance.masked_activation_grad, (x, mask, 0.1, order))


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (1, 6, 8, 1), (4, 6, 1, 1), (1, 1, 1, 1)])
def test_strides_of_expanded_inputs(shape):
    x = torch.randn(shape).expand(4, 6, 8, 8).requires_grad_()
    assert relu(x).stride() == torch.relu(x).stride()
    x = torch.randn(shape).permute(0, 2, 3, 1).expand(4, 8, 8, 6).requires_grad_()
    assert relu(x).stride() == torch.relu(x).stride()


def test_refusals():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"order is \[0, 0\]"):
        torch.ops.lance.masked_activation(x, None, None, None, [0, 0])
    with pytest.raises(RuntimeError, match="one bit an element"):
        torch.ops.lance.masked_activation_grad(x, torch.zeros(2, dtype=torch.uint8), None, [0, 1])
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.lance.masked_activation(x.long(), None, None, None, [0, 1])


def test_compiles():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert_compiles(lambda x: leaky_relu_(relu_(x * 2) + hardtanh(x)) + relu(x), [x])
