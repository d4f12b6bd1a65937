"""The projection and the weight gradients: numbers under the strict interpreter, machine code for GPUs."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lance_kernels.kernels import convolution_weight_grad, linear, tucker
from lance_kernels.ops.convolution import Geometry, output_size
from tests.kernels.compiled import SHARED_MEMORY, Compiled, aligned, compiling_for
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
SAME = Geometry([1, 1], [1, 1], [1, 1], 1)


def test_strict_interpreter_catches_what_it_should():
    assert interpreted("interpreted_strict") == "5 checks"


def test_products_agree_with_float64_under_the_interpreter():
    assert interpreted("interpreted_products") == "7 checks"


def factors_for(shape, ranks):
    return [None if rank is None else torch.zeros(size, rank) for size, rank in zip(shape, ranks)]


def core_for(shape, ranks):
    return torch.zeros([rank or size for size, rank in zip(shape, ranks)], dtype=BF16)


def images(shape, channels_last, offset=0):
    if not channels_last:
        return aligned(tuple(shape), BF16, offset)
    return aligned((shape[0], *shape[2:], shape[1]), BF16, offset).movedim(-1, 1)


def assert_good(compiled: Compiled, row_elements: int) -> None:
    """No spills, enough shared memory, wide loads, and the matrix unit of the GPU."""
    assert compiled.usage["STACK"] == 0, compiled.name
    assert not re.search(r"\b(LDL|STL)\b", compiled.sass), compiled.name
    assert compiled.binary.metadata.shared <= SHARED_MEMORY[compiled.capability]
    assert re.search(r"\bHGMMA\b" if compiled.capability == 90 else r"\bHMMA\b", compiled.sass), compiled.name
    width = min(16, math.gcd(16, row_elements * BF16.itemsize))
    wide = [load for load in compiled.load_bytes if load >= width]
    assert len(wide) >= len(compiled.load_bytes) / 4, (compiled.name, compiled.load_bytes)


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
    stream, reduce = compiled
    assert_good(stream, outputs)
    assert_good(reduce, outputs)


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
        convolution_weight_grad.shifted_sums(grad, core_for(shape, ranks), factors[2:], weight, SAME)
    (kernel,) = compiled
    assert_good(kernel, outputs if channels_last else size[-1])


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
    assert len(compiled) == (7 if capability == 90 else 4)
    for kernel in compiled:
        assert len(kernel.binary.asm["cubin"]) > 0
        assert kernel.binary.metadata.shared <= SHARED_MEMORY[capability]
        if capability == 90:
            assert kernel.usage["STACK"] == 0, kernel.name


def test_ways_of_the_convolution_weight_grad_are_chosen_by_cost():
    for (shape, ranks, outputs), shifts in zip(CONVOLUTIONS, (True, False)):
        core = tuple(rank or size for size, rank in zip(shape, ranks))
        shapes = tuple(None if rank is None else (size, rank) for size, rank in zip(shape, ranks))
        geometry = convolution_weight_grad._hashable(SAME)
        cost = convolution_weight_grad.costs(core, shapes, (outputs, shape[1], 3, 3), geometry, 2)
        assert (cost.shifted < cost.expanded) == shifts
