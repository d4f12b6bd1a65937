"""A learner's state: the same bits after a stop, files that appear whole, refusals that name what does not fit."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import lance_kernels as lance
import lance_kernels.state
from tests.continual_cases import assert_protected, learner_of, network, task, train, weights


def make(factory=network):
    model = factory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    return model, optimizer, learner_of(model, optimizer)


def stopped_and_restarted(model, optimizer, learner, path):
    """Another process's objects, from what these three save."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / "training.pt")
    learner.save(path / "learner.pt")
    others = make()
    saved = torch.load(path / "training.pt", weights_only=True)
    others[0].load_state_dict(saved["model"])
    others[1].load_state_dict(saved["optimizer"])
    others[2].load(path / "learner.pt")
    return others


def whole_run(stops, path):
    """Two tasks of 12 steps each; a stop is a task and a number of its steps, or "end" after it has ended."""
    model, optimizer, learner = make()
    for number in range(2):
        data = task(number)
        learner.begin_task(data)
        for step in range(12):
            if (number, step) in stops:
                model, optimizer, learner = stopped_and_restarted(model, optimizer, learner, path)
            train(model, optimizer, data, 1)
        learner.end_task(data)
        if (number, "end") in stops:
            model, optimizer, learner = stopped_and_restarted(model, optimizer, learner, path)
    return model, learner


def test_a_stop_changes_no_bit(tmp_path):
    model, learner = whole_run([], tmp_path)
    for stops in ([(0, 5)], [(1, 7)], [(0, "end")], [(0, 0), (0, "end"), (1, 3)]):
        other, restarted = whole_run(stops, tmp_path)
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters()):
            assert torch.equal(mine, theirs), (stops, name)
            assert mine.requires_grad == theirs.requires_grad
        assert restarted.capacity() == learner.capacity()
        assert restarted.memory() == learner.memory()
        assert str(restarted.summary()) == str(learner.summary())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(16)
        self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(x)
        return self.out(torch.tanh(self.query(x)) * self.key(x))


def test_shared_factors_and_still_statistics_come_back(tmp_path):
    _, _, learner = make(Shared)
    data = task(0, size=(16,))
    learner.begin_task(data)
    learner.end_task(data)
    learner.begin_task(data)
    learner.save(tmp_path / "learner.pt")
    other, _, restarted = make(Shared)
    restarted.load(tmp_path / "learner.pt")
    assert other.key.lance_source is other.query
    other.train()
    other(data[0][0])
    assert torch.equal(other.norm.running_mean, torch.zeros(16))
    assert not other.norm.weight.requires_grad


def test_a_failing_save_leaves_the_previous_file(tmp_path, monkeypatch):
    _, _, learner = make()
    path = tmp_path / "learner.pt"
    learner.save(path)
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(lance_kernels.state.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        learner.save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["learner.pt"]


def test_states_that_do_not_fit_are_refused_by_name(tmp_path):
    _, _, learner = make()
    learner.begin_task(task(0))
    learner.end_task(task(0))
    state = learner.state_dict()
    _, _, other = make()
    with pytest.raises(ValueError, match="state is no learner's of format 2"):
        other.load_state_dict({"format": 7})
    smaller = copy.deepcopy(state)
    del smaller["protected"]["2"]
    with pytest.raises(ValueError, match=r"layers \['2'\] are protected in the state or in the model, not in both"):
        other.load_state_dict(smaller)
    swapped = copy.deepcopy(state)
    swapped["protected"]["2"] = swapped["protected"]["0"]
    with pytest.raises(ValueError, match=r"layer '2': basis with .* does not fit 2 groups of size 36"):
        other.load_state_dict(swapped)
    bent = copy.deepcopy(state)
    bent["protected"]["0"]["product"] = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"layer '0': product has shape \(1, 2, 3\)"):
        other.load_state_dict(bent)
    assert other.capacity() == make()[2].capacity()
    learner.save(tmp_path / "learner.pt")
    whole = (tmp_path / "learner.pt").read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        (tmp_path / "learner.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no learner's state"):
            other.load(tmp_path / "learner.pt")


def damages(state):
    """A state's copies that lack an entry or have one of another kind, and where; `state` is as before in the end."""
    for parts in ((), ("policy",), ("protected", "0"), ("next_rank",), ("factors", "0")):
        part = functools.reduce(dict.__getitem__, parts, state)
        for key, value in list(part.items()):
            del part[key]
            yield (*parts, key), state
            for other in ("gone", 2.5, {"zz": {}}, torch.full((2, 2), torch.nan), [torch.zeros(7, 9)]):
                part[key] = other
                yield (*parts, key, other), state
            part[key] = value


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # a tensor asked for an entry by name
def test_damaged_states_are_refused_and_change_nothing():
    _, _, learner = make()
    learner.begin_task(task(0))
    learner.end_task(task(0))
    learner.begin_task(task(1))
    model, _, other = make()
    before = str(other.summary()), other.memory()
    for where, damaged in damages(learner.state_dict()):
        with pytest.raises(ValueError, match=r"^NullSpaceLearner\.load_state_dict: "):
            other.load_state_dict(damaged)
        assert (str(other.summary()), other.memory()) == before, where
        assert not any(layer.is_calibrated for layer in other._layers.values()), where
        assert all(parameter.requires_grad for parameter in model.parameters()), where


def test_a_state_of_a_gpu_is_loaded_without_one(tmp_path, monkeypatch):
    _, _, learner = make()
    learner.begin_task(task(0))
    learner.end_task(task(0))
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    learner.save(tmp_path / "learner.pt")
    _, _, other = make()
    other.load(tmp_path / "learner.pt")
    assert other.capacity() == learner.capacity()


def test_a_model_with_a_learner_saves_what_a_plain_one_loads():
    model, _, learner = make()
    learner.begin_task(task(0))
    plain = network()
    with pytest.warns(UserWarning, match=r"dropped .* entries"):
        state = lance.plain_state_dict(model.state_dict())
    plain.load_state_dict(state)
    assert torch.equal(plain[0].weight, model[0].weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_copies_protect_too(copied):
    model, optimizer, learner = make()
    learner.begin_task(task(0))
    train(model, optimizer, task(0), 5)
    learner.end_task(task(0))
    other, another, copy_of = copied((model, optimizer, learner))
    before = weights(copy_of)
    copy_of.begin_task(task(1))
    train(other, another, task(1), 10)
    assert_protected(copy_of, before)
    copy_of.end_task(task(1))
    assert (learner.tasks, copy_of.tasks) == (1, 2)


def test_a_closed_learner_has_no_state():
    _, _, learner = make()
    learner.close()
    with pytest.raises(RuntimeError, match="closed"):
        learner.state_dict()
