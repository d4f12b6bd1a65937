"""`dropout`: the same draw, values and gradient as PyTorch's, at one bit an element."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import dropout
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import assert_same_bits, forward_backward, held_bytes, lay_out, with_special

shapes = st.lists(st.integers(0, 9), min_size=0, max_size=4).map(tuple)


@given(shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), p=st.sampled_from((0.1, 0.5, 0.9)))
def test_equals_pytorch(shape, dtype, layout, p):
    x, grad = lay_out(with_special(shape, dtype), layout), with_special(shape, dtype)
    y, (grad_x,) = forward_backward(lambda x: dropout(x, p), [x], grad, seed=3)
    expected, (expected_grad,) = forward_backward(lambda x: F.dropout(x, p), [x], grad, seed=3)
    assert_same_bits(y, expected)
    assert_same_bits(grad_x, expected_grad)


def test_drops_nothing_without_a_draw():
    x, state = torch.randn(5, requires_grad=True), torch.get_rng_state()
    y = dropout(x, 0.0)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(5))
    assert torch.equal(torch.get_rng_state(), state)


def test_holds_one_bit_an_element():
    x = torch.randn(50, 30, requires_grad=True)
    assert held_bytes(lambda: dropout(x, 0.5)) == (50 * 30 + 7) // 8


def test_output_may_be_changed_in_place():
    x = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = dropout(x, 0.5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() - 1)


def test_refusals():
    with pytest.raises(RuntimeError, match=r"p is 1\.0"):
        dropout(torch.randn(3), 1.0)


def test_opcheck():
    x = torch.randn(4, 5, requires_grad=True)
    deterministic = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.lance.dropout, (x, 0.5), test_utils=deterministic)
    opcheck(torch.ops.lance.dropout_mask, (x.detach(), 0.5, [0, 1]), test_utils=deterministic)
    opcheck(torch.ops.lance.dropout_grad, (x.detach(), torch.zeros(3, dtype=torch.uint8), 0.5, [0, 1]))


def test_compiled_gradient_follows_the_draw():
    x = torch.rand(40, 50, requires_grad=True)
    torch.compiler.reset()
    y = torch.compile(lambda x: dropout(x, 0.25), fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0)
    torch.testing.assert_close(y, x * grad)
