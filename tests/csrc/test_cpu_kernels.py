"""The C++ kernels of the CPU against the references: odd sizes, ranks, layouts, dtypes, poisoned memory, threads."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lance_kernels
from lance_kernels.ops.convolution import Geometry, check_geometry, output_size
from lance_kernels.ops.convolution_weight_grad import _weight_grad as convolution_reference
from lance_kernels.ops.linear import _weight_grad_reference as linear_reference
from lance_kernels.ops.tucker import _project_reference, _reconstruct_reference
from tests.ops.cases import DTYPES, LAYOUTS, assert_near, lay_out

ops = torch.ops.lance
mode_gram_module = sys.modules["lance_kernels.ops.mode_gram"]
RANKS = [*range(1, 17), 24, 33]
FACTOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# A full vector and its neighbours, more than one row panel, the sizes of real layers.
SIZES = st.sampled_from((1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 49))


@contextmanager
def poisoned(threads: int = 1):
    """Uninitialised tensors hold NaN, and operators run on `threads` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


def exact(tensor, dtype):
    """What a kernel makes of a factor before it multiplies: the accumulation type; then float64 for the reference."""
    return None if tensor is None else tensor.to(torch.float64 if dtype == torch.float64 else torch.float32).double()


def random_factors(sizes, ranks, dtype=torch.float32):
    return [
        None if rank is None else (torch.randn(size, rank) / max(size, 1) ** 0.5).to(dtype)
        for size, rank in zip(sizes, ranks)
    ]


@st.composite
def some_factors(draw, sizes):
    ranks = [draw(st.one_of(st.none(), st.integers(1, 9), st.just(size), st.just(size + 3))) for size in sizes]
    return random_factors(sizes, ranks, draw(st.sampled_from(FACTOR_DTYPES)))


def laid_out(sizes, dtype, layout):
    return lay_out(torch.randn(sizes).to(dtype), layout)


threads = st.sampled_from((1, 2))
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)


def test_the_compiled_library_is_what_runs():
    assert lance_kernels.build_info()["cpu_library"] is not None
    for name in (
        "tucker_project",
        "tucker_reconstruct",
        "mode_gram",
        "mode_grams_",
        "linear_weight_grad",
        "convolution_weight_grad",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lance::{name}", "CPU")


def check_project(x, factors, count=1):
    with poisoned(count):
        core = ops.tucker_project(x, factors)
    assert core.dtype == x.dtype
    assert core.is_contiguous()
    assert_near(core, _project_reference(x.double(), [exact(factor, x.dtype) for factor in factors]), factor=2)


def check_reconstruct(core, factors, count=1):
    with poisoned(count):
        x = ops.tucker_reconstruct(core, factors)
    assert x.dtype == core.dtype
    assert x.is_contiguous()
    assert_near(x, _reconstruct_reference(core.double(), [exact(factor, core.dtype) for factor in factors]), factor=2)


@given(data=st.data(), sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=dtypes, layout=layouts, count=threads)
def test_tucker_project(data, sizes, dtype, layout, count):
    check_project(laid_out(sizes, dtype, layout), data.draw(some_factors(sizes)), count)


@given(data=st.data(), sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=dtypes, layout=layouts, count=threads)
def test_tucker_reconstruct(data, sizes, dtype, layout, count):
    factors = data.draw(some_factors(sizes))
    core = [size if factor is None else factor.shape[1] for size, factor in zip(sizes, factors)]
    check_reconstruct(laid_out(core, dtype, layout), factors, count)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_tucker_of_every_small_rank(rank, layout):
    x = laid_out((3, 33, 17, 19), torch.float32, layout)
    for mode in range(1, 4):
        ranks = [None] * 4
        ranks[mode] = rank
        check_project(x, random_factors(x.shape, ranks))
    check_project(x, random_factors(x.shape, [None, rank, rank, rank]), count=2)
    core = laid_out((3, rank, rank, rank), torch.float32, layout)
    check_reconstruct(core, random_factors((3, 33, 17, 19), [None, rank, rank, rank]), count=2)


def check_grams(x, modes, gram_dtype, count=1):
    before = [torch.randn(x.shape[mode], x.shape[mode], dtype=gram_dtype) for mode in modes]
    expected = [
        gram.double() + mode_gram_module._gram(x.double(), mode, torch.float64) for gram, mode in zip(before, modes)
    ]
    with poisoned(count):
        ops.mode_grams_(before, x, modes)
        alone = [ops.mode_gram(x, mode) for mode in modes]
    terms = max(x.numel() // max(min(x.shape, default=1), 1), 1)
    for mode, running, gram, sum_of_both in zip(modes, before, alone, expected):
        accumulation = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert_near(running.to(accumulation), sum_of_both, terms=terms)
        assert gram.dtype == accumulation
        assert_near(gram, mode_gram_module._gram(x.double(), mode, torch.float64), terms=terms)
        assert torch.equal(gram, gram.mT)


@given(data=st.data(), sizes=st.lists(SIZES, min_size=1, max_size=4), dtype=dtypes, layout=layouts, count=threads)
def test_mode_grams(data, sizes, dtype, layout, count):
    modes = data.draw(st.permutations(range(len(sizes))))[: data.draw(st.integers(1, len(sizes)))]
    wide = dtype == torch.float64 or data.draw(st.booleans())
    check_grams(laid_out(sizes, dtype, layout), list(modes), torch.float64 if wide else torch.float32, count)


@pytest.mark.parametrize("sizes", [(2, 300, 3, 3), (3, 20, 150), (5, 1000), (70, 64, 129), (1, 3, 224, 112)])
def test_grams_of_many_columns_and_many_rows(sizes):
    check_grams(torch.randn(sizes), list(range(len(sizes))), torch.float32, count=2)


def check_linear(grad, core, factors, count=1):
    with poisoned(count):
        actual = ops.linear_weight_grad(grad, core, factors)
    assert actual.dtype == grad.dtype
    assert actual.is_contiguous()
    expected = linear_reference(grad.double(), core.double(), [exact(factor, grad.dtype) for factor in factors])
    assert_near(actual, expected, factor=2, terms=max(grad.numel() // max(grad.shape[-1], 1), 1))


@given(
    data=st.data(),
    leading=st.lists(SIZES, max_size=3),
    outputs=st.sampled_from((1, 3, 16, 33, 65, 200)),
    features=SIZES,
    dtype=dtypes,
    layout=layouts,
    count=threads,
)
def test_linear_weight_grad(data, leading, outputs, features, dtype, layout, count):
    factors = data.draw(some_factors([*leading, features]))
    core = [size if factor is None else factor.shape[1] for size, factor in zip([*leading, features], factors)]
    check_linear(
        laid_out([*leading, outputs], dtype, layout), laid_out(core, dtype, data.draw(layouts)), factors, count
    )


@pytest.mark.parametrize("rank", RANKS)
def test_linear_weight_grad_of_every_small_rank(rank):
    factors = random_factors((3, 29, 35), (None, rank, rank))
    check_linear(torch.randn(3, 29, 70), torch.randn(3, rank, rank), factors, count=2)


@pytest.mark.parametrize("rows", [255, 256, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_weight_grad_of_many_rows(rows, dtype):
    for ranks in ((None, 5), (None, None), (7, None)):
        factors = random_factors((rows, 12), ranks)
        core = [rows if ranks[0] is None else ranks[0], 12 if ranks[1] is None else ranks[1]]
        check_linear(torch.randn(rows, 40).to(dtype), torch.randn(core).to(dtype), factors)


def check_convolution(input_size, weight_size, geometry, factors, dtype, layout="contiguous", count=1, kept=None):
    core = [size if factor is None else factor.shape[1] for size, factor in zip(input_size, factors)]
    core = laid_out(core, dtype, "contiguous" if layout == "expanded" else layout)
    if kept is not None:
        core = core * kept
    grad = laid_out(output_size(input_size, weight_size, geometry), dtype, layout)
    with poisoned(count):
        actual = ops.convolution_weight_grad(grad, core, factors, weight_size, *geometry)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    wide = [exact(factor, dtype) for factor in factors]
    expected = convolution_reference(grad.double(), core.double(), wide, weight_size, geometry)
    assert_near(actual, expected, factor=2, terms=max(grad.numel() // max(grad.shape[1], 1), 1))


@st.composite
def convolutions(draw):
    dimensions = draw(st.sampled_from((1, 2, 2, 3)))
    groups = draw(st.sampled_from((1, 1, 2, 3, 16)))
    weight_size = [groups * draw(st.sampled_from((1, 2, 5, 20))), draw(st.sampled_from((1, 2, 3, 17)))]
    input_size = [draw(st.integers(1, 5)), weight_size[1] * groups]
    stride, padding, dilation = [], [], []
    both_ends = draw(st.booleans())
    for _ in range(dimensions):
        weight_size.append(draw(st.integers(1, 4)))
        stride.append(draw(st.integers(1, 3)))
        dilation.append(draw(st.integers(1, 2)))
        padding += [draw(st.integers(0, 2)) for _ in range(2 if both_ends else 1)]
        least = max(dilation[-1] * (weight_size[-1] - 1) + 1, 3)
        input_size.append(least + draw(st.integers(0, 9 if dimensions < 3 else 2)))
    mode = draw(st.sampled_from(("zeros", "zeros", "reflect", "replicate", "circular")))
    geometry = Geometry.of(stride, padding, dilation, groups, mode)
    check_geometry("convolution_weight_grad", input_size, weight_size, geometry)
    return input_size, weight_size, geometry


def staircase(sizes, share):
    """Ones for so many of a core's values as a plan selects them: fewer channels, the higher the spatial ranks."""
    place = sum(
        torch.arange(1, size + 1).log().view(-1, *[1] * (len(sizes) - 2 - mode)) for mode, size in enumerate(sizes[1:])
    )
    return place <= place.flatten().kthvalue(max(1, int(share * place.numel()))).values


@given(data=st.data(), case=convolutions(), dtype=dtypes, layout=layouts, count=threads)
def test_convolution_weight_grad(data, case, dtype, layout, count):
    factors = data.draw(some_factors(case[0]))
    sizes = [size if factor is None else factor.shape[1] for size, factor in zip(case[0], factors)]
    share, kept = data.draw(st.sampled_from((None, 0.1, 0.5))), None
    # The few products that a handful of values leaves may all but cancel.
    if share is not None and math.prod(sizes) >= 100:
        kept = staircase(sizes, share)
    check_convolution(*case, factors, dtype, layout, count, kept)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
@pytest.mark.parametrize(
    ("sizes", "ranks"), [((70, 4, 4), (70, 4, 4)), ((40, 9, 8), (33, 7, 8)), ((20, 16, 16), (19, 16, 16))]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [None, 5])
def test_convolution_weight_grad_of_selected_values(sizes, ranks, share, layout, batch):
    factors = random_factors((20, *sizes), (batch, *ranks))
    for stride, dtype in ((1, torch.float32), (2, torch.bfloat16)):
        geometry = Geometry.of([stride, 1], [1, 1], [1, 1], 1)
        check_convolution(
            (20, *sizes), (37, sizes[0], 3, 3), geometry, factors, dtype, layout, 2, staircase((20, *ranks), share)
        )


def test_values_that_the_first_sample_lacks_count():
    factors = random_factors((20, 70, 4, 4), (None, 70, 4, 4))
    few, many = staircase((20, 70, 4, 4), 0.05), staircase((20, 70, 4, 4), 0.6)
    others = torch.arange(20).view(-1, 1, 1, 1) > 0
    for first in (few, torch.zeros_like(few)):
        for rest in (many, ~many, torch.zeros_like(many)):
            kept = torch.where(others, rest, first)
            geometry = Geometry.of([1, 1], [1, 1], [1, 1], 1)
            check_convolution((20, 70, 4, 4), (37, 70, 3, 3), geometry, factors, torch.float32, kept=kept)


@pytest.mark.parametrize("rank", RANKS)
def test_convolution_weight_grad_of_every_small_rank(rank):
    geometry = Geometry.of([1, 2], [1, 0], [1, 1], 1)
    for layout, channels in itertools.product(("contiguous", "channels_last"), (40, 7)):
        factors = random_factors((3, channels, 19, 18), (None, rank, rank, rank))
        check_convolution((3, channels, 19, 18), (37, channels, 3, 3), geometry, factors, torch.float32, layout, 2)


# The shifted way wins at small spatial ranks, the expanded one at full ranks; float32 and a 16-bit dtype, whose
# grad_output is converted in pieces.
@pytest.mark.parametrize("ranks", [(None, 8, 3, 3), (None, 4, 28, 28), (None, 4, None, None), (3, 4, 28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [[1, 1], [1, 0, 2, 1]])
def test_convolution_weight_grad_both_ways(ranks, dtype, padding):
    geometry = Geometry.of([1, 1], padding, [1, 1], 1)
    factors = random_factors((6, 24, 28, 28), ranks)
    check_convolution((6, 24, 28, 28), (32, 24, 3, 3), geometry, factors, dtype, count=2)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolution_weight_grad_depthwise(multiplier, stride, layout):
    for padding, dilation, mode in (([1, 1], [1, 1], "zeros"), ([2, 1, 0, 2], [2, 1], "reflect")):
        geometry = Geometry.of([stride, stride], padding, dilation, 40, mode)
        for ranks in ((None, 11, 5, 6), (None, None, 21, 20), (None, 11, None, None), (3, 11, 5, 6)):
            factors = random_factors((4, 40, 21, 20), ranks)
            size = (40 * multiplier, 1, 3, 3)
            check_convolution((4, 40, 21, 20), size, geometry, factors, torch.float32, layout, count=2)


def test_an_empty_batch_gives_zeros():
    factors = random_factors((0, 5, 6, 7), (None, 2, 3, None))
    with poisoned(2):
        assert ops.tucker_project(torch.empty(0, 5, 6, 7), factors).shape == (0, 2, 3, 7)
        assert ops.tucker_reconstruct(torch.empty(0, 2, 3, 7), factors).shape == (0, 5, 6, 7)
        assert torch.equal(ops.mode_gram(torch.empty(0, 5, 6, 7), 1), torch.zeros(5, 5))
        fixed = ops.tucker_project(torch.empty(0, 5), [torch.empty(0, 3), None])
        assert torch.equal(fixed, torch.zeros(3, 5))
        grad = ops.linear_weight_grad(
            torch.empty(0, 4, 9), torch.empty(0, 2, 3), random_factors((0, 4, 6), (None, 2, 3))
        )
        assert torch.equal(grad, torch.zeros(9, 6))
        arguments = ([8, 5, 3, 3], [1, 1], [1, 1], [1, 1], 1, "zeros")
        grad = ops.convolution_weight_grad(torch.empty(0, 8, 6, 7), torch.empty(0, 2, 3, 7), factors, *arguments)
        assert torch.equal(grad, torch.zeros(8, 5, 3, 3))


def results(count):
    """One result of every kernel, large enough that the threads share the work."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 48, 20, 20, generator=generator)
    factors = [None, *(torch.randn(size, rank, generator=generator) for size, rank in ((48, 9), (20, 6), (20, 5)))]
    tokens, output = torch.randn(7, 50, 64, generator=generator), torch.randn(7, 50, 96, generator=generator)
    token_factors = [None, torch.randn(50, 9, generator=generator), torch.randn(64, 11, generator=generator)]
    grad = torch.randn(7, 80, 20, 20, generator=generator)
    torch.set_num_threads(count)
    try:
        core, token_core = ops.tucker_project(x, factors), ops.tucker_project(tokens, token_factors)
        geometry = ([80, 48, 3, 3], [1, 1], [1, 1], [1, 1], 1, "zeros")
        return [
            core,
            token_core,
            ops.tucker_project(x[:1], factors),
            ops.tucker_reconstruct(core, factors),
            *(ops.mode_gram(x, mode) for mode in range(4)),
            ops.linear_weight_grad(output, token_core, token_factors),
            ops.convolution_weight_grad(grad, core, factors, *geometry),
        ]
    finally:
        torch.set_num_threads(1)


def test_results_repeat_and_agree_between_thread_counts():
    alone, together = results(1), results(2)
    for first, second in zip(alone, results(1)):
        assert torch.equal(first, second)
    for first, second in zip(together, results(2)):
        assert torch.equal(first, second)
    for first, second in zip(alone, together):
        assert_near(first, second.double())


@pytest.mark.parametrize(
    ("call", "reference"),
    [
        (lambda run: run(torch.ones(2, 3), [None]), "project"),
        (lambda run: run(torch.ones(2, 3), [None, torch.ones(4, 2)]), "project"),
        (lambda run: run(torch.ones(2, 3), [None, torch.ones(3)]), "project"),
        (lambda run: run(torch.ones(2, 3), [None, torch.ones(3, 0)]), "project"),
        (lambda run: run(torch.ones(2, 3), [None, torch.ones(3, 2, dtype=torch.int64)]), "project"),
        (lambda run: run(torch.ones(2, 3, dtype=torch.int32), [None, torch.ones(3, 2)]), "project"),
        (lambda run: run(torch.ones(2, 3), [None, torch.ones(4, 2)]), "reconstruct"),
        (lambda run: run(torch.ones(2, 3), 2), "gram"),
        (lambda run: run(torch.ones(2, 3, dtype=torch.bool), 0), "gram"),
        (lambda run: run([torch.zeros(3, 3)], torch.ones(2, 3), [1, 0]), "grams"),
        (lambda run: run([torch.zeros(3, 3), torch.zeros(3, 3)], torch.ones(2, 3), [1, -1]), "grams"),
        (lambda run: run([torch.zeros(2, 3)], torch.ones(2, 3), [1]), "grams"),
        (lambda run: run([torch.zeros(3, 3)], torch.ones(2, 3, dtype=torch.float64), [1]), "grams"),
        (lambda run: run([torch.zeros(3, 3, dtype=torch.bfloat16)], torch.ones(2, 3), [1]), "grams"),
        (lambda run: run([torch.zeros(3).expand(3, 3)], torch.ones(2, 3), [1]), "grams"),
        (lambda run: run(torch.ones(2, 3, 4), torch.ones(2, 3), [None, None]), "linear"),
        (lambda run: run(torch.ones(2, 4), torch.ones(3, 3), [None, None]), "linear"),
        (lambda run: run(torch.ones(2, 4), torch.ones(2, 3).double(), [None, None]), "linear"),
        (lambda run: run(torch.ones(2, 3), torch.ones(2, 2), [None, torch.ones(5, 3)]), "linear"),
    ],
)
def test_refusals_say_what_the_reference_says(call, reference):
    pairs = {
        "project": (ops.tucker_project, _project_reference),
        "reconstruct": (ops.tucker_reconstruct, _reconstruct_reference),
        "gram": (ops.mode_gram, mode_gram_module._mode_gram_reference),
        "grams": (ops.mode_grams_, mode_gram_module._mode_grams_reference),
        "linear": (ops.linear_weight_grad, linear_reference),
    }
    compare_refusals(call, *pairs[reference])


def compare_refusals(call, operator, reference):
    with pytest.raises(RuntimeError) as from_reference:
        call(reference)
    with pytest.raises(RuntimeError) as from_kernel:
        call(operator)
    assert str(from_kernel.value).splitlines()[0] == str(from_reference.value)


GOOD = {
    "grad_output": torch.ones(2, 4, 5, 5),
    "core": torch.ones(2, 3, 5, 5),
    "factors": [None] * 4,
    "weight_size": [4, 3, 3, 3],
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "groups": 1,
    "padding_mode": "zeros",
}


@pytest.mark.parametrize(
    "change",
    [
        {"grad_output": torch.ones(2, 4, 5, 6)},
        {"grad_output": torch.ones(2, 4, 5, 5).double()},
        {"factors": [None] * 3},
        {"weight_size": [4, 3, 3]},
        {"weight_size": [4, 2, 3, 3]},
        {"weight_size": [4, 3, 9, 3]},
        {"stride": [0, 1]},
        {"dilation": [1]},
        {"padding": [1, 1, 1]},
        {"padding": [-1, 1]},
        {"padding": [2**62, 1]},
        {"dilation": [2**63 - 1, 1]},
        {"weight_size": [4, 3, 3, 3], "dilation": [2**31 - 1, 1]},
        {"groups": 0},
        {"padding_mode": "mirror"},
        {"padding": [5, 5], "padding_mode": "reflect"},
        {"padding": [6, 6], "padding_mode": "circular"},
    ],
    ids=lambda change: "-".join(change),
)
def test_convolution_refusals_say_what_the_reference_says(change):
    from lance_kernels.ops.convolution_weight_grad import _reference

    arguments = list({**GOOD, **change}.values())
    compare_refusals(lambda run: run(*arguments), ops.convolution_weight_grad, _reference)


@pytest.mark.parametrize("capability", ["avx2", "generic"])
def test_the_other_instruction_sets(capability):
    # In a process of its own, since the choice is made once; malloc fills what the kernels allocate with 0xfe bytes.
    chosen = "every_small_rank or both_ways or selected_values or first_sample or depthwise or many_columns or empty"
    chosen += " or thread_counts"
    environment = {**os.environ, "LANCE_CPU_CAPABILITY": capability, "MALLOC_PERTURB_": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__, "-k", chosen],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
