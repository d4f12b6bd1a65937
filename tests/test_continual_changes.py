"""Weights that change where a learner does not see it: between tasks, in others' steps, by rounding, to NaN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.continual_cases import assert_protected, learner_of, network, task, train, weights

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2e-2}
CHANGED = "since the last task, weights changed along protected directions in"


def data_of(number, dtype=torch.float32):
    return [(images.to(dtype), labels) for images, labels in task(number)]


def after_one_task(dtype=torch.float32):
    """A model, its optimizer and learner after a task, and the weights it had in the middle."""
    model = network().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1, eps=1e-4)
    learner = learner_of(model, optimizer)
    data = data_of(0, dtype)
    learner.begin_task(data)
    train(model, optimizer, data, 5)
    middle = copy.deepcopy(model.state_dict())
    train(model, optimizer, data, 5)
    learner.end_task(data)
    return model, optimizer, learner, middle


def load(model, state):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(state[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_loaded_between_tasks_are_kept(dtype):
    model, optimizer, learner, middle = after_one_task(dtype)
    load(model, middle)
    data = data_of(1, dtype)
    with pytest.warns(UserWarning, match=CHANGED):
        learner.begin_task(data)
    before = weights(learner)
    train(model, optimizer, data, 20)
    assert_protected(learner, before, TOLERANCES[dtype])
    learner.end_task(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_that_are_seen_are_no_change(dtype, recwarn):
    model, optimizer, learner, _ = after_one_task(dtype)
    before = weights(learner)
    for number in (1, 2):
        data = data_of(number, dtype)
        learner.begin_task(data)
        train(model, optimizer, data, 10)
        learner.end_task(data)
    assert_protected(learner, before, 1.0)
    assert not [caught for caught in recwarn if CHANGED in str(caught.message)]
    assert learner.tasks == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_that_are_not_seen_are_found_at_the_end(dtype):
    model, _, learner, _ = after_one_task(dtype)
    data = data_of(1, dtype)
    learner.begin_task(data)
    later = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.1, eps=1e-4)
    train(model, later, data, 20)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"weights changed along protected directions in .*use_optimizer"):
            learner.end_task(data)
    assert (learner.tasks, learner.in_task) == (1, True)
    learner.use_optimizer(later)
    train(model, later, data, 1)
    learner.end_task(data)


def test_averaged_weights_are_brought_back_by_their_roundings():
    model, optimizer, learner, _ = after_one_task()
    before, data = weights(learner), data_of(1)
    bases = {name: [p.basis.dense(group) for group in range(p.groups)] for name, p in learner._protected.items()}
    learner.begin_task(data)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    for _ in range(20):
        train(model, optimizer, data, 1)
        for _ in range(100):
            average.update_parameters(model)
    load(model, dict(average.module.named_parameters()))
    learner.end_task(data)
    for name, weight in weights(learner).items():
        change = (weight - before[name]).flatten(1).chunk(len(bases[name]))
        along = torch.stack([(part @ basis).norm() for part, basis in zip(change, bases[name])]).norm()
        assert along <= 1e-6 * weight.norm(), name


def test_frozen_weights_are_looked_at_too():
    model, optimizer, learner, middle = after_one_task()
    model[7].weight.requires_grad_(False)
    load(model, middle)
    with pytest.warns(UserWarning, match=CHANGED):
        learner.begin_task(data_of(1))
    kept = model[7].weight.detach().clone()
    model[7].weight.requires_grad_(True)
    before = weights(learner)
    train(model, optimizer, data_of(1), 20)
    assert_protected(learner, before)
    assert not torch.equal(model[7].weight, kept)


def test_weights_that_are_no_numbers_are_named_and_not_remembered():
    model, optimizer, learner, _ = after_one_task()
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[7].weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="layer '7': its weight holds NaN or infinity"):
        learner.begin_task(data_of(1))
    load(model, good)
    before = weights(learner)
    learner.begin_task(data_of(1))
    train(model, optimizer, data_of(1), 10)
    assert_protected(learner, before)


def test_weights_of_zeros_stay_zeros():
    model = network()
    nn.init.zeros_(model[9].weight)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    learner = learner_of(model, optimizer)
    model[9].weight.requires_grad_(False)
    for number in range(2):
        learner.begin_task(data_of(number))
        train(model, optimizer, data_of(number), 3)
        learner.end_task(data_of(number))
    assert learner._protected["9"].product is not None
    assert not model[9].weight.any()


def test_a_state_without_the_models_is_refused():
    model, _, learner, _ = after_one_task()
    other = network()
    optimizer = torch.optim.AdamW(other.parameters(), 3e-3)
    later = learner_of(other, optimizer)
    later.load_state_dict(learner.state_dict())
    with pytest.raises(RuntimeError, match="weights are not those of the state that was loaded in 0, 2, 4, 7, 9"):
        later.begin_task(data_of(1))
    load(other, model.state_dict())
    before = weights(later)
    later.begin_task(data_of(1))
    train(other, optimizer, data_of(1), 20)
    assert_protected(later, before)


def test_a_state_counts_as_loaded_until_its_task_has_ended():
    model, optimizer, learner, _ = after_one_task()
    learner.begin_task(data_of(1))
    learner.load_state_dict(learner.state_dict())
    train(model, optimizer, data_of(1), 5)
    middle = copy.deepcopy(model.state_dict())
    train(model, optimizer, data_of(1), 5)
    learner.end_task(data_of(1))
    load(model, middle)
    with pytest.warns(UserWarning, match=CHANGED):
        learner.begin_task(data_of(2))


def test_shallow_copies_are_refused():
    _, _, learner, _ = after_one_task()
    with pytest.raises(TypeError, match=r"use copy\.deepcopy"):
        copy.copy(learner)
