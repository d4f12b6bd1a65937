"""`tucker_project` and `tucker_reconstruct` against tensordot in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import tucker_project, tucker_reconstruct
from tests.ops.cases import DTYPES, LAYOUTS, assert_near, cast, dense, factored, lay_out, orthonormal

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_project_is_the_chain_of_mode_products(data, shape, dtype, layout):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    factors = cast(data.draw(factored(shape)), data.draw(st.sampled_from((dtype, torch.float32))))
    core = tucker_project(x, factors)
    assert core.dtype == dtype
    assert core.is_contiguous()
    assert_near(core, dense(x, factors))


@given(data=st.data(), shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_reconstruct_is_the_transposed_chain(data, shape, dtype, layout):
    factors = cast(data.draw(factored(shape)), dtype)
    ranks = [size if factor is None else factor.shape[1] for size, factor in zip(shape, factors)]
    core = lay_out(torch.randn(ranks).to(dtype), layout)
    x_hat = tucker_reconstruct(core, factors)
    assert x_hat.dtype == dtype
    assert x_hat.is_contiguous()
    assert_near(x_hat, dense(core, factors, transpose=False))


def test_full_rank_reconstructs_the_input():
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    factors = [orthonormal(size, size) for size in x.shape]
    assert_near(tucker_reconstruct(tucker_project(x, factors), factors), x, factor=10)


def test_no_factor_copies():
    x = torch.randn(3, 4).t()
    core = tucker_project(x, [None, None])
    assert torch.equal(core, x)
    assert core.is_contiguous()
    assert core.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 3), (0,)])
def test_empty_inputs(shape):
    factors = [None if size == 0 else orthonormal(size, 2, torch.float32) for size in shape]
    core = tucker_project(torch.randn(shape), factors)
    assert core.shape == tuple(size if factor is None else 2 for size, factor in zip(shape, factors))
    assert tucker_reconstruct(core, factors).shape == shape


def test_summing_over_an_empty_mode_gives_zeros():
    core = tucker_project(torch.randn(0, 4), [torch.randn(0, 3), None])
    assert torch.equal(core, torch.zeros(3, 4))


@pytest.mark.parametrize(
    "operator", [torch.ops.lance.tucker_project.default, torch.ops.lance.tucker_reconstruct.default]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(operator, dtype):
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    square = [orthonormal(size, size, dtype) for size in x.shape]
    opcheck(operator, (x, [None, square[1], None]))
    opcheck(operator, (x, square))
    opcheck(operator, (x.detach(), [None, None, None]))


def test_gradients_are_each_others_operator():
    factors = [None, orthonormal(4, 2), orthonormal(5, 3)]
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    core = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tucker_project(x, factors), x)
    assert torch.autograd.gradgradcheck(lambda x: tucker_project(x, factors), x)
    assert torch.autograd.gradcheck(lambda core: tucker_reconstruct(core, factors), core)


def test_flops_are_those_of_the_shrinking_order():
    x, factors = torch.randn(2, 8, 10), [None, orthonormal(8, 1, torch.float32), orthonormal(10, 5, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        tucker_project(x, factors)
    assert counter.get_total_flops() == 2 * 2 * 8 * 10 * 1 + 2 * 2 * 1 * 10 * 5


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([None], r"factors has 1 entries; expected one a mode of x, whose shape is \(3, 4\)"),
        ([None, torch.randn(5, 2)], r"factors\[1\] has shape \(5, 2\).*\(3, 4\)"),
        ([None, torch.randn(4, 0)], r"factors\[1\] has shape \(4, 0\); expected \(size, rank\)"),
        ([None, torch.randn(4)], r"factors\[1\] has shape \(4,\); expected \(size, rank\)"),
        ([None, torch.ones(4, 2, dtype=torch.int64)], r"factors\[1\] has dtype .*nt64; expected float32"),
        ([None, torch.randn(4, 2, device="meta")], r"factors\[1\] is on meta; expected cpu"),
    ],
)
def test_refuses_factors_that_do_not_fit(factors, message):
    with pytest.raises(RuntimeError, match=message):
        tucker_project(torch.randn(3, 4), factors)


def test_refuses_an_integer_input():
    with pytest.raises(RuntimeError, match=r"x has dtype .*nt64; expected float32"):
        tucker_project(torch.ones(3, 4, dtype=torch.int64), [None, None])


def test_refuses_a_factor_that_wants_a_gradient():
    factor = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="factors require a gradient"):
        tucker_project(torch.randn(3, 4, requires_grad=True), [None, factor])
