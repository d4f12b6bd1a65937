"""Norms: exact values; gradients are those of the input rounded within its stated bound."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import (
    batch_norm,
    dequantize_rows,
    group_norm,
    layer_norm,
    quantize_rows,
    rms_norm,
)
from lance_kernels.ops.quantize_rows import quantize_reference
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import assert_compiles, forward_backward, held_bytes, lay_out

ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_rows_round_within_half_a_step(shape, dtype, layout, data):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    split = data.draw(st.integers(0, len(shape)))
    low = data.draw(st.integers(0, split))
    sizes = [shape[dim] for dim in order]
    outer, rows = torch.Size(sizes[:low]).numel(), torch.Size(sizes[low:split]).numel()
    center = torch.randn(rows) if data.draw(st.booleans()) else None
    codes, steps = quantize_rows(x, center, outer, rows, order)
    assert codes.dtype == torch.int8
    assert codes.numel() == x.numel()
    assert steps.shape == (rows,)
    if x.numel() == 0:
        return
    flat = x.permute(order).reshape(outer, rows, -1).double()
    deviation = flat if center is None else flat - center.double()[:, None]
    torch.testing.assert_close(steps.double(), deviation.abs().amax((0, 2)) / 127, rtol=1e-5, atol=1e-7)
    back = dequantize_rows(codes, steps, outer, torch.empty_like(x), order)
    error = (back.permute(order).reshape(outer, rows, -1).double() - deviation).abs()
    slack = {torch.bfloat16: 1.01, torch.float16: 0.15}.get(dtype, 1e-3)
    assert (error <= steps.double()[:, None] * (0.5 + slack) + 1e-7).all()


def test_a_row_with_nan_or_infinity_comes_back_as_nan():
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    codes, steps = quantize_rows(x, None, 1, 4, [0, 1])
    back = dequantize_rows(codes, steps, 1, x, [0, 1])
    assert back[1:3].isnan().all()
    assert back[[0, 3]].isfinite().all()
    zero_codes, zero_steps = quantize_rows(torch.zeros(2, 3), None, 1, 2, [0, 1])
    assert torch.equal(dequantize_rows(zero_codes, zero_steps, 1, torch.empty(2, 3), [0, 1]), torch.zeros(2, 3))


@pytest.mark.parametrize("quantize", [torch.ops.lance.quantize_rows, quantize_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_whose_step_has_no_inverse_is_zero(quantize, dtype):
    x = torch.tensor([[0.0, 3e-37, -3e-37], [0.0, 4e-37, -4e-37]], dtype=dtype)
    codes, steps = quantize(x, None, 1, 2, [0, 1])
    assert codes.tolist() == [0, 0, 0, 0, 127, -127]
    assert steps[0] == 0
    assert steps[1] > 0


def rounded(x, center, outer, rows, order=None):
    """`x` as the norms see it in backward."""
    order = list(range(x.dim())) if order is None else order
    codes, steps = quantize_rows(x, center, outer, rows, order)
    back = dequantize_rows(codes, steps, outer, torch.empty_like(x, dtype=torch.float64), order)
    shape = [1, rows, -1] if center is not None else None
    if center is None:
        return back
    flat = back.permute(order).reshape(outer, rows, -1) + center.double().view(shape)
    inverse = [order.index(dim) for dim in range(x.dim())]
    return flat.reshape([x.shape[dim] for dim in order]).permute(inverse)


def layer_formula(x_hat, rstd, grad, weight, dims):
    """`dx = rstd (g - mean(g) - x_hat mean(g x_hat))` with `g = grad weight`, in float64."""
    g = grad.double() if weight is None else grad.double() * weight.double()
    return rstd * (g - g.mean(dims, keepdim=True) - x_hat * (g * x_hat).mean(dims, keepdim=True))


@given(
    leading=st.sampled_from(((), (3,), (2, 5), (1, 2, 3))),
    shape=st.sampled_from(((8,), (17,), (3, 5))),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    affine=st.booleans(),
)
def test_layer_norm(leading, shape, dtype, layout, affine):
    x = lay_out((torch.randn(*leading, *shape) * 2 + 1).to(dtype), layout)
    weight, bias = (torch.randn(shape).to(dtype) for _ in range(2)) if affine else (None, None)
    grad = torch.randn(x.shape).to(dtype)
    inputs = [x, weight, bias] if affine else [x]
    y, grads = forward_backward(lambda x, *affine: layer_norm(x, shape, *affine), inputs, grad)
    assert torch.equal(y, F.layer_norm(x, shape, weight, bias))
    dims = list(range(-len(shape), 0))
    wide = x.double()
    mean, var = wide.mean(dims, keepdim=True), wide.var(dims, keepdim=True, unbiased=False)
    rstd = (var + 1e-5).rsqrt()
    rows = x.numel() // torch.Size(shape).numel()
    x_hat = (rounded(x, mean.reshape(-1), 1, rows) - mean) * rstd
    expected = layer_formula(x_hat, rstd, grad, weight, dims)
    scale = expected.abs().max().clamp_min(1.0)
    assert (grads[0].double() - expected).abs().max() <= ROUNDING[dtype] * scale
    true = (wide - mean) * rstd
    # The documented bound: half a step over sigma is the row's largest magnitude over 254.
    assert ((x_hat - true).abs() <= true.abs().amax(dims, keepdim=True) / 254 * 1.02 + 1e-6).all()
    if affine:
        sums = list(range(len(leading)))
        product = grad.double() * x_hat
        total = product.sum(sums) if sums else product
        assert (grads[1].double() - total).abs().max() <= ROUNDING[dtype] * total.abs().max().clamp_min(1.0) * 3


@given(
    shape=st.sampled_from(((2, 3, 16), (5, 17), (9,))),
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    eps=st.sampled_from((None, 1e-6)),
    magnitude=st.sampled_from((1, 1e-3)),
)
def test_rms_norm(shape, dtype, affine, eps, magnitude):
    x = (torch.randn(shape) * magnitude).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if affine else None
    grad = torch.randn(shape).to(dtype)
    inputs = [x, weight] if affine else [x]
    y, grads = forward_backward(lambda x, weight=None: rms_norm(x, shape[-1:], weight, eps), inputs, grad)
    assert torch.equal(y, F.rms_norm(x, shape[-1:], weight, eps))
    doubles = [tensor.double() for tensor in inputs]
    default = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    _, expected = forward_backward(
        lambda x, weight=None: F.rms_norm(x, shape[-1:], weight, default if eps is None else eps),
        doubles,
        grad.double(),
    )
    for one, other in zip(grads, expected):
        assert (one.double() - other).norm() <= (0.03 + ROUNDING[dtype]) * other.norm() + 1e-6


@given(
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    groups=st.sampled_from((1, 2, 4)),
    layout=st.sampled_from(LAYOUTS),
)
def test_group_norm(dtype, affine, groups, layout):
    x = lay_out(torch.randn(3, 8, 5, 7).to(dtype), layout)
    weight, bias = (torch.randn(8).to(dtype) for _ in range(2)) if affine else (None, None)
    grad = torch.randn(x.shape).to(dtype)
    inputs = [x, weight, bias] if affine else [x]
    y, grads = forward_backward(lambda x, *affine: group_norm(x, groups, *affine), inputs, grad)
    torch.testing.assert_close(y, F.group_norm(x, groups, weight, bias))
    doubles = [tensor.double() for tensor in inputs]
    _, expected = forward_backward(lambda x, *affine: F.group_norm(x, groups, *affine), doubles, grad.double())
    for one, other in zip(grads, expected):
        assert (one.double() - other).norm() <= (0.03 + 3 * ROUNDING[dtype]) * other.norm() + 1e-6


@given(
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    training=st.booleans(),
    layout=st.sampled_from(("contiguous", "channels_last", "sliced")),
    shape=st.sampled_from(((4, 6), (3, 6, 5), (3, 6, 5, 4), (2, 6, 3, 4, 2), (0, 6, 5))),
)
def test_batch_norm(dtype, affine, training, layout, shape):
    x = lay_out((torch.randn(shape) * 2 + 1).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = (torch.randn(6, dtype=wide) for _ in range(2)) if affine else (None, None)
    mean, var = torch.randn(6, dtype=wide), torch.rand(6, dtype=wide) + 0.5
    ours, plain = (mean.clone(), var.clone()), (mean.clone(), var.clone())
    grad = torch.randn(shape).to(dtype)
    inputs = [x, weight, bias] if affine else [x]
    y, grads = forward_backward(
        lambda x, *affine: batch_norm(x, *(affine or (None, None)), *ours, training, 0.1, 1e-5), inputs, grad
    )
    expected, expected_grads = forward_backward(
        lambda x, *affine: F.batch_norm(x, *plain, *(affine or (None, None)), training, 0.1, 1e-5), inputs, grad
    )
    assert torch.equal(y, expected)
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    for one, other in zip(grads, expected_grads):
        assert (one - other).double().norm() <= (0.02 + 2 * ROUNDING[dtype]) * other.double().norm() + 1e-6


def test_what_is_held():
    x, weight, bias = torch.randn(4, 10, 32, requires_grad=True), torch.ones(32), torch.zeros(32)
    rows = 4 * 10
    assert held_bytes(lambda: layer_norm(x, [32], weight, bias), [weight, bias]) == x.numel() + 8 * rows
    assert held_bytes(lambda: rms_norm(x, [32], weight), [weight]) == x.numel() + 8 * rows
    assert held_bytes(lambda: group_norm(x, 2)) == x.numel() + 8 * 4 * 2
    assert held_bytes(lambda: batch_norm(x, None, None, None, None, True, 0.1, 1e-5)) == x.numel() + 8 * 10


def test_opcheck():
    x = torch.randn(2, 4, 6)
    lance = torch.ops.lance
    weight = torch.randn(6, requires_grad=True)
    opcheck(lance.layer_norm, (x.clone().requires_grad_(), [6], weight, torch.randn(6, requires_grad=True)))
    opcheck(lance.rms_norm, (x.clone().requires_grad_(), [6], weight))
    opcheck(lance.group_norm, (x.clone().requires_grad_(), 2, torch.randn(4, requires_grad=True), None))
    opcheck(lance.quantize_rows, (x, torch.randn(4), 2, 4, [0, 1, 2]))
    codes, steps = quantize_rows(x, None, 2, 4, [0, 1, 2])
    opcheck(lance.dequantize_rows, (codes, steps, 2, x, [0, 1, 2]))


def test_refusals():
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="expected"):
        layer_norm(x, [5])
    with pytest.raises(RuntimeError, match="groups is 2"):
        group_norm(x, 2)
    with pytest.raises(RuntimeError, match="do not divide"):
        quantize_rows(x, None, 5, 1, [0, 1, 2])


def test_compiles():
    weight = torch.randn(8)

    def function(x):
        y = rms_norm(layer_norm(x, [8], weight), [8])
        return batch_norm(group_norm(y, 2), None, None, None, None, True, 0.1, 1e-5)

    assert_compiles(function, [torch.randn(3, 4, 8)], tolerance=1e-4)
