"""`compress_`, `revert_` and `exact` change what they say and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lance_kernels as lance


class Subclass(nn.Linear):
    pass


def zoo():
    model = nn.Module()
    model.conv = nn.Conv2d(3, 4, 3)
    model.line = nn.Conv1d(3, 4, 3)
    model.cube = nn.Conv3d(3, 4, 3)
    model.fc = nn.Linear(4, 5)
    model.lazy = nn.LazyLinear(5)
    model.normed = parametrizations.weight_norm(nn.Linear(4, 5))
    model.subclass = Subclass(4, 5)
    model.frozen = nn.Linear(4, 5).requires_grad_(False)
    model.skipped = nn.Linear(4, 5)
    model.filtered = nn.Linear(4, 5)
    model.up = nn.ConvTranspose2d(4, 3, 3)
    model.attention = nn.MultiheadAttention(8, 2)
    model.norm = nn.BatchNorm2d(4)
    return model


def test_summary_names_everything_and_why():
    model = zoo()
    config = lance.LanceConfig(exclude_modules=["skipped"], companions="none")
    summary = lance.compress_(model, config, filter_fn=lambda module, name: name != "filtered")
    assert summary.compressed == {"conv": "Conv2d", "line": "Conv1d", "cube": "Conv3d", "fc": "Linear"}
    expected = {
        "lazy": "lazy",
        "normed": "parametrized",
        "subclass": "Subclass",
        "frozen": "frozen",
        "skipped": "excluded",
        "filtered": "filter_fn",
        "up": "ConvTranspose2d",
        "attention.out_proj": "NonDynamicallyQuantizableLinear",
    }
    assert summary.left.keys() == expected.keys()
    for name, word in expected.items():
        assert word in summary.left[name]
        assert name in str(summary)


def test_target_modules():
    model = zoo()
    summary = lance.compress_(model, lance.LanceConfig(target_modules=["fc", "con."], companions="none"))
    assert set(summary.compressed) == {"conv", "fc"}
    assert summary.left["line"] == "not in target_modules"


def test_a_filter_that_raises_leaves_the_model_plain():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    def refuse_the_last(module, name):
        if name == "2":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        lance.compress_(model, filter_fn=refuse_the_last)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_targets_that_match_nothing_are_told():
    with pytest.warns(UserWarning, match=r"compress_: target_modules is \['nosuch'\], which matches no"):
        lance.compress_(nn.Sequential(nn.Linear(4, 4)), lance.LanceConfig(target_modules=["nosuch"]))


def test_parameters_hooks_and_optimizer_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = dict(model.named_parameters())
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    lance.compress_(model, lance.LanceConfig(companions="none"))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    x = torch.randn(2, 3, 8, 8)
    lance.calibrate(model, [x], progress=False)
    model(x).sum().backward()
    assert len(calls) == 2
    weight = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, model[0].weight)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    lance.compress_(model)
    assert model[1].weight is model[0].weight
    lance.revert_(model)
    assert model[1].weight is model[0].weight


def test_revert_gives_back_plain_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    attributes = [set(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    lance.compress_(model)
    lance.calibrate(model, [torch.randn(2, 3, 8, 8)], progress=False)
    assert lance.revert_(model) is model
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear]
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert list(model.state_dict()) == keys
    lance.revert_(model)


def test_root_layer():
    model = nn.Linear(4, 5)
    assert lance.compress_(model).compressed == {"": "Linear"}
    assert isinstance(model, lance.nn.Linear)
    assert type(lance.revert_(model)) is nn.Linear


def test_exact_is_restored_when_the_body_raises():
    model = nn.Sequential(nn.Linear(4, 5))
    lance.compress_(model)

    def body():
        with lance.exact(model):
            assert model[0].lance_exact
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert not model[0].lance_exact


def test_refusals_leave_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(TypeError, match="config is a dict; expected a LanceConfig"):
        lance.compress_(model, {"energy": 0.5})
    with pytest.raises(TypeError, match=r"model is a list; expected a torch.nn.Module"):
        lance.compress_([model])
    assert type(model[0]) is nn.Linear
    lance.compress_(model)
    with pytest.raises(ValueError, match="compressed layers already"):
        lance.compress_(model)
