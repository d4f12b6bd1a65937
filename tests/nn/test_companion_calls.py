"""The mode that replaces functional calls, and what runs outside of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import lance_kernels as lance
from lance_kernels.nn.companions.calls import CompanionMode
from tests.ops.companion_cases import held_bytes

SIZE = torch.Tensor.size
SHAPE = torch.Tensor.shape.__get__


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(7, 4)

    def forward(self, x):
        return self.linear(self.pool(F.relu(self.norm(self.convolution(x)))))


class Recording(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


def compressed():
    torch.manual_seed(0)
    block = Block().eval()
    block.norm.requires_grad_(False)
    lance.compress_(block)
    x = torch.randn(4, 3, 16, 16)
    lance.calibrate(block, [x], progress=False)
    return block, x


def test_our_modules_do_not_ask_the_mode_about_shapes(monkeypatch):
    block, x = compressed()
    asked = []
    original = CompanionMode.__torch_function__

    def asking(self, func, *args, **kwargs):
        asked.append(func)
        return original(self, func, *args, **kwargs)

    monkeypatch.setattr(CompanionMode, "__torch_function__", asking)
    y = block(x)
    assert F.relu in asked
    assert not {SHAPE, SIZE}.intersection(asked)
    monkeypatch.undo()
    assert torch.equal(y, block(x))


def test_a_mode_around_ours_sees_what_our_modules_call():
    block, x = compressed()
    with Recording() as seen:
        block(x)
    assert SHAPE in seen.calls
    assert F.relu not in seen.calls  # ours replaced it before


def test_arguments_that_pytorch_refuses_are_refused():
    module = nn.GELU("Tanh")
    lance.nn.companions.apply_companions(module, "quantized")
    with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
        module(torch.randn(3, requires_grad=True))


def test_models_are_traced_without_gradients():
    block, x = compressed()
    with torch.no_grad():
        traced = torch.jit.trace(block, x)
        assert torch.equal(traced(x), block(x))


@pytest.mark.parametrize("name", ["convolution", "linear", "norm", "pool"])
def test_the_mode_is_back_when_a_module_fails(name):
    block, x = compressed()
    module = getattr(block, name)

    class Failing(nn.Module):
        def forward(self, x):
            with pytest.raises((RuntimeError, ValueError)):
                module(x.detach()[0, 0, 0])
            return F.relu(x)

    failing = Failing()
    lance.nn.companions.apply_companions(failing, "exact")
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    assert held_bytes(lambda: failing(x)) <= x.numel() // 8 + 1
    assert torch._C._len_torch_function_stack() == 0
