"""The projection and the weight gradients: numbers under the strict interpreter, machine code for GPUs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from triton.runtime.autotuner import OutOfResources

from lance_kernels.kernels import _common, convolution_weight_grad, linear, tucker
from lance_kernels.kernels._reduction import MAX_EXPANDED_SPLITS, reduce_and_expand, sum_parts
from lance_kernels.kernels.convolution_weight_grad import convolution_weight_grads
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.convolution_weight_grad import _reference
from lance_kernels.ops.linear import _weight_grad_reference
from lance_kernels.ops.tucker import _project_reference
from tests.kernels.compiled import Compiled, aligned, assert_without_spills, compiling_for
from tests.kernels.programs import interpreted

BF16 = torch.bfloat16
PROJECTIONS = [
    ((128, 1024, 4096), (None, 64, 128), False),
    ((256, 256, 56, 56), (None, 32, 8, 8), False),
    ((256, 256, 56, 56), (None, 32, 8, 8), True),
    ((256, 1024, 14, 14), (None, 64, 4, 4), False),
    ((256, 1024, 14, 14), (None, 64, 4, 4), True),
]
LINEARS = [((128, 1024, 4096), (None, 64, 128), 4096), ((256, 197, 192), (None, 16, 24), 768)]
CONVOLUTIONS = [((128, 256, 28, 28), (None, 32, 6, 6), 256), ((256, 512, 7, 7), (None, 64, 3, 3), 512)]
SAME = Geometry.of([1, 1], [1, 1], [1, 1], 1)


def test_strict_interpreter_catches_what_it_should():
    assert interpreted("interpreted_strict") == "5 checks"


def test_products_agree_with_float64_under_the_interpreter():
    assert interpreted("interpreted_products") == "11 checks"


def factors_for(shape, ranks):
    return [None if rank is None else torch.zeros(size, rank) for size, rank in zip(shape, ranks)]


def core_for(shape, ranks):
    return torch.zeros([rank or size for size, rank in zip(shape, ranks)], dtype=BF16)


def images(shape, channels_last, offset=0):
    if not channels_last:
        return aligned(tuple(shape), BF16, offset)
    return aligned((shape[0], *shape[2:], shape[1]), BF16, offset).movedim(-1, 1)


def assert_good(compiled: Compiled, row_elements: int, streams: bool = True) -> None:
    """No spills, wide loads, and the matrix units; of a kernel that streams, those that Hopper has for long sides."""
    assert compiled.usage["STACK"] == 0, compiled.name
    assert not re.search(r"\b(LDL|STL)\b", compiled.sass), compiled.name
    units = r"\bHGMMA\b" if compiled.capability == 90 and streams else r"\bHG?MMA\b"
    assert re.search(units, compiled.sass), compiled.name
    width = min(16, math.gcd(16, row_elements * BF16.itemsize))
    wide = [load for load in compiled.load_bytes if load >= width]
    assert len(wide) >= len(compiled.load_bytes) / 4, (compiled.name, compiled.load_bytes)


def assert_sums_well(compiled: Compiled) -> None:
    assert compiled.name == "sum_kernel"
    assert_without_spills([compiled], least_bytes=16)
    assert set(compiled.load_bytes) == {16}


@pytest.mark.parametrize(
    ("capability", "shape", "ranks", "channels_last"),
    [(90, *case) for case in PROJECTIONS] + [(80, *case) for case in PROJECTIONS[::3]],
)
def test_projection_compiles_well(capability, shape, ranks, channels_last):
    x = images(shape, channels_last)
    with compiling_for(capability) as compiled:
        tucker.tucker_project(x, factors_for(shape, ranks))
    (kernel,) = compiled
    assert_good(kernel, shape[1] if channels_last else math.prod(shape[2:]))


@pytest.mark.parametrize(
    ("capability", "shape", "ranks", "outputs"), [(90, *LINEARS[0]), (90, *LINEARS[1]), (80, *LINEARS[0])]
)
def test_linear_weight_grad_compiles_well(capability, shape, ranks, outputs):
    grad = aligned((*shape[:-1], outputs), BF16)
    with compiling_for(capability) as compiled:
        linear.linear_weight_bias_grad(grad, core_for(shape, ranks), factors_for(shape, ranks))
    stream, add, reduce = compiled
    assert_good(stream, outputs)
    assert_sums_well(add)
    assert_good(reduce, outputs, streams=False)


@pytest.mark.parametrize(
    ("capability", "shape", "ranks", "outputs", "channels_last"),
    [
        (90, *CONVOLUTIONS[0], False),
        (90, *CONVOLUTIONS[0], True),
        (90, *CONVOLUTIONS[1], False),
        (80, *CONVOLUTIONS[0], False),
        (80, *CONVOLUTIONS[1], True),
    ],
)
def test_convolution_weight_grad_compiles_well(capability, shape, ranks, outputs, channels_last):
    weight = (outputs, shape[1], 3, 3)
    size = output_size(shape, weight, SAME)
    grad, factors = images(size, channels_last), factors_for(shape, ranks)
    with compiling_for(capability) as compiled:
        parts = convolution_weight_grad.shifted_sums(grad, core_for(shape, ranks), factors[2:], weight, SAME)
        reduce_and_expand(parts, factors[1], BF16, taps=(3, 3))
    stream, *add, reduce = compiled
    assert_good(stream, outputs if channels_last else size[-1])
    assert len(add) == (parts.shape[0] > MAX_EXPANDED_SPLITS)
    for kernel in add:
        assert_sums_well(kernel)
    assert_good(reduce, outputs, streams=False)


@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_are_expanded_without_spills(capability):
    """Every padded rank, in one TF32 product and in three, large outputs and small ones."""
    for dtype in (BF16, torch.float32):
        for rank in (16, 64, 128, 256):
            for outputs, features in ((4096, 4096), (768, 192)):
                parts, bias_parts = aligned((1, outputs, rank), torch.float32), aligned((1, outputs), torch.float32)
                with compiling_for(capability) as compiled:
                    reduce_and_expand(parts, torch.zeros(features, rank), dtype, bias_parts)
                assert_without_spills(compiled, least_bytes=8)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("splits", [3, 8, 44])
@pytest.mark.parametrize("elements", [4096 * 128, 1024 * 64, 1008])
def test_sums_compile_well(capability, splits, elements):
    parts, bias_parts = aligned((splits, elements), torch.float32), aligned((splits, 768), torch.float32)
    with compiling_for(capability) as compiled:
        sum_parts(parts, torch.float32, bias_parts, BF16)
        sum_parts(parts, BF16)
    assert len(compiled) == 2
    for kernel in compiled:
        assert_sums_well(kernel)


@pytest.mark.parametrize("capability", [90, 100])
def test_other_launches_compile(capability):
    """A misaligned tensor, the other order of the weight gradient, a kept token mode, float32 and float16."""
    with compiling_for(capability) as compiled:
        shape, ranks = (128, 1024, 4096), (None, 64, 128)
        tucker.tucker_project(aligned(shape, BF16, offset=1), factors_for(shape, ranks))
        for dtype in (torch.float32, torch.float16) if capability == 90 else (torch.float32,):
            small, few = (8, 256, 512), (None, 16, 32)
            tucker.tucker_project(aligned(small, dtype), factors_for(small, few))
        for token in (128, None) if capability == 90 else (128,):
            ranks = (None, token, 64)
            grad = aligned(shape, BF16)
            linear.linear_weight_bias_grad(grad, core_for(shape, ranks), factors_for(shape, ranks))
    projections, gradients = (3, 2) if capability == 90 else (2, 1)
    expected = ["project_kernel", *["project_kernel", "sum_kernel"] * (projections - 1)]
    expected += ["weight_grad_kernel", "sum_kernel", "reduce_kernel"] * gradients
    assert [kernel.name for kernel in compiled] == expected
    for kernel in compiled:
        assert len(kernel.binary.asm["cubin"]) > 0
        if capability == 90:
            assert kernel.usage["STACK"] == 0, kernel.name


@pytest.mark.parametrize("capability", [86, 90])
def test_tiles_fit_the_shared_memory(capability):
    """Shapes whose first tiles do not: pointwise and wide convolutions, float32, ranks near the largest."""
    with compiling_for(capability) as compiled:
        for dtype, shape, ranks, kernel in (
            (BF16, (2, 256, 56, 56), (None, 32, 6, 4), 1),
            (torch.float32, (2, 256, 56, 28), (None, 16, 1, 4), 3),
            (torch.float16, (2, 32, 112, 56), (None, 128, 8, 8), 5),
            (BF16, (2, 3, 28, 7), (None, 3, 2, 1), 7),
        ):
            weight, geometry = (48, shape[1], kernel, kernel), SAME._replace(padding=(kernel // 2,) * 2)
            grad = aligned(output_size(shape, weight, geometry), dtype)
            core, factors = core_for(shape, ranks).to(dtype), factors_for(shape, ranks)
            assert convolution_weight_grad.shifted_sums(grad, core, factors[2:], weight, geometry) is not None
        for dtype in (BF16, torch.float32):
            rank = 100 if dtype == torch.float32 and capability == 86 else 200
            for shape, ranks in (((2, 512, 48), (None, rank, 48)), ((8, 197, 1000), (None, None, rank))):
                core, factors = core_for(shape, ranks).to(dtype), factors_for(shape, ranks)
                grad = aligned((*shape[:2], 64), dtype)
                assert linear.linear_weight_grads(grad, core, factors, with_bias=True) is not None
                tucker.tucker_project(aligned(shape, dtype), factors)
    assert len(compiled) == 4 + 2 * 2 * 4


def test_what_fits_no_gpu_takes_the_reference(monkeypatch):
    monkeypatch.setattr("tests.kernels.compiled.SHARED_MEMORY", {90: 16})
    shape, ranks = (3, 50, 40), (None, 5, 17)
    x, factors, core = torch.randn(shape), factors_for(shape, ranks), torch.randn(3, 5, 17)
    grad = torch.randn(3, 50, 70)
    image, spatial, thin = (
        torch.randn(2, 8, 24, 24),
        factors_for((2, 4, 24, 24), (None, 3, 2, 2)),
        torch.randn(2, 3, 2, 2),
    )
    with compiling_for(90) as compiled:
        projected = tucker.tucker_project(x, factors)
        weight_grad = linear.linear_weight_grad(grad, core, factors)
        found = convolution_weight_grad.convolution_weight_grad(image, thin, spatial, (8, 4, 3, 3), *SAME)
    assert not compiled
    assert torch.equal(projected, _project_reference(x, factors))
    assert torch.equal(weight_grad, _weight_grad_reference(grad, core, factors))
    assert torch.allclose(found, _reference(image, thin, spatial, (8, 4, 3, 3), *SAME), rtol=1e-4, atol=1e-5)


def test_factors_are_rounded_for_tf32_and_kept_apart():
    """Triton's split of float32 into three products needs all bits; what is 16 bits wide stays as it is."""
    factor = torch.rand(20, 5) + 1
    whole, cut = (_common.kronecker([factor], torch.float32, 16, precision) for precision in ("tf32x3", "tf32"))
    assert torch.equal(whole[:, :5], factor)
    assert torch.equal(cut, _common.nearest_tf32(whole))
    assert not torch.equal(cut, whole)
    assert (cut.view(torch.int32) % 2**13 == 0).all()
    narrow = [_common.kronecker([factor], BF16, 16, precision) for precision in ("tf32x3", "tf32")]
    assert narrow[0] is narrow[1]


def test_the_tile_that_fits_is_kept(monkeypatch):
    monkeypatch.setattr(_common, "CHOSEN", {})
    large, small = _common.Tile(128, 64, 8, 3), _common.Tile(16, 16, 4, 2)
    tried = []

    def launch(tile):
        tried.append(tile)
        if tile is large:
            raise OutOfResources(2, 1, "shared memory")
        return tile

    with compiling_for(90):
        for _ in range(2):
            assert _common.launch_fitting("kernel", (1, 2), (BF16,), lambda *_: [large, small], launch) is small
    assert tried == [large, small, small]


@pytest.mark.parametrize(
    ("shape", "ranks", "outputs", "kernel", "channels_last", "way"),
    [
        (*CONVOLUTIONS[0], 3, False, "projected"),
        (*CONVOLUTIONS[0], 3, True, "projected"),
        (*CONVOLUTIONS[1], 3, False, "patches"),
        (*CONVOLUTIONS[1], 3, True, "patches"),
        ((128, 1024, 14, 14), (None, 128, 6, 6), 256, 1, True, "projected"),
        ((128, 64, 56, 56), (None, 16, 8, 8), 64, 3, False, "shifted"),
        ((128, 64, 56, 56), (None, 16, 30, 30), 64, 3, False, "expanded"),
    ],
)
def test_ways_of_the_convolution_weight_grad_are_chosen_by_cost(shape, ranks, outputs, kernel, channels_last, way):
    geometry = SAME._replace(padding=(kernel // 2,) * 2)
    weight = (outputs, shape[1], kernel, kernel)
    grad = images(output_size(shape, weight, geometry), channels_last)
    factors = factors_for(shape, ranks)
    cost = convolution_weight_grad.costs_for(grad, core_for(shape, ranks), factors, weight, geometry)
    assert getattr(cost, way) == min(cost)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("way", ["projected", "patches"])
@pytest.mark.parametrize(("shape", "ranks", "outputs"), CONVOLUTIONS)
def test_ways_around_the_library_compile_well(capability, way, shape, ranks, outputs):
    few = (8, *shape[1:])
    weight = (outputs, shape[1], 3, 3)
    grad, factors = images(output_size(few, weight, SAME), False), factors_for(few, ranks)
    with compiling_for(capability) as compiled:
        convolution_weight_grads(grad, core_for(few, ranks), factors, weight, SAME, True, way)
    assert {"contract_kernel" if way == "projected" else "patches_kernel", "reduce_kernel"} <= {
        kernel.name for kernel in compiled
    }
    assert_without_spills(compiled, least_bytes=2)


@pytest.mark.parametrize("way", ["shifted", "projected", "patches"])
def test_one_of_everything_compiles(way):
    """A compiler takes an argument of one for a constant."""
    shape, ranks, weight = (1, 1, 4, 4), (None, 1, 1, 1), (1, 1, 3, 3)
    grad, factors = images(output_size(shape, weight, SAME), False), factors_for(shape, ranks)
    tokens, few = (1, 1, 1), (None, 1, 1)
    with compiling_for(90) as compiled:
        convolution_weight_grads(grad, core_for(shape, ranks), factors, weight, SAME, True, way)
        linear.linear_weight_bias_grad(aligned(tokens, BF16), core_for(tokens, few), factors_for(tokens, few))
        sum_parts(torch.zeros(3, 1), BF16, torch.zeros(3, 1))
    kernels = [kernel.name for kernel in compiled]
    assert kernels[1:] == ["reduce_kernel", "weight_grad_kernel", "reduce_kernel", "sum_kernel"]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_wide_ranks_are_projected_almost_without_spills(capability, dtype):
    """More than 64 ranks, as many as the cost model leaves to the kernel with their channels, and fewer."""
    for ranks in ((None, 64, 11, 11), (None, 33, 9, 13), (None, 16, 9, 8), (None, 32, 13, 11), (None, 9, 16, 16)):
        shape, weight = (3, 128, 20, 20), (96, 128, 1, 1)
        geometry = SAME._replace(padding=(0, 0))
        grad, factors = aligned(output_size(shape, weight, geometry), dtype), factors_for(shape, ranks)
        core = core_for(shape, ranks).to(dtype)
        assert convolution_weight_grad.costs_for(grad, core, factors, weight, geometry).projected < math.inf
        with compiling_for(capability) as compiled:
            convolution_weight_grads(grad, core, factors, weight, geometry, True, "projected")
        (kernel,) = (kernel for kernel in compiled if kernel.name == "contract_kernel")
        assert kernel.usage["STACK"] <= 8, ranks  # at most two registers
    for ranks in ((None, 65, 8, 9), (None, 33, 12, 12)):
        cost = convolution_weight_grad.costs_for(
            grad, core_for(shape, ranks).to(dtype), factors_for(shape, ranks), weight, geometry
        )
        assert cost.projected == math.inf


def test_modes_beyond_32_bits_take_the_reference():
    far = tucker.MAX_EXTENT
    assert tucker.plan((far, 64), (64, 1), (None, 8)) is not None
    assert tucker.plan((far + 1, 64), (64, 1), (None, 8)) is None
