"""Companions within `nn.MultiheadAttention`, whose one functional call contains all others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lance_kernels.nn.companions import apply_companions, remove_companions
from tests.nn.test_companions import assert_close, gradients
from tests.ops.companion_cases import held_bytes


class Attending(nn.Module):
    """Self-attention with a mask, by the module that PyTorch has for it."""

    def __init__(self, need_weights: bool = False, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights, self.use_reentrant = need_weights, use_reentrant
        self.mask = torch.full((5, 5), -torch.inf).triu(1)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, attn_mask=self.mask, need_weights=self.need_weights)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return self.attend(x)
        return checkpoint(self.attend, x, use_reentrant=self.use_reentrant)


INPUT = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("level", ["exact", "quantized", "smallest"])
def test_values_and_gradients(level, need_weights):
    model = Attending(need_weights)
    y, *expected = gradients(model, INPUT)
    apply_companions(model, level)
    found, *grads = gradients(model, INPUT)
    assert torch.equal(found, y)
    assert_close(grads, expected, 1e-6 if level == "exact" else 0.05)


@pytest.mark.parametrize("compiles", [False, True])
def test_holds_less(compiles):
    model = Attending()
    ignored = [*model.parameters(), model.mask]
    held = held_bytes(lambda: model(INPUT.clone().requires_grad_()), ignored)
    apply_companions(model, "quantized")
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiles else model
    assert held_bytes(lambda: run(INPUT.clone().requires_grad_()), ignored) < 0.75 * held


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_alike(use_reentrant):
    model = Attending()
    y, *expected = gradients(model, INPUT)
    apply_companions(model, "quantized")
    model.use_reentrant = use_reentrant
    found, *grads = gradients(model, INPUT)
    assert torch.equal(found, y)
    assert_close(grads, expected, 0.05)


def test_alone_and_copied():
    model = nn.MultiheadAttention(8, 2)
    apply_companions(model, "quantized")
    copied = copy.deepcopy(model)
    x = INPUT.clone().requires_grad_()
    assert torch.equal(model(x, x, x)[0], copied(x, x, x)[0])
    remove_companions(model)
    assert type(model) is nn.MultiheadAttention
