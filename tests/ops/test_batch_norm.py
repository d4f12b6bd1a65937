"""Frozen batch norm, alone and with ReLU: PyTorch's gradient bit for bit, one ulp where fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import batch_norm_frozen, batch_norm_relu_frozen
from tests.ops.cases import DTYPES, LAYOUTS
from tests.ops.companion_cases import assert_compiles, assert_same_bits, forward_backward, held_bytes, lay_out

shapes = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda shape: st.sampled_from((shape, shape[:3], shape[:2], (*shape, 3)))
)
EPSILON = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def vectors(channels: int, dtype: torch.dtype, affine: bool) -> list[torch.Tensor | None]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, mean = (torch.randn(channels, dtype=wide) for _ in range(3))
    return [weight if affine else None, bias if affine else None, mean, torch.rand(channels, dtype=wide)]


def plain(weight, bias, mean, var):
    return lambda x: F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)


@given(shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), affine=st.booleans())
def test_frozen_equals_pytorch(shape, dtype, layout, affine):
    weight, bias, mean, var = vectors(shape[1], dtype, affine)
    x, grad = lay_out(torch.randn(shape).to(dtype), layout), torch.randn(shape).to(dtype)
    y, (grad_x,) = forward_backward(lambda x: batch_norm_frozen(x, weight, bias, mean, var), [x], grad)
    expected, (expected_grad,) = forward_backward(plain(weight, bias, mean, var), [x], grad)
    assert_same_bits(y, expected)
    if dtype == torch.float32:
        assert_same_bits(grad_x, expected_grad)
    else:
        torch.testing.assert_close(grad_x, expected_grad, rtol=EPSILON[dtype], atol=0)


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    affine=st.booleans(),
    high=st.sampled_from((None, 6.0, 0.5)),
)
def test_fused_is_within_one_ulp(shape, dtype, layout, affine, high):
    weight, bias, mean, var = vectors(shape[1], dtype, affine)
    x, grad = lay_out(torch.randn(shape).to(dtype), layout), torch.randn(shape).to(dtype)

    def both(x):
        y = plain(weight, bias, mean, var)(x)
        return F.relu(y) if high is None else F.hardtanh(y, 0.0, high)

    y, (grad_x,) = forward_backward(lambda x: batch_norm_relu_frozen(x, weight, bias, mean, var, 1e-5, high), [x], grad)
    expected, (expected_grad,) = forward_backward(both, [x], grad)
    # An ulp of what is added: the result itself may cancel.
    scale = torch.rsqrt(var.double() + 1e-5) * (1 if weight is None else weight.double())
    terms = torch.maximum(
        (x.double() * scale.view(1, -1, *[1] * (x.dim() - 2))).abs(),
        (mean.double() * scale).abs().view(1, -1, *[1] * (x.dim() - 2)),
    )
    bound = (terms + (0 if bias is None else bias.abs().max())).clamp_min(1e-30)
    assert ((y.double() - expected.double()).abs() <= 2 * EPSILON[dtype] * bound).all()
    same = (y > 0) == (expected > 0)
    if high is not None:
        same &= (y < high) == (expected < high)
    assert (~same).sum() <= 1
    torch.testing.assert_close(grad_x[same], expected_grad[same], rtol=EPSILON[dtype], atol=0)


def test_nan_and_infinity_pass_through():
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]])
    mean, var = torch.zeros(4), torch.ones(4)
    y, (grad,) = forward_backward(lambda x: batch_norm_relu_frozen(x, None, None, mean, var, 1e-12), [x])
    assert_same_bits(y, torch.tensor([[torch.nan, torch.inf, 0.0, 1.0]]))
    assert torch.equal(grad, torch.tensor([[1.0, 1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("batch", [0, 3])
def test_holds_vectors_only(batch):
    x = torch.randn(batch, 4, 5, 6, requires_grad=True)
    weight, bias, mean, var = vectors(4, torch.float32, True)
    ignored = [weight, bias, mean, var]
    assert held_bytes(lambda: batch_norm_frozen(x, weight, bias, mean, var), ignored) == 0
    assert held_bytes(lambda: batch_norm_relu_frozen(x, weight, bias, mean, var), ignored) == x.numel() // 8


def test_refusals():
    x, vector = torch.randn(2, 3, 4, requires_grad=True), torch.ones(3)
    with pytest.raises(RuntimeError, match="weight requires a gradient"):
        batch_norm_frozen(x, vector.clone().requires_grad_(), None, vector, vector)
    with pytest.raises(RuntimeError, match=r"high is -1\.5; expected at least 0"):
        torch.ops.lance.batch_norm_relu_mask(torch.randn(2, 3), *[torch.ones(3)] * 4, 1e-5, -1.5, [0, 1])
    with pytest.raises(RuntimeError, match="mean has shape"):
        batch_norm_frozen(x, None, None, torch.ones(4), vector)
    with pytest.raises(RuntimeError, match="expected"):
        batch_norm_relu_frozen(torch.randn(3), None, None, vector, vector)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    x = lay_out(torch.randn(2, 3, 4, 5), layout)
    weight, bias, mean, var = vectors(3, torch.float32, True)
    order = [0, 1, 2, 3] if layout == "contiguous" else [0, 2, 3, 1]
    lance = torch.ops.lance
    opcheck(lance.batch_norm_frozen, (x.clone().requires_grad_(), weight, bias, mean, var))
    opcheck(lance.batch_norm_relu_frozen, (x.clone().requires_grad_(), weight, bias, mean, var, 1e-5, 6.0))
    opcheck(lance.batch_norm_relu_mask, (x, weight, bias, mean, var, 1e-5, None, order))
    opcheck(lance.batch_norm_frozen_grad, (x, weight, var, 1e-5, order))
    mask = lance.pack_mask(x > 0, order)
    opcheck(lance.batch_norm_relu_grad, (x, mask, weight, var, 1e-5, order))


def test_compiles():
    weight, bias, mean, var = vectors(3, torch.float32, True)
    assert_compiles(
        lambda x: batch_norm_relu_frozen(batch_norm_frozen(x, weight, bias, mean, var), weight, bias, mean, var),
        [torch.randn(2, 3, 4, 4)],
    )
