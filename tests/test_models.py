"""Compressing models that nobody here wrote."""

from __future__ import annotations

import copy

import pytest
import torch

import lance_kernels as lance
from tests.models import MODELS, images, with_statistics

CONFIGS = {
    "default": lance.LanceConfig(),
    "published": lance.LanceConfig.published(energy=0.9),
    "bare": lance.LanceConfig(core_bits=None, companions="none"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return with_statistics(MODELS[request.param]())


@pytest.mark.parametrize("config", CONFIGS)
def test_forward_keeps_its_bits(model, config):
    x, _ = images()
    before = model(x).logits
    lance.compress_(model, CONFIGS[config])
    assert torch.equal(model(x).logits, before)
    lance.calibrate(model, [x], progress=False)
    assert torch.equal(model(x).logits, before)
    with torch.no_grad():
        assert torch.equal(model(x).logits, before)


@pytest.mark.parametrize("config", CONFIGS)
def test_trains(model, config):
    x, labels = images()
    lance.compress_(model, CONFIGS[config])
    lance.calibrate(model, [x], progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(model(x).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [name for name in without if not name.endswith("bias")]
    assert losses[-1] < 0.9 * losses[0]
    # A smaller last batch.
    torch.nn.functional.cross_entropy(model(x[:3]).logits, labels[:3]).backward()


def test_revert_restores(model):
    plain = copy.deepcopy(model)
    lance.compress_(model)
    lance.calibrate(model, [images()[0]], progress=False)
    lance.revert_(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert model.state_dict().keys() == plain.state_dict().keys()
    x, labels = images()
    gradients = []
    for one in (model, plain):
        torch.nn.functional.cross_entropy(one(x).logits, labels).backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients) if a is not None)


def test_compressed_layers_hold_no_input(model):
    x, _ = images()
    lance.compress_(model, lance.LanceConfig(energy=0.7, core_bits=None, companions="none"))
    lance.calibrate(model, [x], progress=False)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, lance.nn.Linear | lance.nn.Conv2d) and module.is_calibrated:
            module.register_forward_pre_hook(
                lambda layer, args, name=name: inputs.update({name: args[0].untyped_storage().data_ptr()})
            )
    kept = {}
    inside = []

    def pack(tensor):
        if inside:
            kept.setdefault(inside[-1], set()).add(tensor.untyped_storage().data_ptr())
        return tensor

    for name, module in model.named_modules():
        if isinstance(module, lance.nn.Linear | lance.nn.Conv2d) and module.is_calibrated:
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            module.register_forward_hook(lambda *_: inside.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert output.logits.requires_grad
    assert inputs
    for name, pointer in inputs.items():
        assert pointer not in kept.get(name, set()), name


def test_exact_gives_the_plain_gradients(model):
    plain = copy.deepcopy(model)
    x, labels = images()
    lance.compress_(model, lance.LanceConfig(companions="none"))
    lance.calibrate(model, [x], progress=False)
    with lance.exact(model):
        torch.nn.functional.cross_entropy(model(x).logits, labels).backward()
    torch.nn.functional.cross_entropy(plain(x).logits, labels).backward()
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
