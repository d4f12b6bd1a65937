"""Autocast, narrow and wide models, GradScaler; factors that no step casts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lance_kernels as lance


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.norm(self.embed(x).flatten(2).mT)
        return self.head(torch.relu(self.query(tokens) * self.key(tokens)).mean(1))


def data(dtype=torch.float32):
    return torch.randn(8, 3, 16, 16).to(dtype), torch.arange(8) % 5


def prepared(dtype=torch.float32, **config):
    model = Heads().to(dtype)
    lance.compress_(model, lance.LanceConfig(**config))
    lance.calibrate(model, [data(dtype)[0]], progress=False)
    return model


def gradients(model, x, labels, context):
    with context:
        loss = nn.functional.cross_entropy(model(x).float(), labels)
    return torch.autograd.grad(loss, list(model.parameters()))


def cosine(first, second):
    return float(nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0))


@pytest.mark.parametrize("core_bits", [4, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, core_bits):
    model, (x, labels) = prepared(core_bits=core_bits), data()
    with torch.autocast("cpu", dtype=dtype):
        with lance.exact(model):
            expected = model(x)
        y = model(x)
    assert torch.equal(y, expected)
    assert y.dtype == dtype
    wide = gradients(model, x, labels, torch.enable_grad())
    narrow = gradients(model, x, labels, torch.autocast("cpu", dtype=dtype))
    for mine, theirs, parameter in zip(narrow, wide, model.parameters()):
        assert mine.dtype == parameter.dtype
        assert cosine(mine, theirs) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_autocast_keeps_is_narrow(dtype):
    model, (x, labels) = prepared(core_bits=None, companions="none"), data()
    wide = {entry.module: entry.bytes for entry in lance.report(model, x).held if entry.module in ("query", "head")}
    with torch.autocast("cpu", dtype=dtype):
        held = lance.report(model, x).held
    for name in wide:
        # The core and the cast weight; no float32 tensor.
        assert {entry.dtype for entry in held if entry.module == name} <= {str(dtype).removeprefix("torch.")}
    assert labels.shape == (8,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", ["before", "after"])
def test_models_of_one_dtype(dtype, order):
    model = prepared(dtype, core_bits=8) if order == "before" else prepared(core_bits=8).to(dtype)
    x, labels = data(dtype)
    with lance.exact(model):
        expected = model(x)
        dense = gradients(model, x, labels, torch.enable_grad())
    assert torch.equal(model(x), expected)
    for mine, theirs, parameter in zip(gradients(model, x, labels, torch.enable_grad()), dense, model.parameters()):
        assert mine.dtype == parameter.dtype == dtype
        assert mine.isfinite().all()
        assert cosine(mine, theirs) > 0.7


def test_float64_that_keeps_all_energy_is_exact_to_its_rounding():
    model, (x, labels) = prepared(torch.float64, core_bits=None, energy=1.0), data(torch.float64)
    lance.calibrate(model, [x], progress=False)
    with lance.exact(model):
        dense = gradients(model, x, labels, torch.enable_grad())
    for mine, theirs in zip(gradients(model, x, labels, torch.enable_grad()), dense):
        # All but 1e-12 of the energy, so 1e-6 of the values.
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("core_bits", [4, None])
@pytest.mark.parametrize("shared", [False, True])
def test_cores_of_large_float16_inputs_stay_finite(core_bits, shared):
    """Projecting an image of the values 0 to 255 gives coefficients of 255 times the root of its size."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5, stride=2))
    lance.compress_(model, lance.LanceConfig(core_bits=core_bits, energy=0.999))
    x = torch.tensor([255.0, 200.0]).view(2, 1, 1, 1) - torch.rand(2, 3, 224, 224)

    def run(x):
        return [layer(x) for layer in (model if shared else model[:1])]

    found = lance.calibrate(model if shared else model[0], [x], forward_fn=lambda _, x: run(x), progress=False)
    assert bool(found.shared) == shared
    model.half()
    with lance.exact(model):
        expected = torch.autograd.grad([y.float().mean() for y in run(x.half())], list(model[0].parameters()))
    actual = torch.autograd.grad([y.float().mean() for y in run(x.half())], list(model[0].parameters()))
    for mine, dense in zip(actual, expected):
        assert mine.isfinite().all()
        assert cosine(mine, dense) > 0.99


def test_grad_scaler_skips_what_overflows_and_trains_on():
    model, (x, labels) = prepared(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    losses, scales = [], []
    for _ in range(60):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    assert scales[0] < 2.0**40
    assert scales[-1] == scales[-2]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class CastsOf(TorchDispatchMode):
    """Counts copies of certain tensors to another dtype."""

    def __init__(self, tensors):
        super().__init__()
        self.pointers = {tensor.data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.pointers:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_step_casts_factors(dtype, autocast):
    model = prepared().to(dtype)
    x, labels = data(dtype)
    layers = [module for module in model.modules() if isinstance(module, lance.nn.Linear | lance.nn.Conv2d)]
    factors = [factor for layer in layers for factor in layer.factors if factor is not None]
    assert factors
    narrow = torch.float16 if dtype == torch.float16 else torch.bfloat16
    with CastsOf(factors) as casts, torch.autocast("cpu", dtype=narrow, enabled=autocast):
        nn.functional.cross_entropy(model(x).float(), labels).backward()
    assert casts.count == 0
