"""Drift of the data away from fixed factors, and recalibration when it is too much."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lance_kernels as lance
from lance_kernels.continual.layers import PatchFactors, keep_patches_
from tests.ops.cases import assert_near


def low_rank(direction, count=16):
    """Rows along one coordinate of eight, with a little of everything."""
    x = 0.1 * torch.randn(count, 8)
    x[:, direction] += torch.randn(count)
    return x


def prepared(every=1):
    model = nn.Sequential(nn.Linear(8, 3))
    lance.compress_(model, lance.LanceConfig(rank_pattern={"0": (None, 1)}, core_bits=None))
    lance.calibrate(model, [low_rank(0) for _ in range(4)], progress=False)
    lance.track_drift(model, every)
    return model


def test_kept_energy_is_the_cores_share():
    model = prepared()
    x = low_rank(0)
    model(x).sum().backward()
    factor = model[0].factors[1]
    expected = (x @ factor).square().sum() / x.square().sum()
    entry = lance.drift(model)["0"]
    assert_near(torch.tensor(entry.kept), expected)
    assert entry.modes[0] is None
    assert_near(torch.tensor(entry.modes[1]), expected)
    assert entry.ratio == pytest.approx(1.0)
    assert entry.inputs == 1


def test_values_that_a_plan_leaves_out_are_not_kept():
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))
    lance.compress_(model, lance.LanceConfig(budget_bytes=2000))
    x = torch.randn(16, 8, 10, 10)
    lance.calibrate(model, [x], progress=False)
    lance.track_drift(model, every=1)
    model(x).sum().backward()
    core = torch.einsum("bchw,ci,hj,wk->bijk", x, *model[0].factors[1:])
    kept = core[:, torch.arange(core.shape[-1]) < model[0].lance_lengths[..., None]]
    assert_near(torch.tensor(lance.drift(model)["0"].kept), kept.square().sum() / x.square().sum(), factor=10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_input_that_is_not_finite_and_a_report_are_not_looked_at(bad):
    model = prepared()
    model(low_rank(0))
    before = lance.drift(model)["0"]
    model(torch.full((4, 8), bad))
    lance.report(model, low_rank(5))
    assert lance.drift(model)["0"] == before


def test_cores_of_patches_are_looked_at():
    model = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    lance.compress_(model, lance.LanceConfig(core_bits=None))
    keep_patches_(model)
    factor = torch.linalg.qr(torch.randn(2, 18, 5))[0]
    spatial = torch.linalg.qr(torch.randn(7, 3))[0]
    model.set_patch_factors(PatchFactors(factor, [spatial, None]))
    lance.track_drift(model, every=1)
    x = torch.randn(3, 4, 7, 7)
    model(x).sum().backward()
    patches = nn.functional.unfold(x, 3, padding=1).view(3, 2, 18, 7, 7)
    projected = torch.einsum("bgphw,gpr->bgrhw", patches, factor)
    core = torch.einsum("bgrhw,hk->bgrkw", projected, spatial)
    entry, total = lance.drift(model)[""], patches.square().sum()
    assert_near(torch.tensor(entry.kept), core.square().sum() / total, factor=10)
    assert_near(torch.tensor(entry.modes[1]), projected.square().sum() / total, factor=10)
    assert_near(torch.tensor(entry.modes[2]), core.square().sum() / projected.square().sum(), factor=10)
    assert (entry.modes[0], entry.modes[3], entry.inputs) == (None, None, 1)


def test_data_that_turns_away_shows_and_recalibration_mends_it():
    model = prepared()
    recalibrate = lance.RecalibrateOnDrift(model, [low_rank(5)], threshold=0.8, every=1, progress=False)
    for _ in range(5):
        model(low_rank(0))
    assert recalibrate() is None
    before = model[0].factors[1].clone()
    for _ in range(3):
        model(low_rank(5))
    assert lance.drift(model)["0"].ratio < 0.5
    assert recalibrate() is not None
    assert not torch.equal(model[0].factors[1], before)
    for _ in range(3):
        model(low_rank(5))
    assert lance.drift(model)["0"].ratio == pytest.approx(1.0, abs=0.1)


def test_looks_at_one_input_in_so_many_and_at_none_without_gradients():
    model = prepared(every=3)
    for _ in range(7):
        model(low_rank(0))
    with torch.no_grad():
        for _ in range(7):
            model(low_rank(0))
    assert lance.drift(model, reset=True)["0"].inputs == 3
    assert lance.drift(model)["0"].kept is None
    assert lance.drift(model)["0"].first is not None


def test_copies_keep_their_own_count():
    model = prepared()
    other = copy.deepcopy(model)
    other(low_rank(0))
    assert lance.drift(other)["0"].inputs == 1
    assert lance.drift(model)["0"].inputs == 0


def test_ends_with_stop_or_revert():
    model = prepared()
    lance.stop_tracking(model)
    assert not model[0]._forward_pre_hooks
    with pytest.raises(ValueError, match="no layer is tracked"):
        lance.drift(model)
    model = prepared()
    lance.revert_(model)
    model(low_rank(0))
    assert not model[0]._forward_pre_hooks


def test_refusals():
    with pytest.raises(ValueError, match="no compressed layers"):
        lance.track_drift(nn.Linear(3, 3))
    model = prepared()
    with pytest.raises(ValueError, match="every is 0"):
        lance.track_drift(model, 0)
    with pytest.raises(ValueError, match="threshold is 2"):
        lance.RecalibrateOnDrift(model, [], threshold=2)
