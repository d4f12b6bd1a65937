"""Operators on arguments that mostly do not fit: the right result or a `RuntimeError`, nothing else.

300 cases in all by default; `HYPOTHESIS_PROFILE=fuzz` draws 5,000 for each test.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lance_kernels as lance
from tests.ops.cases import DTYPES, assert_near, dense, lay_out

CASES = settings(max_examples=max(75, settings.default.max_examples))
ANY_DTYPES = (*DTYPES, torch.float32, torch.float32, torch.int64)
sizes = st.integers(0, 5)


@st.composite
def tensors(draw, dims=None, shape=None):
    if shape is None:
        shape = draw(st.lists(sizes, min_size=dims or 0, max_size=dims if dims is not None else 4))
    dtype = draw(st.sampled_from(ANY_DTYPES))
    x = torch.randn(shape) if dtype.is_floating_point else torch.ones(shape)
    layout = draw(st.sampled_from(("contiguous", "sliced", "transposed"))) if x.dim() else "contiguous"
    return lay_out(x.to(dtype), layout if dtype.is_floating_point else "contiguous")


@st.composite
def lists(draw, x, side=0):
    """Factors that fit most of the time."""
    factors = []
    for size in x.shape[: draw(st.sampled_from((x.dim(), x.dim(), x.dim(), 1)))]:
        fits = draw(st.sampled_from((True, True, True, False)))
        pair = [size if fits else draw(sizes), draw(sizes)]
        factors.append(draw(st.none() | tensors(shape=pair if side == 0 else pair[::-1])))
    return factors


def attempt(function, *args):
    """The result, or None where the operator refused by its own words."""
    try:
        return function(*args)
    except RuntimeError as error:
        if "lance::" not in str(error):
            raise
        return None


@CASES
@given(st.data())
def test_project_and_reconstruct(data):
    x = data.draw(tensors())
    side = data.draw(st.sampled_from((0, 1)))
    factors = data.draw(lists(x, side))
    result = attempt((lance.ops.tucker_project, lance.ops.tucker_reconstruct)[side], x, factors)
    if result is not None:
        assert_near(result, dense(x, factors, transpose=side == 0), factor=10, terms=64)


@CASES
@given(st.data())
def test_linear(data):
    x = data.draw(tensors())
    weight, bias = data.draw(tensors(dims=2)), data.draw(st.none() | tensors(dims=1))
    if data.draw(st.sampled_from((True, True, False))) and x.dim():
        weight = torch.randn(3, x.shape[-1]).to(x.dtype)
        bias = None
    factors, bits = data.draw(lists(x)), data.draw(st.sampled_from((0, 0, 4, 8, 2, 3)))
    result = attempt(lance.ops.linear, x, weight, bias, factors, bits)
    if result is None:
        return
    y, core = result
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    again = attempt(lance.ops.linear_given_core, x, weight, bias, core, factors, bits)
    assert torch.equal(again, y)
    if not bits:
        assert_near(core, dense(x, factors), factor=10, terms=64)
        rows = x.shape[:-1].numel()
        grad = torch.randn(y.shape).to(x.dtype)
        expected = dense(core, factors, transpose=False).reshape(rows, x.shape[-1])
        actual = attempt(lance.ops.linear_weight_grad, grad, core, factors)
        assert_near(actual, grad.double().reshape(rows, y.shape[-1]).mT @ expected, factor=20, terms=4096)


@CASES
@given(st.data())
def test_grams(data):
    x = data.draw(tensors())
    modes = data.draw(st.lists(st.integers(-5, 4), max_size=3))
    grams = [data.draw(tensors(dims=2)) for _ in modes]
    if data.draw(st.booleans()) and all(-x.dim() <= mode < x.dim() for mode in modes):
        grams = [torch.zeros(x.shape[mode], x.shape[mode], dtype=torch.float64) for mode in modes]
    before = [gram.clone() for gram in grams]
    if attempt(lambda: lance.ops.mode_grams_(grams, x, modes) or True) is None:
        assert all(torch.equal(gram, old) for gram, old in zip(grams, before))
        return
    for gram, old, mode in zip(grams, before, modes):
        unfolded = x.double().movedim(mode, 0).reshape(x.shape[mode], x.numel() // max(x.shape[mode], 1))
        assert_near(gram.float(), old.double() + unfolded @ unfolded.mT, factor=10, terms=64)


@CASES
@given(st.data())
def test_packed_cores(data):
    core, bits = data.draw(tensors()), data.draw(st.sampled_from((8, 4, 2, 2, 0, 3, -1)))
    packed = attempt(lance.ops.pack_core, core, bits)
    if packed is None:
        return
    size = data.draw(st.sampled_from((list(core.shape), list(core.shape), [*core.shape, 2], [-1], [1 << 20])))
    result = attempt(lance.ops.unpack_core, packed, size, bits, core.dtype)
    if result is not None and size == list(core.shape):
        assert result.shape == core.shape
        assert result.dtype == core.dtype
        assert result.isfinite().all()
    damaged = packed[: data.draw(st.integers(0, max(packed.numel() - 1, 0)))]
    assert packed.numel() == 0 or attempt(lance.ops.unpack_core, damaged, list(core.shape), bits, core.dtype) is None
