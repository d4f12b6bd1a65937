"""`linear` and `linear_weight_grad` against autograd on `x_hat` in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import linear, linear_weight_grad, pack_core, tucker_project, unpack_core
from lance_kernels.ops.linear import kept_factors
from tests.ops.cases import DTYPES, LAYOUTS, approximation, assert_near, cast, dense, factored, lay_out, orthonormal

leading_shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)


@given(
    data=st.data(),
    leading=leading_shapes,
    features=st.integers(1, 9),
    outputs=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
)
def test_weight_grad_is_that_of_the_approximation(data, leading, features, outputs, dtype, layout):
    factors = cast(data.draw(factored((*leading, features))), dtype)
    core = tucker_project(torch.randn(*leading, features).to(dtype), factors)
    grad = lay_out(torch.randn(*leading, outputs).to(dtype), layout)
    expected = grad.double().reshape(-1, outputs).mT @ dense(core, factors, transpose=False).reshape(-1, features)
    actual = linear_weight_grad(grad, core, factors)
    assert actual.dtype == dtype
    assert_near(actual, expected, terms=grad.numel() // outputs)


@given(
    data=st.data(),
    leading=leading_shapes,
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
)
def test_forward_has_the_bits_of_torch_and_gradients_are_right(data, leading, dtype, layout, bias):
    x = lay_out(torch.randn(*leading, 6).to(dtype), layout).requires_grad_()
    weight = torch.randn(5, 6).to(dtype).requires_grad_()
    offset = torch.randn(5).to(dtype).requires_grad_() if bias else None
    factors = data.draw(factored((*leading, 6)))
    y, core = linear(x, weight, offset, factors)
    assert torch.equal(y, F.linear(x, weight, offset))
    assert_near(core, dense(x.detach(), kept_factors(factors, dtype)))
    assert not core.requires_grad
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    assert_near(x.grad, grad.double() @ weight.double())
    x_hat = approximation(x.detach(), factors)
    assert_near(weight.grad, grad.double().reshape(-1, 5).mT @ x_hat.reshape(-1, 6), factor=2, terms=grad.numel())
    if offset is not None:
        assert_near(offset.grad, grad.double().reshape(-1, 5).sum(0), factor=2, terms=grad.numel())


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 3, 2, 6)])
def test_full_rank_is_the_plain_gradient(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    factors = [orthonormal(size, size) for size in shape]
    assert torch.autograd.gradcheck(lambda *args: linear(*args, factors)[0], (x, weight, bias))
    plain = torch.autograd.grad(F.linear(x, weight, bias).sin().sum(), (x, weight, bias))
    ours = torch.autograd.grad(linear(x, weight, bias, factors)[0].sin().sum(), (x, weight, bias))
    for mine, theirs in zip(ours, plain):
        assert_near(mine, theirs, factor=10)


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_packed_core_gives_the_gradient_of_what_it_unpacks_to(bits):
    x, weight = torch.randn(4, 5, 6), torch.randn(3, 6, requires_grad=True)
    factors = [None, orthonormal(5, 2, torch.float32), orthonormal(6, 4, torch.float32)]
    y, packed = linear(x, weight, None, factors, core_bits=bits)
    grad = torch.randn_like(y)
    y.backward(grad)
    core = tucker_project(x, factors)
    assert torch.equal(packed, pack_core(core, bits))
    unpacked = unpack_core(packed, core.shape, bits, torch.float32)
    assert torch.equal(weight.grad, linear_weight_grad(grad, unpacked, factors))


def test_empty_batch_gives_zero_gradients():
    weight = torch.randn(3, 6, requires_grad=True)
    x = torch.randn(0, 5, 6, requires_grad=True)
    y, _ = linear(x, weight, None, [None, orthonormal(5, 2, torch.float32), None])
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 6))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("needs_x", "needs_weight"), [(True, False), (False, True), (True, True)])
def test_keeps_only_what_the_backward_pass_needs(needs_x, needs_weight):
    x = torch.randn(4, 6, requires_grad=needs_x)
    weight = torch.randn(3, 6, requires_grad=needs_weight)
    factors = [None, orthonormal(6, 2, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        _, core = linear(x, weight, None, factors)
    assert x.data_ptr() not in kept
    assert (core.data_ptr() in kept) == needs_weight
    assert (weight.data_ptr() in kept) == needs_x


def test_second_derivative_is_refused_even_for_a_constant_gradient():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    y, _ = linear(x, weight, None, [None, None])
    (grad,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="lance::linear is differentiable once"):
        grad.square().sum().backward()


def test_backward_from_the_core_is_refused():
    _, core = linear(torch.randn(4, 6), torch.randn(3, 6, requires_grad=True), None, [None, None])
    with pytest.raises(RuntimeError, match="does not require grad"):
        core.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_torch_does(dtype):
    x, weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True), torch.randn(3)
    factors = [None, orthonormal(6, 6, torch.float32)]
    with torch.autocast("cpu", dtype):
        y, core = linear(x, weight, bias, factors)
        plain = F.linear(x, weight, bias)
    assert y.dtype == core.dtype == dtype
    assert torch.equal(y, plain)
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("core_bits", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, core_bits):
    x = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(5, 6, dtype=dtype, requires_grad=True), torch.randn(5, dtype=dtype)
    factors = [None, orthonormal(4, 2, dtype), orthonormal(6, 3, dtype)]
    opcheck(torch.ops.lance.linear.default, (x, weight, bias, factors, core_bits))
    grad, core = torch.randn(3, 4, 5, dtype=dtype), torch.randn(3, 2, 3, dtype=dtype)
    opcheck(torch.ops.lance.linear_weight_grad.default, (grad, core, factors))


def test_compiled_graph_shows_the_product():
    weight = torch.randn(5, 6, requires_grad=True)
    factors = [None, orthonormal(6, 3, torch.float32)]
    seen = []

    def backend(graph, inputs):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        lambda x: linear(x.relu(), weight, None, factors)[0], backend=aot_autograd(fw_compiler=backend), fullgraph=True
    )
    x = torch.randn(4, 6, requires_grad=True)
    assert torch.equal(compiled(x), F.linear(x.relu(), weight))
    assert "aten.mm.default" in seen[0]
    assert "lance.tucker_project.default" in seen[0]
    assert "lance.linear.default" not in seen[0]


def test_flops_in_and_below_autograd():
    x, weight = torch.randn(2, 8, 10), torch.randn(6, 10, requires_grad=True)
    factors = [None, None, orthonormal(10, 3, torch.float32)]
    product, project = 2 * 2 * 8 * 10 * 6, 2 * 2 * 8 * 10 * 3
    for context in (torch.enable_grad(), torch.inference_mode()):
        with context, FlopCounterMode(display=False) as counter:
            linear(x, weight, None, factors)
        assert counter.get_total_flops() == product + project
    with FlopCounterMode(display=False) as counter:
        linear_weight_grad(torch.randn(2, 8, 6), torch.randn(2, 8, 3), factors)
    assert counter.get_total_flops() == 2 * 16 * 6 * 3 + 2 * 6 * 3 * 10


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_weight_and_bias_grad_in_one_call(shape):
    grad_output, core, factors = torch.randn(shape), torch.randn(*shape[:-1], 2), [None] * (len(shape) - 1)
    factors.append(orthonormal(6, 2, torch.float32))
    weight_grad, bias_grad = torch.ops.lance.linear_weight_bias_grad(grad_output, core, factors)
    assert torch.equal(weight_grad, linear_weight_grad(grad_output, core, factors))
    assert torch.equal(bias_grad, grad_output.reshape(-1, 4).sum(0))
    opcheck(torch.ops.lance.linear_weight_bias_grad.default, (grad_output, core, factors))


@pytest.mark.parametrize("given", [False, True])
def test_output_may_be_changed_in_place(given):
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(5, 6, requires_grad=True), torch.randn(5)
    factors = [None, None, orthonormal(6, 2)]
    if given:
        y = torch.ops.lance.linear_given_core(x, weight, bias, tucker_project(x, factors), factors)
    else:
        y, _ = linear(x, weight, bias, factors)
    expected = y.detach().relu().sum()
    assert y.relu_().sum() == expected
    y.sum().backward()
    assert weight.grad is not None


def test_batched_gradients():
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(2, 4, requires_grad=True), torch.zeros(2, requires_grad=True)
    y, _ = linear(x, weight, bias, [None, None, orthonormal(4, 2)])
    directions = torch.randn(3, *y.shape)
    for inputs in ([weight, bias], [bias]):
        batched = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
        for i, direction in enumerate(directions):
            for one, all_of_them in zip(torch.autograd.grad(y, inputs, direction, retain_graph=True), batched):
                torch.testing.assert_close(all_of_them[i], one)


def test_refusals():
    x, weight = torch.randn(4, 6), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match=r"weight has shape \(3, 5\); expected \(O, D\)"):
        linear(x, torch.randn(3, 5), None, [None, None])
    with pytest.raises(RuntimeError, match=r"bias has shape \(4,\); expected \(3,\)"):
        linear(x, weight, torch.randn(4), [None, None])
    with pytest.raises(RuntimeError, match=r"weight is torch.float64 on cpu; expected torch.float32 on cpu"):
        linear(x, weight.double(), None, [None, None])
    with pytest.raises(RuntimeError, match=r"factors\[1\] has shape \(5, 2\)"):
        linear(x, weight, None, [None, torch.randn(5, 2)])
    with pytest.raises(RuntimeError, match="bits is 5"):
        linear(x, weight, None, [None, None], core_bits=5)
    with pytest.raises(RuntimeError, match="factors require a gradient"):
        linear(x, weight.requires_grad_(), None, [None, torch.randn(6, 2, requires_grad=True)])
    with pytest.raises(RuntimeError, match=r"grad_output has shape \(5, 3\)"):
        linear_weight_grad(torch.randn(5, 3), torch.randn(4, 6), [None, None])
    with pytest.raises(RuntimeError, match=r"core is torch.float64 on cpu; expected torch.float32"):
        linear_weight_grad(torch.randn(4, 3), torch.randn(4, 6).double(), [None, None])
    with pytest.raises(RuntimeError, match="linear_weight_grad has no derivative"):
        linear_weight_grad(torch.randn(4, 3, requires_grad=True), torch.randn(4, 6), [None, None]).sum().backward()


@pytest.mark.parametrize("lengths", [[5, 1, 0], [-1, 4, 3]])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_lengths_beyond_a_row_are_refused(lengths, requires_grad):
    x, weight = torch.randn(2, 3, 4), torch.randn(4, 4, requires_grad=requires_grad)
    with pytest.raises(RuntimeError, match="expected lengths from 0 to 4"):
        linear(x, weight, None, [None] * 3, 0, torch.tensor(lengths), sum(lengths))
