"""Smooth activations: exact values, derivatives within the stated bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import activation, derivative_bound
from lance_kernels.ops.activation import KINDS, pack_pairs, unpack_pairs
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import assert_compiles, assert_same_bits, forward_backward, held_bytes, lay_out

PLAIN = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
}
ROUNDING = {torch.float64: 1e-8, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)


def test_every_kind_is_tested():
    assert set(PLAIN) == set(KINDS)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PLAIN)
def test_derivative_is_within_its_bound(kind, dtype, bits):
    ends = torch.tensor([3.0, -3.0, 0.0, -0.0, 1e4, -1e4, 1.4142, -1.4142])
    x = torch.cat((torch.linspace(-15, 15, 6001), torch.randn(1000), ends)).to(dtype)
    y, (grad,) = forward_backward(lambda x: activation(x, kind, bits), [x])
    assert_same_bits(y, PLAIN[kind](x))
    _, (expected,) = forward_backward(PLAIN[kind], [x.double()])
    assert (grad.double() - expected).abs().max() <= derivative_bound(kind, bits) + ROUNDING[dtype]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", PLAIN)
def test_limits_and_nan(kind, bits):
    x = torch.tensor([torch.inf, -torch.inf, 100.0, -100.0, torch.nan] * 9)
    y, (grad,) = forward_backward(lambda x: activation(x, kind, bits), [x])
    assert_same_bits(y, PLAIN[kind](x))
    upper = 1.0 if kind in ("gelu", "gelu_tanh", "silu", "quick_gelu", "hardswish") else 0.0
    assert torch.equal(grad[:4], torch.tensor([upper, 0.0, upper, 0.0]))
    assert grad[4].isnan() or kind == "hardsigmoid"


@given(
    kind=st.sampled_from(list(PLAIN)),
    bits=st.sampled_from((8, 4)),
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_and_layout(kind, bits, shape, dtype, layout):
    x, grad = lay_out((torch.randn(shape) * 3).to(dtype), layout), torch.randn(shape).to(dtype)
    y, (grad_x,) = forward_backward(lambda x: activation(x, kind, bits), [x], grad)
    assert_same_bits(y, PLAIN[kind](x))
    _, (expected,) = forward_backward(PLAIN[kind], [x.double()], grad.double())
    bound = grad.double().abs() * (derivative_bound(kind, bits) + ROUNDING[dtype] * 1.2)
    assert ((grad_x.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize(("bits", "expected"), [(8, 111), (4, 56)])
def test_what_is_held(bits, expected):
    x = torch.randn(3, 37, requires_grad=True)
    assert held_bytes(lambda: activation(x, "gelu", bits)) == expected


@pytest.mark.parametrize("numel", [0, 1, 2, 17])
def test_pairs_pack_and_unpack(numel):
    codes = torch.randint(0, 16, (numel,), dtype=torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(codes), numel), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits):
    x = torch.randn(3, 5)
    lance = torch.ops.lance
    opcheck(lance.activation, (x.clone().requires_grad_(), "silu", bits))
    opcheck(lance.activation_codes, (x, "gelu", bits, [1, 0]))
    codes = lance.activation_codes(x, "gelu", bits, [1, 0])
    opcheck(lance.activation_grad, (x, codes, "gelu", bits, [1, 0]))


def test_refusals():
    x = torch.randn(3)
    with pytest.raises(RuntimeError, match="kind is 'swish'"):
        activation(x, "swish")
    with pytest.raises(RuntimeError, match="bits is 5"):
        activation(x, "gelu", 5)
    with pytest.raises(RuntimeError, match="8 bits an element"):
        torch.ops.lance.activation_grad(x, torch.zeros(2, dtype=torch.uint8), "gelu", 8, [0])


@pytest.mark.parametrize("bits", [8, 4])
def test_compiles(bits):
    assert_compiles(lambda x: activation(activation(x, "gelu", bits), "tanh", bits), [torch.randn(3, 5)])
