"""Attention: exact values; gradients are those at query, key and value rounded within the stated bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import attention, dequantize_rows, quantize_rows
from lance_kernels.ops.attention import attention_grads
from tests.ops.cases import DTYPES
from tests.ops.companion_cases import assert_compiles, forward_backward, held_bytes


def heads(batch, count, length, size, dtype=torch.float32, transposed=False):
    if transposed:
        return torch.randn(batch, length, count, size).to(dtype).transpose(1, 2)
    return torch.randn(batch, count, length, size).to(dtype)


def rounded(x):
    codes, steps = quantize_rows(x, None, 1, x.numel() // x.shape[-1], [0, 1, 2, 3])
    return dequantize_rows(codes, steps, 1, torch.empty(x.shape, dtype=torch.float64), [0, 1, 2, 3])


@given(
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
    lengths=st.sampled_from(((5, 5), (7, 4), (1, 3))),
    transposed=st.booleans(),
    mask=st.sampled_from((None, "bool", "bias")),
)
def test_gradients_are_those_of_the_rounded_tensors(dtype, causal, scale, lengths, transposed, mask):
    queries, keys = lengths
    causal = causal and mask is None
    query = heads(2, 3, queries, 8, dtype, transposed)
    key, value = (heads(2, 3, keys, 8, dtype, transposed) for _ in range(2))
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(2, 1, queries, keys) < 0.7
        attn_mask[..., 0] = True
    elif mask == "bias":
        attn_mask = torch.randn(1, 3, queries, keys).to(dtype)
    inputs = [query, key, value] + ([attn_mask] if mask == "bias" else [])

    def call(function):
        def run(query, key, value, bias=None):
            chosen = attn_mask if mask == "bool" else bias
            return function(query, key, value, chosen, 0.0, causal, scale=scale)

        return run

    grad = torch.randn(2, 3, queries, 8).to(dtype)
    y, grads = forward_backward(call(attention), inputs, grad)
    expected, _ = forward_backward(call(F.scaled_dot_product_attention), inputs, grad)
    assert torch.equal(y, expected)
    doubles = [rounded(tensor) for tensor in inputs[:3]] + [tensor.double() for tensor in inputs[3:]]
    _, expected_grads = forward_backward(call(F.scaled_dot_product_attention), doubles, grad.double())
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 8e-3}[dtype]
    for one, other in zip(grads, expected_grads):
        assert (one.double() - other).norm() <= tolerance * other.norm() + 1e-6


def test_rounding_costs_little():
    inputs = [heads(2, 3, 20, 16) for _ in range(3)]
    grad = torch.randn(2, 3, 20, 16)
    _, grads = forward_backward(attention, inputs, grad)
    _, expected = forward_backward(F.scaled_dot_product_attention, inputs, grad)
    for one, other in zip(grads, expected):
        assert (one - other).norm() <= 0.015 * other.norm()


def test_dropout_is_drawn_alike_in_backward_and_leaves_the_generator():
    inputs = [heads(2, 2, 6, 8) for _ in range(3)]
    grad = torch.randn(2, 2, 6, 8)
    y, grads = forward_backward(lambda *tensors: attention(*tensors, None, 0.5), inputs, grad, seed=5)
    after = torch.rand(1)
    expected, expected_grads = forward_backward(
        lambda *tensors: F.scaled_dot_product_attention(*tensors, None, 0.5), inputs, grad, seed=5
    )
    assert torch.equal(y, expected)
    assert torch.equal(after, torch.rand(1))
    for one, other in zip(grads, expected_grads):
        assert (one - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_formula_equals_autograd(causal, grouped):
    query = heads(2, 4, 5, 8, torch.float64).requires_grad_()
    key, value = (heads(2, 2 if grouped else 4, 5, 8, torch.float64).requires_grad_() for _ in range(2))
    mask = None if causal else torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)
    grad = torch.randn_like(y)
    wanted = [query, key, value] + ([] if mask is None else [mask])
    expected = torch.autograd.grad(y, wanted, grad)
    found = attention_grads(grad, query, key, value, mask, causal, None, grouped, mask is not None)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_what_is_held():
    query, key, value = (heads(2, 3, 5, 16).requires_grad_() for _ in range(3))
    assert held_bytes(lambda: attention(query, key, value)) == 3 * (query.numel() + 4 * query.numel() // 16)


def windows_bias(table, hide=-100.0):
    hidden = torch.rand(4, 1, 6, 6) < 0.3
    return table + torch.zeros(4, 1, 6, 6).masked_fill(hidden, hide)


@pytest.mark.parametrize("hide", [-100.0, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_computed_mask_is_kept_in_16_bits(hide):
    torch.manual_seed(3)
    query, key, value = (heads(4, 2, 6, 8) for _ in range(3))
    table = torch.randn(1, 2, 6, 6)
    grad = torch.randn(4, 2, 6, 8)

    def call(function):
        def run(query, key, value, table):
            torch.manual_seed(4)
            mask = windows_bias(table, hide)
            if hide != -torch.inf:
                mask = torch.cat([mask[..., :5, :], table.new_full((4, 2, 1, 6), hide)], -2)
            return function(query, key, value, mask)

        return run

    y, grads = forward_backward(call(attention), [query, key, value, table], grad)
    expected, _ = forward_backward(call(F.scaled_dot_product_attention), [query, key, value, table], grad)
    assert torch.equal(y, expected)
    # In float32, where a row of -1e9 leaves nothing of its scores.
    kept = [rounded(tensor).float() for tensor in (query, key, value)] + [table.half().float()]
    _, expected_grads = forward_backward(call(F.scaled_dot_product_attention), kept, grad)
    for one, other in zip(grads, expected_grads):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_what_is_held_of_a_mask():
    query, key, value = (heads(4, 2, 6, 8).requires_grad_() for _ in range(3))
    table = torch.randn(1, 2, 6, 6, requires_grad=True)
    alone = held_bytes(lambda: attention(query, key, value))
    size = 4 * 2 * 6 * 6
    assert held_bytes(lambda: attention(query, key, value, windows_bias(table))) == alone + 2 * size

    def twice(change):
        mask = windows_bias(table)
        y = attention(query, key, value, mask)
        if change:
            mask = mask.add_(1)
        return attention(y, y, y, mask)

    once = held_bytes(lambda: attention(query, key, value, windows_bias(table)))
    assert held_bytes(lambda: twice(False)) == once + alone
    assert held_bytes(lambda: twice(True)) == once + alone + 2 * size
    # A leaf is held by the model anyway, an expanded mask is smaller than its copy would be.
    expanded = (table * 2).expand(4, 2, 6, 6)
    assert held_bytes(lambda: attention(query, key, value, expanded)) == alone + 4 * expanded.numel() // 4


def test_opcheck_flops_autocast_and_compile():
    query, key, value = (heads(1, 2, 4, 8).requires_grad_() for _ in range(3))
    opcheck(torch.ops.lance.attention, (query, key, value))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.ops.lance.attention(query, key, value)
    assert counter.get_total_flops() == 2 * 2 * 4 * 4 * 16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(query, key, value)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert query.grad.dtype == torch.float32
    mask = torch.randn(2, 4, 4)
    assert_compiles(lambda q, k, v: attention(q, k, v, mask), [query, key, value], tolerance=1e-4)


def test_refusals():
    query = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="as many dimensions as query"):
        attention(query, query[0], query)
