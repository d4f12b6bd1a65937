"""Cores of which single values are kept: operators, layers, saved states, and what a plan chooses."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lance_kernels as lance
from lance_kernels._candidates import SelectionCandidate, expected_energies, selection
from lance_kernels._work import Work
from lance_kernels.calibrate import Spectrum
from lance_kernels.ops.linear import core_places
from tests.ops.cases import assert_near, orthonormal


def selected(x: torch.Tensor, factors: list[torch.Tensor | None], lengths: torch.Tensor) -> torch.Tensor:
    """The input that the kept values stand for, by a mask over the whole core."""
    core = torch.ops.lance.tucker_project(x, factors)
    mask = torch.arange(core.shape[-1]) < lengths[..., None]
    return torch.ops.lance.tucker_reconstruct(torch.where(mask, core, 0.0), factors)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_places_are_those_of_a_mask(lengths):
    rows = torch.tensor(lengths)
    mask = torch.arange(5) < rows[:, None]
    assert torch.equal(core_places(rows.int(), int(rows.sum()), 5), mask.flatten().nonzero().flatten())


@pytest.mark.parametrize("spatial", [(7,), (6, 5), (3, 4, 5)])
def test_convolution_gradient_is_that_of_the_kept_values(spatial):
    torch.manual_seed(0)
    x = torch.randn(3, 6, *spatial, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, *[3] * len(spatial), dtype=torch.float64, requires_grad=True)
    factors = [None, orthonormal(6, 4), *(orthonormal(size, size - 1) for size in spatial)]
    ranks = [4, *(size - 1 for size in spatial)]
    lengths = torch.randint(0, ranks[-1] + 1, ranks[:-1], dtype=torch.int32)
    count = int(lengths.sum())
    ones = [1] * len(spatial)
    y, core = torch.ops.lance.convolution(x, weight, None, ones, ones, ones, 2, factors, 0, "zeros", lengths, count)
    assert core.shape == (3, count)
    grad = torch.randn_like(y)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
    expected = convolution(selected(x.detach(), factors, lengths), weight, None, 1, 1, 1, 2)
    assert_near(torch.autograd.grad(y, weight, grad)[0], torch.autograd.grad(expected, weight, grad)[0], factor=10)
    given = torch.ops.lance.convolution_given_core(
        x, weight, None, ones, ones, ones, 2, core, factors, 0, "zeros", lengths, count
    )
    again = torch.ops.lance.convolution(x, weight, None, ones, ones, ones, 2, factors, 0, "zeros", lengths, count)[0]
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, weight), grad) for out in (given, again))):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bits", [0, 4])
def test_opcheck(bits):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    factors = [None, orthonormal(5, 3, torch.float32), orthonormal(6, 4, torch.float32)]
    lengths = torch.tensor([4, 2, 0], dtype=torch.int32)
    args = (x, weight, None, factors, bits, lengths, 6)
    torch.library.opcheck(torch.ops.lance.linear, args)
    core = torch.ops.lance.linear(*args)[1]
    torch.library.opcheck(torch.ops.lance.linear_given_core, (x, weight, None, core, factors, bits, lengths, 6))


@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        (torch.tensor([1, 2]), 3),
        (torch.tensor([1.0, 2.0, 0.0]), 3),
        (torch.tensor([4, 4, 4]), 13),
        (torch.tensor([[1, 2, 0]]), 3),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths, count):
    x, weight = torch.randn(2, 5, 6), torch.randn(4, 6)
    factors = [None, orthonormal(5, 3, torch.float32), orthonormal(6, 4, torch.float32)]
    with pytest.raises(RuntimeError, match=r"core_lengths is .*expected integers of shape \(3,\)"):
        torch.ops.lance.linear(x, weight, None, factors, 0, lengths, count)


@pytest.mark.parametrize("lengths", [[4, 2, 1], [5, 1, 0], [-1, 4, 3]])
def test_lengths_of_another_sum_or_too_long_are_refused(lengths):
    x, weight = torch.randn(2, 5, 6), torch.randn(4, 6)
    factors = [None, orthonormal(5, 3, torch.float32), orthonormal(6, 4, torch.float32)]
    with pytest.raises(RuntimeError):
        torch.ops.lance.linear(x, weight, None, factors, 0, torch.tensor(lengths), 6 if sum(lengths) != 6 else 7)


def spectrum(*sizes: int) -> Spectrum:
    values = [torch.rand(size).sort(descending=True).values for size in sizes]
    return Spectrum((2, *sizes), [None, *values], [None, *(torch.eye(size) for size in sizes)])


@given(count=st.integers(1, 60), seed=st.integers(0, 5))
def test_selection_is_the_largest_values(count, seed):
    torch.manual_seed(seed)
    found = spectrum(4, 5, 3)
    ranks = [None, 4, 5, 3]
    lengths = selection(found, ranks, count)
    energies = expected_energies(found, ranks)
    assert lengths.sum() == count
    kept = energies[torch.arange(3) < lengths[..., None]]
    assert torch.allclose(kept.sum(), energies.flatten().topk(count).values.sum())
    # As much energy as any box of as many values.
    for box in ((4, 5, 3), (2, 2, 2), (1, 5, 2), (4, 1, 1)):
        if box[0] * box[1] * box[2] <= count:
            assert kept.sum() >= energies[: box[0], : box[1], : box[2]].sum() - 1e-12


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.left(x) + self.right(x)
        return self.head(x.flatten(2).mT)


def planned_model(share=0.05, **config):
    torch.manual_seed(0)
    model = Network()
    lance.compress_(model, lance.LanceConfig(companions="none", **config))
    x = torch.randn(4, 6, 8, 8) * torch.linspace(2, 0.1, 8) * torch.linspace(3, 0.1, 6)[:, None, None]
    calibration = lance.calibrate(model, [x], progress=False)
    dense = sum(4 * torch.Size(spectrum.size).numel() for spectrum in calibration.layers.values())
    planned = lance.plan(model, calibration, int(share * dense))
    planned.apply(model, calibration)
    return model, x, planned


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def test_planned_layers_hold_what_the_plan_says():
    model, x, planned = planned_model()
    assert all(layer.count is not None for layer in planned.layers.values())
    report = lance.report(model, x, lambda y: y.square().sum())
    assert report.counted_bytes == planned.bytes
    assert "values=" in repr(model.first)
    assert model.right.lance_source is model.left
    exact = planned_model(share=4.0)[0]
    wide = lance.report(exact, x, lambda y: y.square().sum())
    assert wide.gradient_cosine is not None
    assert wide.gradient_cosine > 0.9999


def test_other_sizes_are_kept_whole():
    model, _, _ = planned_model(core_bits=None)
    large = torch.randn(2, 6, 9, 8)
    with lance.exact(model):
        expected = gradients(model, large)
    ours = gradients(model, large)
    assert [a.shape for a in ours] == [b.shape for b in expected]
    factors = model.first.lance_factors_for(large.shape)
    assert model.first.lance_lengths_for(factors) == (None, 0)
    assert model.first.lance_core_size(large.shape)[2] == 9


def test_states_and_copies_give_the_same_gradients(tmp_path):
    model, x, _ = planned_model()
    expected = gradients(model, x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = Network()
    lance.compress_(other, lance.LanceConfig(companions="none"))
    other.load_state_dict(state)
    whole = torch.load(_saved(model, tmp_path / "model.pt"), weights_only=False)
    for restored in (other, copy.deepcopy(model), whole):
        assert all(torch.equal(a, b) for a, b in zip(gradients(restored, x), expected))
    fresh, _, _ = planned_model(share=0.3)
    fresh.load_state_dict(state)
    assert fresh.first._lance_count == model.first._lance_count
    plain = Network()
    with pytest.warns(UserWarning, match="dropped 16 entries"):
        plain.load_state_dict(lance.plain_state_dict(state))
    lance.revert_(model)
    assert not any("lance" in name for name, _ in model.named_buffers())
    assert type(model.first) is nn.Conv2d
    assert set(model.state_dict()) == set(plain.state_dict())


def _saved(model, path):
    torch.save(model, path)
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lengths: lengths.float(), "expected int32"),
        (lambda lengths: lengths[:-1], "expected int32"),
        (lambda lengths: lengths + 100, "outside 0 to"),
        (lambda lengths: lengths * 0, "keeps no value"),
    ],
)
def test_damaged_lengths_are_refused_and_the_model_stays(damage, message):
    model, x, _ = planned_model()
    expected = gradients(model, x)
    state = model.state_dict()
    state["first.lance_lengths"] = damage(state["first.lance_lengths"])
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), expected))


def test_compiles_without_graph_breaks_and_follows_eager():
    model, x, _ = planned_model()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (x, x[:3]):
        for mine, theirs in zip(gradients(compiled, batch), gradients(model, batch)):
            assert_near(mine, theirs, factor=10)


def test_recalibrating_by_energy_keeps_boxes_again():
    model, x, _ = planned_model()
    lance.calibrate(model, [x], progress=False)
    assert model.first.lance_lengths is None
    assert lance.report(model, x).counted_bytes > 0


def test_rank_multiple_and_most_ranks_bound_the_box():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(70, 4, 1))
    lance.compress_(model, lance.LanceConfig(rank_multiple=16, max_rank=40))
    calibration = lance.calibrate(model, [torch.randn(2, 70, 6, 6)], progress=False)
    planned = lance.plan(model, calibration, 2000)
    assert planned.layers["0"].ranks[1] in (16, 32, 40)
    planned.apply(model, calibration)
    assert lance.report(model, torch.randn(2, 70, 6, 6)).counted_bytes == planned.bytes


@given(data=st.data(), sizes=st.tuples(st.integers(2, 24), st.integers(2, 9), st.integers(2, 9)))
def test_narrowed_ranks_lose_next_to_nothing_for_fewer_operations(data, sizes):
    steep = data.draw(st.floats(0.2, 3.0))
    values = [torch.arange(1, size + 1, dtype=torch.float64).pow(-steep) for size in sizes]
    spectrum = Spectrum(size=(8, *sizes), eigenvalues=[None, *values], eigenvectors=[None] * 4)
    config = lance.LanceConfig()
    work = Work([lance.nn.Conv2d(sizes[0], 3, 3, padding=1)], (8, *sizes))
    candidate = SelectionCandidate("layer", (8, *sizes), 4, (4,), work, config, spectrum=spectrum)
    count = data.draw(st.integers(1, sizes[0] * sizes[1] * sizes[2]))
    planned = candidate.describe(((count, 0), 4))
    box = expected_energies(spectrum, planned.ranks)
    whole = expected_energies(spectrum, [None, *sizes])
    lost, least = (1 - float(energies.flatten().topk(count).values.sum()) for energies in (box, whole))
    assert lost <= 1.02 * least + 1e-9
    lengths = selection(spectrum, [None, *sizes], count)
    used = lengths.nonzero().max(0).values + 1
    widest = [None, *used.tolist(), int(lengths.max())]
    assert all(rank <= most for rank, most in zip(planned.ranks[1:], widest[1:]))
    assert int(selection(spectrum, planned.ranks, count).sum()) == count
