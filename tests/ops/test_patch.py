"""`patch_project`, `patch_gram_`, `patch_weight_grad` and `patch_convolution` against patches made by a convolution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels.ops import patch_convolution, patch_gram_, patch_project, patch_weight_grad
from lance_kernels.ops.patch import _weight_grad_reference
from tests.csrc.test_cpu_kernels import poisoned
from tests.ops.cases import DTYPES, LAYOUTS, Geometry, assert_near, cast, geometries, lay_out, orthonormal

ops = torch.ops.lance


def patch_size(geometry: Geometry) -> int:
    return math.prod(geometry.weight_size[1:])


def arguments(geometry: Geometry):
    return geometry.kernel, *geometry.arguments, geometry.mode


def patches(geometry: Geometry, x: torch.Tensor) -> torch.Tensor:
    """Every patch as a convolution with unit vectors gives it, `(groups, n, B, *S')`, float64."""
    size = patch_size(geometry)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *geometry.weight_size[1:])
    taken = geometry.convolve(x.double(), unit.repeat(geometry.groups, *[1] * (unit.dim() - 1)), None)
    return taken.movedim(0, 1).unflatten(0, (geometry.groups, size))


def a_factor(geometry: Geometry, rank: int) -> torch.Tensor:
    return torch.stack([orthonormal(patch_size(geometry), rank) for _ in range(geometry.groups)])


def projected(geometry: Geometry, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    core = torch.einsum("gi...,gir->gr...", patches(geometry, x), factor.double())
    return core.flatten(0, 1).movedim(1, 0)


def a_rank(data, geometry: Geometry) -> int:
    return data.draw(st.integers(1, patch_size(geometry)))


dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(LAYOUTS)
GEOMETRY = Geometry(2, 4, (6, 5), 6, (3, 2), [2, 1], [1, 0], [1, 2], 2, "zeros")


@given(data=st.data(), geometry=geometries(), dtype=dtypes, layout=layouts)
def test_project(data, geometry, dtype, layout):
    x = lay_out(torch.randn(geometry.input_size).to(dtype), layout)
    factor = a_factor(geometry, a_rank(data, geometry)).to(data.draw(st.sampled_from((torch.float32, dtype))))
    core = patch_project(x, factor, *arguments(geometry))
    assert core.dtype == dtype
    assert core.is_contiguous()
    assert_near(core, projected(geometry, x, factor), factor=2, terms=patch_size(geometry))


@given(data=st.data(), geometry=geometries(), dtype=dtypes, layout=layouts)
def test_gram(data, geometry, dtype, layout):
    x = lay_out(torch.randn(geometry.input_size).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else data.draw(st.sampled_from((torch.float32, torch.float64)))
    size = patch_size(geometry)
    before = torch.randn(geometry.groups, size, size, dtype=wide)
    gram = before.clone()
    patch_gram_(gram, x, *arguments(geometry))
    columns = patches(geometry, x).flatten(2)
    narrow = gram if dtype == torch.float64 else gram.float()
    assert_near(narrow, before.double() + columns @ columns.mT, factor=10, terms=columns.shape[2])


@given(data=st.data(), geometry=geometries(), dtype=dtypes, layout=layouts)
def test_weight_grad(data, geometry, dtype, layout):
    x = torch.randn(geometry.input_size, dtype=torch.float64)
    factor = a_factor(geometry, a_rank(data, geometry))
    core = projected(geometry, x, factor)
    spatial = [
        None if data.draw(st.booleans()) else orthonormal(size, data.draw(st.integers(1, size)))
        for size in core.shape[2:]
    ]
    for mode, matrix in enumerate(spatial):
        if matrix is not None:
            core = torch.tensordot(core, matrix, dims=([2 + mode], [0])).movedim(-1, 2 + mode)
    core = lay_out(core.to(dtype), layout)
    outputs = [size if f is None else f.shape[0] for size, f in zip(core.shape[2:], spatial)]
    grad = lay_out(torch.randn(geometry.batch, geometry.outputs, *outputs).to(dtype), layout)
    found = patch_weight_grad(grad, core, factor, spatial, geometry.weight_size, geometry.groups)
    expanded = core.double()
    for mode, matrix in enumerate(spatial):
        if matrix is not None:
            expanded = torch.tensordot(expanded, matrix, dims=([2 + mode], [1])).movedim(-1, 2 + mode)
    rows = grad.double().flatten(2).unflatten(1, (geometry.groups, -1))
    columns = expanded.flatten(2).unflatten(1, (geometry.groups, -1))
    expected = torch.einsum("bgop,bgrp,gir->goi", rows, columns, factor).reshape(geometry.weight_size)
    assert found.is_contiguous()
    assert_near(found, expected, factor=4, terms=rows[:, 0, 0].numel())


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_all_directions_give_the_dense_gradient(dimensions):
    geometry = Geometry(
        2, 4, (6, 7, 5)[:dimensions], 6, (3, 2, 2)[:dimensions], [2, 1, 1][:dimensions], [1] * dimensions,
        [1, 2, 1][:dimensions], 2, "zeros",
    )  # fmt: skip
    x = torch.randn(geometry.input_size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(geometry.weight_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(geometry.outputs, dtype=torch.float64, requires_grad=True)
    factor = torch.eye(patch_size(geometry), dtype=torch.float64).repeat(2, 1, 1)
    expected = geometry.convolve(x, weight, bias)
    spatial = [None, *(orthonormal(size, size) for size in expected.shape[3:])]
    y, core = patch_convolution(x, weight, bias, *geometry.arguments, factor, spatial)
    assert torch.equal(y, geometry.convolve(x, weight, bias))
    assert not core.requires_grad
    grad = torch.randn_like(y)
    for mine, dense in zip(
        torch.autograd.grad(y, (x, weight, bias), grad), torch.autograd.grad(expected, (x, weight, bias), grad)
    ):
        assert_near(mine, dense, factor=100)


def test_gradient_lies_in_the_span_of_the_factor():
    x = torch.randn(GEOMETRY.input_size)
    weight = torch.randn(GEOMETRY.weight_size, requires_grad=True)
    factor = a_factor(GEOMETRY, 5).float()
    for bits in (0, 8, 4, 2, 1):
        y, _ = patch_convolution(x, weight, None, *GEOMETRY.arguments, factor, [None, None], bits)
        (grad,) = torch.autograd.grad(y.square().sum(), weight)
        rows = grad.reshape(2, 3, -1)
        assert (rows - rows @ factor @ factor.mT).norm() <= 1e-5 * rows.norm()


def test_packed_cores_give_nearly_the_same_gradient():
    x = torch.randn(GEOMETRY.input_size)
    weight = torch.randn(GEOMETRY.weight_size, requires_grad=True)
    factor = a_factor(GEOMETRY, 5).float()
    spatial = [None, orthonormal(3, 2).float()]
    grads = []
    for bits in (0, 8):
        y, _ = patch_convolution(x, weight, None, *GEOMETRY.arguments, factor, spatial, bits)
        grads.append(torch.autograd.grad(y.square().sum(), weight)[0])
    assert (grads[0] - grads[1]).norm() <= 0.01 * grads[0].norm()


@pytest.mark.parametrize("bits", [0, 8])
def test_a_float16_core_stays_finite(bits):
    x = (torch.rand(1, 3, 128, 128) * 255).half()
    weight = (torch.randn(4, 3, 3, 3) / 100).half().requires_grad_()
    ones = torch.ones(128, 1) / 128**0.5
    factor = torch.cat([torch.ones(27, 1) / 27**0.5, orthonormal(27, 2).float()], 1)[None]
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    y, core = patch_convolution(x, weight, None, *geometry, factor, [ones, ones], bits)
    if not bits:
        assert core.dtype == torch.float16
        assert core.isfinite().all()
    grad = torch.randn(y.shape).half() / 100
    (mine,) = torch.autograd.grad(y, weight, grad)
    wide = weight.detach().double().requires_grad_()
    expected, _ = patch_convolution(x.double(), wide, None, *geometry, factor.double(), [ones.double()] * 2)
    (theirs,) = torch.autograd.grad(expected, wide, grad.double())
    assert (mine.double() - theirs).norm() <= (0.03 if bits else 0.01) * theirs.norm()


def test_projection_is_differentiable_in_x():
    x = torch.randn(GEOMETRY.input_size, dtype=torch.float64, requires_grad=True)
    factor = a_factor(GEOMETRY, 3)
    for mode in ("zeros", "circular"):
        assert gradcheck(lambda x, mode=mode: patch_project(x, factor, GEOMETRY.kernel, *GEOMETRY.arguments, mode), x)


def test_holds_the_core_and_nothing_else_of_the_input():
    x = torch.randn(GEOMETRY.input_size)
    weight = torch.randn(GEOMETRY.weight_size, requires_grad=True)
    factor = a_factor(GEOMETRY, 3).float()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.shape) or t, lambda t: t):
        _, core = patch_convolution(x, weight, None, *GEOMETRY.arguments, factor, [None, None])
    assert sorted(held) == sorted([core.shape, factor.shape])


# Sizes of whole blocks and panels and their neighbours, in every order of memory.
LARGE = [
    (3, 8, (33, 17), 12, (3, 3), [1, 1], [1, 1], [1, 1], 1, 70),
    (2, 40, (9, 40), 49, (3, 2), [2, 1], [0, 2], [1, 2], 1, 13),
    (70, 16, (3, 3), 8, (2, 2), [1, 1], [0, 0], [1, 1], 4, 5),
    (2, 20, (8, 7, 9), 20, (2, 3, 1), [1, 2, 1], [1, 0, 0], [1, 1, 1], 20, 3),
    (5, 33, (600,), 7, (5,), [3], [4], [2], 1, 100),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_compiled_kernels_on_whole_blocks_and_threads(case, dtype, layout):
    *sizes, rank = case
    geometry = Geometry(*sizes, "zeros")
    x = lay_out(torch.randn(geometry.input_size).to(dtype), layout)
    factor = a_factor(geometry, min(rank, patch_size(geometry)))
    for name in ("patch_project", "patch_gram_", "patch_weight_grad"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lance::{name}", "CPU")
    for count in (1, 3):
        with poisoned(count):
            core = patch_project(x, factor, *arguments(geometry))
            gram = torch.zeros(geometry.groups, patch_size(geometry), patch_size(geometry))
            patch_gram_(gram, x, *arguments(geometry))
            grad = lay_out(torch.randn(geometry.batch, geometry.outputs, *core.shape[2:]).to(dtype), layout)
            spatial = [None, *(orthonormal(size, (size + 1) // 2) for size in core.shape[3:])]
            kept = ops.tucker_project(core, [None, None, *spatial])
            weight = patch_weight_grad(grad, kept, factor, spatial, geometry.weight_size, geometry.groups)
        assert_near(core, projected(geometry, x, factor), factor=2, terms=patch_size(geometry))
        columns = patches(geometry, x).flatten(2)
        assert_near(gram, columns @ columns.mT, factor=2, terms=columns.shape[2])
        wide = (grad.double(), kept.double(), factor, spatial, geometry.weight_size, geometry.groups)
        assert_near(weight, _weight_grad_reference(*wide), factor=2, terms=columns.shape[2])


def test_empty_batch():
    geometry = Geometry(0, 4, (6, 5), 6, (3, 2), [1, 1], [0, 0], [1, 1], 2, "zeros")
    x = torch.randn(geometry.input_size)
    factor = a_factor(geometry, 3).float()
    core = patch_project(x, factor, *arguments(geometry))
    assert core.shape == (0, 6, 4, 4)
    gram = torch.ones(2, 12, 12)
    patch_gram_(gram, x, *arguments(geometry))
    assert torch.equal(gram, torch.ones(2, 12, 12))
    grad = patch_weight_grad(torch.randn(0, 6, 4, 4), core, factor, [None, None], geometry.weight_size, 2)
    assert torch.equal(grad, torch.zeros(geometry.weight_size))


def test_opcheck():
    x, factor = torch.randn(GEOMETRY.input_size), a_factor(GEOMETRY, 3).float()
    opcheck(ops.patch_project.default, (x.requires_grad_(), factor, *arguments(GEOMETRY)))
    opcheck(ops.patch_gram_.default, (torch.zeros(2, 12, 12), x.detach(), *arguments(GEOMETRY)))
    core = patch_project(x.detach(), factor, *arguments(GEOMETRY))
    grad, spatial = torch.randn(2, 6, *core.shape[2:]), [None, orthonormal(core.shape[3], 2).float()]
    core = ops.tucker_project(core, [None, None, *spatial])
    opcheck(ops.patch_weight_grad.default, (grad, core, factor, spatial, GEOMETRY.weight_size, 2))
    weight, bias = torch.randn(GEOMETRY.weight_size, requires_grad=True), torch.randn(6, requires_grad=True)
    for bits in (0, 4):
        sample = (x, weight, bias, *GEOMETRY.arguments, factor, spatial, bits)
        opcheck(ops.patch_convolution.default, sample)


def test_compiles_in_one_graph():
    x, weight = torch.randn(GEOMETRY.input_size), torch.randn(GEOMETRY.weight_size, requires_grad=True)
    factor = a_factor(GEOMETRY, 3).float()

    def loss(x, weight):
        return patch_convolution(x, weight, None, *GEOMETRY.arguments, factor, [None, None], 4)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, weight), weight)
    assert_near(torch.autograd.grad(compiled(x, weight), weight)[0], expected)


def test_autocast_takes_the_narrow_dtype():
    x, weight = torch.randn(GEOMETRY.input_size), torch.randn(GEOMETRY.weight_size, requires_grad=True)
    factor = a_factor(GEOMETRY, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        y, core = patch_convolution(x, weight, None, *GEOMETRY.arguments, factor, [None, None])
    assert y.dtype == core.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_flops_are_those_of_the_products():
    x, factor = torch.randn(2, 4, 6, 6), torch.randn(1, 36, 5)
    with FlopCounterMode(display=False) as counter:
        core = patch_project(x, factor, [3, 3], [1, 1], [0, 0], [1, 1], 1)
        assert counter.get_total_flops() == 2 * core.numel() * 36
        patch_gram_(torch.zeros(1, 36, 36), x, [3, 3], [1, 1], [0, 0], [1, 1], 1)
        assert counter.get_total_flops() == 2 * core.numel() * 36 + 2 * 36 * 36 * 2 * 16
        patch_weight_grad(torch.randn(2, 8, 4, 4), core, factor, [None, None], (8, 4, 3, 3), 1)
        more = 2 * 8 * 5 * 2 * 16 + 2 * 8 * 36 * 5
        assert counter.get_total_flops() == 2 * core.numel() * 36 + 2 * 36 * 36 * 2 * 16 + more


def refused(match: str, function, *args):
    with pytest.raises(RuntimeError, match=match):
        function(*args)


def test_refusals_name_the_argument():
    x, factor = torch.randn(GEOMETRY.input_size), a_factor(GEOMETRY, 3).float()
    kernel, stride, padding, dilation, groups, mode = arguments(GEOMETRY)
    rest = (kernel, stride, padding, dilation, groups, mode)
    refused(r"factor has shape \(2, 11, 3\); expected \(2, 12, rank\)", patch_project, x, factor[:, 1:], *rest)
    refused(r"factor has shape \(12, 3\)", patch_project, x, factor[0], *rest)
    refused("groups is 3; expected a divisor of C", patch_project, x, factor, kernel, stride, padding, dilation, 3)
    refused(r"stride is \[2\]", patch_project, x, factor, kernel, [2], padding, dilation, groups)
    refused("larger than the padded input", patch_project, x, factor, [9, 2], stride, padding, dilation, groups)
    refused(r"dilation is", patch_project, x, factor, kernel, stride, padding, [2**63 - 1, 1], groups)
    refused("x has dtype torch.int64", patch_project, x.long(), factor, *rest)
    refused(r"gram has shape \(2, 12, 11\); expected \(2, 12, 12\)", patch_gram_, torch.zeros(2, 12, 11), x, *rest)
    negated = torch.zeros(2, 12, 12, dtype=torch.complex64).conj().imag
    refused(r"expected gram.resolve_neg\(\)", patch_gram_, negated, x, *rest)
    refused(r"gram has strides \[0, 12, 1\]", patch_gram_, torch.zeros(12, 12).expand(2, 12, 12), x, *rest)
    refused(r"gram has dtype torch.float32", patch_gram_, torch.zeros(2, 12, 12), x.double(), *rest)
    core = patch_project(x, factor, *rest)
    grad, size = torch.randn(2, 6, *core.shape[2:]), GEOMETRY.weight_size
    refused(r"grad_output has shape", patch_weight_grad, grad[:1], core, factor, [None, None], size, 2)
    refused(r"core has shape", patch_weight_grad, grad, core[:, :5], factor, [None, None], size, 2)
    refused(r"spatial_factors has 1 entries; expected 2", patch_weight_grad, grad, core, factor, [None], size, 2)
    refused(r"weight_size is", patch_weight_grad, grad, core, factor, [None, None], (5, *size[1:]), 2)
    refused("core is torch.float32", patch_weight_grad, grad.double(), core, factor, [None, None], size, 2)


def test_gradients_are_refused_loudly():
    x, factor = torch.randn(GEOMETRY.input_size, requires_grad=True), a_factor(GEOMETRY, 3).float()
    refused("patch_gram_ has no derivative", patch_gram_, torch.zeros(2, 12, 12), x, *arguments(GEOMETRY))
    refused("factor requires a gradient", patch_project, x, factor.requires_grad_(), *arguments(GEOMETRY))
    weight = torch.randn(GEOMETRY.weight_size, requires_grad=True)
    y, _ = patch_convolution(x, weight, None, *GEOMETRY.arguments, factor.detach(), [None, None])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    refused("differentiable once", grad.sum().backward)


def test_cast_factors_are_read_as_given():
    x, factor = torch.randn(GEOMETRY.input_size), a_factor(GEOMETRY, 3)
    (narrow,) = cast([factor], torch.bfloat16)
    core = patch_project(x, narrow, *arguments(GEOMETRY))
    assert_near(core, projected(GEOMETRY, x, narrow), factor=2)
