"""`mode_gram`, `mode_grams_` and `gram_eigh` against unfoldings in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import gram_eigh, mode_gram, mode_grams_
from tests.ops.cases import DTYPES, LAYOUTS, assert_near, lay_out

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


def unfolded_gram(x: torch.Tensor, mode: int) -> torch.Tensor:
    unfolding = x.double().movedim(mode, 0).reshape(x.shape[mode], -1)
    return unfolding @ unfolding.mT


@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_gram_of_every_mode(data, shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    mode = data.draw(st.integers(-x.dim(), x.dim() - 1))
    gram = mode_gram(x, mode)
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(gram, unfolded_gram(x, mode), terms=x.numel() // x.shape[mode])


@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_running_grams_are_added_to(data, shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    modes = data.draw(st.lists(st.integers(0, x.dim() - 1), unique=True))
    wide = torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from((torch.float32, torch.float64)))
    before = [torch.randn(shape[mode], shape[mode], dtype=wide) for mode in modes]
    grams = [gram.clone() for gram in before]
    mode_grams_(grams, x, modes)
    for gram, start, mode in zip(grams, before, modes):
        # Each call's own sum is a float32 one, whatever the running Gram is.
        narrow = gram if dtype == torch.float64 else gram.float()
        assert_near(narrow, start.double() + unfolded_gram(x, mode), factor=10, terms=x.numel())


def test_empty_batch_adds_nothing():
    grams = [torch.ones(4, 4)]
    mode_grams_(grams, torch.randn(0, 4), [1])
    assert torch.equal(grams[0], torch.ones(4, 4))
    assert torch.equal(mode_gram(torch.randn(0, 4), 1), torch.zeros(4, 4))


def test_eigenvectors_diagonalise_and_descend():
    x = torch.randn(7, 20, dtype=torch.float64)
    gram = x @ x.mT
    values, vectors = gram_eigh(gram)
    assert (values[:-1] >= values[1:]).all()
    assert_near(vectors @ values.diag() @ vectors.mT, gram, factor=100)
    assert_near(vectors.mT @ vectors, torch.eye(7, dtype=torch.float64), factor=100)


def test_sign_is_fixed_by_the_largest_entry():
    gram = mode_gram(torch.randn(6, 9), 0)
    _, vectors = gram_eigh(gram)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("size", [0, 1, 5])
def test_zero_gram(size):
    values, vectors = gram_eigh(torch.zeros(size, size))
    assert torch.equal(values, torch.zeros(size))
    assert_near(vectors.mT @ vectors, torch.eye(size))


def test_semidefinite_gram_has_no_negative_eigenvalue():
    column = torch.randn(8, 1)
    values, _ = gram_eigh(column @ column.mT)
    assert (values >= 0).all()
    assert values[1] <= 1e-5 * values[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_refuses_nan_and_infinity(bad):
    gram = torch.eye(3)
    gram[1, 1] = bad
    with pytest.raises(RuntimeError, match="gram holds NaN or infinity"):
        gram_eigh(gram)


def test_refusals_leave_the_grams_alone():
    grams = [torch.zeros(4, 4), torch.zeros(2, 2)]
    with pytest.raises(RuntimeError, match=r"grams\[1\] has shape \(2, 2\); expected \(5, 5\) for mode 2"):
        mode_grams_(grams, torch.randn(3, 4, 5), [1, 2])
    assert not grams[0].any()
    with pytest.raises(RuntimeError, match=r"names .*mode.* twice"):
        mode_grams_([grams[0], grams[0].clone()], torch.randn(3, 4), [1, -1])
    with pytest.raises(RuntimeError, match="grams has 1 entries"):
        mode_grams_(grams[:1], torch.randn(3, 4), [0, 1])
    with pytest.raises(RuntimeError, match=r"mode is 2; expected one of the 2 modes of x"):
        mode_gram(torch.randn(3, 4), 2)
    with pytest.raises(RuntimeError, match=r"grams\[0\] has dtype .*; expected"):
        mode_grams_([torch.zeros(4, 4, dtype=torch.bfloat16)], torch.randn(3, 4), [1])
    with pytest.raises(RuntimeError, match=r"gram has shape \(2, 3\); expected a square matrix"):
        gram_eigh(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"gram has dtype torch.bfloat16"):
        gram_eigh(torch.randn(2, 2).bfloat16())


def test_opcheck():
    x = torch.randn(3, 4, 5)
    opcheck(torch.ops.lance.mode_gram.default, (x, 1))
    opcheck(torch.ops.lance.mode_grams_.default, ([torch.zeros(4, 4), torch.zeros(5, 5)], x, [1, 2]))
    opcheck(torch.ops.lance.gram_eigh.default, (mode_gram(x, 1),))


def test_gradients_are_refused_loudly():
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="mode_gram has no derivative"):
        mode_gram(x, 1).sum().backward()
    with pytest.raises(RuntimeError, match="mode_grams_ has no derivative"):
        mode_grams_([torch.zeros(4, 4)], x, [1])
