"""Drift of the data away from fixed factors, and recalibration when it is too much."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lance_kernels as lance
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
