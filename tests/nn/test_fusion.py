"""Frozen batch norm and the ReLU that consumes it: which pairs are found, and that they give what the two give."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lance_kernels import ops
from lance_kernels.nn.companions import apply_companions
from tests.nn.test_companions import Block, X, assert_close, assert_equal, frozen, gradients


@pytest.fixture
def fused(monkeypatch):
    """The ReLUs' bounds of the pairs that ran."""
    bounds = []
    run = ops.batch_norm_relu_frozen
    monkeypatch.setattr(ops, "batch_norm_relu_frozen", lambda *args: bounds.append(args[-1]) or run(*args))
    return bounds


def pairs(*bounds):
    """The pairs that are found, where Python says which call of a line runs."""
    return list(bounds) if sys.version_info >= (3, 11) else []


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.flag = nn.BatchNorm2d(6), nn.ReLU(), False
        self.relu6 = nn.ReLU6()


def test_finds_pairs_by_their_consumer(fused):
    class Forms(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu6(self.norm(x)) + F.relu(self.norm(x), inplace=True) + self.norm(x).relu()
            if self.norm is not None:
                x = self.norm(x)
            if self.relu is not None:
                x = self.relu(x)
            return self.last(x)

        def last(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return torch.relu(x)

    model = frozen(Forms())
    expected = gradients(model, X)
    apply_companions(model, "exact")
    assert_close(gradients(model, X), expected, 2e-6)
    assert fused == pairs(6.0, None, None, None, None)


def test_result_and_gradients_equal_plain(fused):
    block = frozen(Block())
    expected = gradients(block, X)
    apply_companions(block, "exact")
    assert_close(gradients(block, X), expected, 2e-6)
    assert fused == pairs(None, None)


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


class Twice(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.relu(y) + y


class Flag(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        z = F.relu(y)
        return z + y if self.flag else z


class Skipping(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if not self.flag:
            y = self.relu(y)
        return y


class Elsewhere(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(x)) + self.plain(x) if self.flag else self.plain(x)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Mapping(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(sum(map(self.norm, (x, x - 1))))


class Remembering(Norm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def remembered() -> torch.Tensor:
            return y

        try:
            y = self.norm(x)
            return self.relu(y)
        finally:
            self.kept = remembered()


@pytest.mark.parametrize("kind", [Twice, Flag, Skipping, Elsewhere, Mapping, Remembering])
def test_what_something_else_may_read_is_no_pair(kind):
    model = frozen(kind())
    plain = copy.deepcopy(model)
    apply_companions(model, "exact")
    for flag in (False, True):
        model.flag = plain.flag = flag
        assert_close(gradients(model, X), gradients(plain, X), 2e-6)
        assert getattr(model, "kept", X).min() < 0


def test_a_changed_model_gives_what_it_says(fused):
    model = frozen(nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()))
    apply_companions(model, "exact")
    gradients(model, X)
    assert fused == [None]
    model[2] = nn.Identity()
    assert model(X).min() < 0
    model[2] = model[1]
    assert torch.equal(model(X), model[1](model[1](model[0](X))))


def test_no_forward_runs_while_companions_are_applied():
    class Counting(Norm):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls, self.seen = self.calls + 1, x
            return self.relu(self.norm(x))

    model = Counting()
    state = torch.get_rng_state()
    apply_companions(model, "exact")
    assert model.calls == 0
    assert not hasattr(model, "seen")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_edited_since_its_import_is_not_read(tmp_path, fused):
    text = "def forward(self, x):\n    x = self.norm(x)\n    x = self.{}(x)\n    return x\n"
    for name, count in (("relu6", 1), ("relu", 0)):
        scope = {}
        file = tmp_path / f"{name}.py"
        file.write_text(text.format("relu"))
        exec(compile(text.format(name if count else "norm"), file, "exec"), scope)
        if count:
            file.write_text(text.format(name))
        model = frozen(type("Model", (Norm,), {"forward": scope["forward"]})())
        expected = gradients(model, X)
        apply_companions(model, "exact")
        assert_close(gradients(model, X), expected, 2e-6)
    assert fused == pairs(6.0)


def test_checkpointed_functions(fused):
    class Checkpointed(Norm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def inner(x: torch.Tensor) -> torch.Tensor:
                return F.relu(self.norm(x))

            return checkpoint(inner, x, use_reentrant=False) if self.flag else inner(x)

    model = frozen(Checkpointed())
    expected = gradients(model, X)
    apply_companions(model, "exact")
    model.flag = True
    assert_close(gradients(model, X), expected, 2e-6)
    assert fused == pairs(None, None)


def test_trainable_or_training_norms_stay_apart():
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU6())
    plain = copy.deepcopy(model)
    apply_companions(model, "exact")
    assert_equal(gradients(model, X), gradients(plain, X))
    assert_equal(gradients(model.eval(), X), gradients(plain.eval(), X))
