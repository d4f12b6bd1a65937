"""`frozen_convolution`: PyTorch's values and gradients, nothing of the input held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import frozen_convolution
from tests.ops.cases import DTYPES, LAYOUTS, Geometry, assert_near, geometries, lay_out
from tests.ops.companion_cases import assert_compiles, forward_backward, held_bytes

zero_padded = geometries(modes=("zeros",)).filter(lambda geometry: len(geometry.padding) == len(geometry.spatial))


@given(geometry=zero_padded, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_equals_pytorch(geometry: Geometry, dtype, layout):
    x = lay_out(torch.randn(geometry.input_size).to(dtype), layout)
    weight = torch.randn(geometry.weight_size).to(dtype)
    bias = torch.randn(geometry.outputs).to(dtype)
    stride, padding, dilation, groups = geometry.arguments
    outputs = [0] * len(geometry.spatial)
    args = (stride, padding, dilation, False, outputs, groups)
    expected = torch.ops.aten.convolution(x, weight, bias, *args)
    grad = torch.randn_like(expected)
    y, grads = forward_backward(lambda x, bias: frozen_convolution(x, weight, bias, *args), [x, bias], grad)
    assert torch.equal(y, expected)
    _, expected_grads = forward_backward(
        lambda x, bias: torch.ops.aten.convolution(x, weight, bias, *args), [x, bias], grad
    )
    for one, other in zip(grads, expected_grads):
        assert_near(one, other)


def test_transposed():
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3)
    args = ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)
    y, (grad,) = forward_backward(lambda x: frozen_convolution(x, weight, None, *args), [x])
    expected, (expected_grad,) = forward_backward(
        lambda x: torch.nn.functional.conv_transpose2d(x, weight, None, 2, 1, 1), [x]
    )
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


ARGS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def test_holds_nothing_of_the_input():
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3)
    assert held_bytes(lambda: frozen_convolution(x, weight, None, *ARGS), [weight]) == 0
    assert held_bytes(lambda: torch.conv2d(x, weight), [weight]) > 0


def test_refuses_a_trainable_weight():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        frozen_convolution(torch.randn(2, 3, 5, 5), weight, None, *ARGS)


def test_refuses_numbers_for_no_spatial_mode():
    with pytest.raises(RuntimeError, match=r"expected \(O, C / groups, \*kernel\)"):
        frozen_convolution(torch.randn(2, 3), torch.randn(4, 3), None, [], [], [], False, [])


def test_opcheck_flops_autocast_and_compile():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    opcheck(torch.ops.lance.frozen_convolution, (x.clone().requires_grad_(), weight, torch.randn(4), *ARGS))
    with FlopCounterMode(display=False) as counter:
        frozen_convolution(x, weight, None, *ARGS)
    assert counter.get_total_flops() == 2 * 2 * 25 * 4 * 3 * 9
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_convolution(x, weight, None, *ARGS).dtype == torch.bfloat16
    assert_compiles(lambda x: frozen_convolution(x, weight, None, *ARGS), [x])
