"""Frozen batch norm and the ReLU that consumes it: which pairs are found, and that they give what the two give."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lance_kernels.nn.companions import apply_companions
from tests.nn.test_companions import Block, X, assert_close, assert_equal, frozen, gradients


def pad(x: torch.Tensor) -> torch.Tensor:
    """What `torch.fx` cannot trace, beside the `forward` that calls it."""
    return F.pad(x, [int(x.shape[-1]) % 2] * 2)


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU6()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(pad(x)))


def test_finds_pairs_by_their_consumer():
    block = frozen(Block())
    apply_companions(block, "exact")
    assert [(norm is block.norm, relu is block.relu) for norm, relu, _ in block.lance_pairs] == [
        (True, True),
        (False, True),
    ]


def test_result_and_gradients_equal_plain():
    block = frozen(Block())
    expected = gradients(block, X)
    apply_companions(block, "exact")
    assert_close(gradients(block, X), expected, 2e-6)


@pytest.mark.parametrize("which", ["norm", "relu"])
def test_hooks_see_what_they_saw_before(which):
    block = frozen(Block())
    seen = []
    getattr(block, which).register_forward_hook(lambda module, args, result: seen.append(result.clone()))
    expected = gradients(block, X)
    before, seen[:] = list(seen), []
    apply_companions(block, "exact")
    assert_close(gradients(block, X), expected, 2e-6)
    assert len(seen) == len(before)
    for one, other in zip(seen, before):
        torch.testing.assert_close(one, other)


def test_two_consumers_are_no_pair():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(6)
            self.relu = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.relu(y) + y

    model = frozen(Twice())
    expected = gradients(model, X)
    apply_companions(model, "exact")
    assert "lance_pairs" not in vars(model)
    assert_equal(gradients(model, X), expected)


def test_functions_that_a_forward_calls_need_not_be_traceable():
    model = frozen(Padded())
    expected = gradients(model, X)
    apply_companions(model, "exact")
    assert [(norm is model.norm, relu is model.relu, high) for norm, relu, high in model.lance_pairs] == [
        (True, True, 6.0)
    ]
    assert_close(gradients(model, X), expected, 2e-6)


def test_a_forward_that_cannot_be_traced_is_named_with_the_reason():
    class Branching(Padded):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.relu(y) if y.mean() < 9 else y

    model = frozen(nn.Sequential(Branching()))
    expected = gradients(model, X)
    ((name, kind, done),) = (row for row in apply_companions(model, "exact") if row[0] == "0")
    assert (name, kind) == ("0", "Branching")
    assert re.fullmatch(r"functional calls replaced, exact; its batch norms are not fused .* \(.+\)", done)
    assert_equal(gradients(model, X), expected)


def test_a_changed_model_is_an_error():
    model = frozen(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()))
    apply_companions(model, "exact")
    gradients(model, X)
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="did not reach that ReLU"):
        model(X)


def test_trainable_or_training_norms_stay_apart():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU6())
    plain = copy.deepcopy(model)
    apply_companions(model, "exact")
    assert_equal(gradients(model, X), gradients(plain, X))
    assert_equal(gradients(model.eval(), X), gradients(plain.eval(), X))
