"""Every error and warning of docs/errors.md, raised."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lance_kernels as lance
from lance_kernels.distributed import Ranks

PAGE = Path(__file__).parent.parent / "docs" / "errors.md"
MESSAGES = re.findall(r"^\| `([^`]+)`", PAGE.read_text(), re.MULTILINE)


def compressed(**config):
    model = nn.Sequential(nn.Linear(6, 3))
    lance.compress_(model, lance.LanceConfig(**config))
    return model


def calibrated(**config):
    model = compressed(**config)
    return model, lance.calibrate(model, [torch.randn(9, 6)], progress=False)


def other_rank_failed():
    ranks = Ranks()
    ranks.together, ranks.count = True, 2
    said = [(None, 0), ("OSError: disk gone", None)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributed, "all_gather_object", lambda into, mine, group: into.__setitem__(slice(None), said)
        )
        ranks.exchange(0)


def uncalled():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)})
    lance.compress_(model)
    lance.calibrate(model, [torch.randn(2, 6)], forward_fn=lambda model, x: model["used"](x), progress=False)


def foreign_calibration():
    calibrated()[1].apply(nn.ModuleDict({"other": compressed()}))


def damaged_calibration(folder):
    (folder / "file").write_text("no")
    lance.Calibration.load(folder / "file")


def hostile_state():
    model, _ = calibrated(energy=0.5)
    model.load_state_dict({**model.state_dict(), "0.lance_factor_1of2": torch.zeros(6, 2)})


def second_derivative():
    model, _ = calibrated()
    (grad,) = torch.autograd.grad(model(torch.randn(9, 6)).square().sum(), model[0].weight, create_graph=True)
    grad.sum().backward()


def twice():
    lance.compress_(compressed())


def once_only():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    lance.compress_(model)
    lance.calibrate(model, iter([torch.randn(9, 6)]), max_bytes=1, progress=False)


def batches(value=1.0):
    return [torch.full((4, 6), value)]


def learner(model=None, **arguments):
    model = nn.Linear(6, 3) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lance.continual.NullSpaceLearner(model, optimizer, **{"progress": False, **arguments})


def tasks(*calls, closed=False, **arguments):
    made = learner(**arguments)
    if closed:
        made.close()
    for call in calls:
        getattr(made, call)([torch.randn(9, 6)])


class DTensor(torch.Tensor):
    """Has the name by which a sharded tensor is known."""


def foreign_weights():
    one, other = learner(energy=0.5), learner(energy=0.5)
    one.begin_task(batches())
    one.end_task(batches())
    other.load_state_dict(one.state_dict())
    other.begin_task(batches())


def changed(in_task=False):
    one = learner(energy=0.5)
    one.begin_task(batches())
    one.end_task(batches())
    if in_task:
        one.begin_task(batches())
    with torch.no_grad():
        one.model.weight.mul_(2)
    (one.end_task if in_task else one.begin_task)(batches())


def sharded():
    model = nn.Linear(6, 3)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(DTensor))
    learner(model)


def unreached():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)})
    model.forward = lambda x: model["used"](x)
    learner(model).begin_task(batches())


def unrelated():
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)


def replaced():
    model = nn.Sequential(nn.Linear(6, 3))
    made = learner(model)
    model[0] = nn.Linear(6, 4)
    made.begin_task(batches())


def damaged_learner(folder):
    (folder / "file").write_text("no")
    learner().load(folder / "file")


CASES = {
    "LanceConfig: ": lambda: lance.LanceConfig(energy=2.0),
    "rank_pattern gives ": lambda: calibrated(rank_pattern={"0": (1, 2, 3)}),
    "compress_: model is a ": lambda: lance.compress_(3),
    "compress_: config is a ": lambda: lance.compress_(nn.Linear(2, 2), 3),
    "compress_: model has compressed layers already": twice,
    "compress_: target_modules is ": lambda: compressed(target_modules=["nosuch"]),
    "calibrate: model has no compressed layers": lambda: lance.calibrate(nn.Linear(6, 3), batches()),
    "calibrate: max_bytes is ": lambda: lance.calibrate(compressed(), batches(), max_bytes=0),
    "calibrate: max_batches is ": lambda: lance.calibrate(compressed(), batches(), max_batches=0),
    "calibrate: loader gave no batch": lambda: lance.calibrate(compressed(), [], progress=False),
    "calibrate: the Gram matrices of this model exceed max_bytes": once_only,
    "calibrate: layer ": lambda: lance.calibrate(compressed(), batches(torch.nan), progress=False),
    "calibrate: rank ": other_rank_failed,
    "calibrate: no batch reached ": uncalled,
    "Calibration.apply: model has no compressed layers ": foreign_calibration,
    "Calibration.load: ": damaged_calibration,
    "plan: ": lambda: calibrated(budget_bytes=1),
    "report: ": lambda: lance.report(nn.Linear(6, 3).requires_grad_(False), batches()[0]),
    "track_drift: every is ": lambda: lance.track_drift(compressed(), 0),
    "track_drift: model has no compressed layers": lambda: lance.track_drift(nn.Linear(6, 3)),
    "drift: no layer is tracked": lambda: lance.drift(compressed()),
    "RecalibrateOnDrift: threshold is ": lambda: lance.RecalibrateOnDrift(compressed(), [], threshold=2.0),
    "lance_kernels: this state does not fit the model": hostile_state,
    "plain_state_dict: dropped ": lambda: lance.plain_state_dict(calibrated()[0].state_dict()),
    "lance_kernels: torch.func transforms": lambda: torch.func.vmap(calibrated()[0])(torch.randn(2, 9, 6)),
    "NullSpaceLearner: energy is ": lambda: learner(energy=2.0),
    "NullSpaceLearner: optimizer is a ": lambda: lance.continual.NullSpaceLearner(nn.Linear(6, 3), 3),
    "NullSpaceLearner: config is a ": lambda: learner(config=3),
    "NullSpaceLearner: config.budget_bytes is ": lambda: learner(config=lance.LanceConfig(budget_bytes=9)),
    "NullSpaceLearner: model has no trainable linear or convolution layer": lambda: learner(nn.Bilinear(6, 6, 3)),
    "NullSpaceLearner: the parameter ": sharded,
    "NullSpaceLearner: no optimizer holds the weights of ": lambda: learner().use_optimizer(unrelated()),
    "NullSpaceLearner: another module is in the place of ": replaced,
    "NullSpaceLearner.begin_task: a task has begun": lambda: tasks("begin_task", "begin_task"),
    "NullSpaceLearner.end_task: no task has begun": lambda: tasks("end_task"),
    "NullSpaceLearner.drop_task: no task has begun": lambda: learner().drop_task(),
    "NullSpaceLearner: loader gave no batch": lambda: learner().begin_task([]),
    "NullSpaceLearner: layer ": lambda: learner().begin_task(batches(torch.nan)),
    "NullSpaceLearner: closed": lambda: tasks("begin_task", closed=True),
    "NullSpaceLearner: no batch reached ": unreached,
    "NullSpaceLearner: no direction is free in ": lambda: tasks("begin_task", "end_task", energy=1.0),
    "NullSpaceLearner: since the last task, weights changed along protected directions in ": changed,
    "NullSpaceLearner.end_task: weights changed along protected directions in ": lambda: changed(in_task=True),
    "NullSpaceLearner.begin_task: weights are not those of the state that was loaded": foreign_weights,
    "NullSpaceLearner.load_state_dict: ": lambda: learner().load_state_dict({}),
    "NullSpaceLearner.load: ": damaged_learner,
    "lance::linear is differentiable once": second_derivative,
    "lance::linear: ": lambda: lance.ops.linear(torch.randn(2, 6), torch.randn(3, 5), None, [None, None]),
}


def test_the_page_lists_what_is_raised():
    assert list(CASES) == MESSAGES


@pytest.mark.parametrize("message", CASES)
def test_raises(message, tmp_path):
    arguments = (tmp_path,) if message.endswith(".load: ") else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises((ValueError, TypeError, RuntimeError, UserWarning), match=re.escape(message)) as caught:
            CASES[message](*arguments)
    assert str(caught.value).startswith(message)
