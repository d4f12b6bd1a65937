"""What training loops do around a model: checkpointing, accumulation, clipping, groups, averages, hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import lance_kernels as lance
from tests.models import images, vit
from tests.ops.cases import assert_near


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.up, self.down = (
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.query(h) * self.key(h)
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(32, 5)
        self.use_reentrant = None
        self.split = False

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean(1))


def data(count=6):
    return torch.randn(count, 3, 16, 16), torch.arange(count) % 5


def prepared(model=None, calibration=None, **config):
    model = Network() if model is None else model
    lance.compress_(model, lance.LanceConfig(**config))
    lance.calibrate(model, [data()[0]] if calibration is None else [calibration], progress=False)
    return model


def loss_of(model, x, labels):
    torch.manual_seed(3)
    return nn.functional.cross_entropy(model(x), labels)


def gradients(model, x, labels):
    model.zero_grad()
    loss_of(model, x, labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("companions", ["exact", "quantized"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks_give_the_same_gradients(use_reentrant, companions):
    model, (x, labels) = prepared(companions=companions), data()
    # The reentrant kind gives the incoming gradient the strides of its input, and the sum over it that is the bias's
    # gradient follows memory, so that it rounds otherwise. In one layout all bits are equal.
    model.embed.register_forward_hook(lambda *args: args[-1].register_hook(torch.Tensor.contiguous) and None)
    expected = gradients(model, x, labels)
    held = lance.held_bytes(model, x)
    model.use_reentrant = use_reentrant
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients(model, x, labels), expected, strict=True))
    assert lance.held_bytes(model, x) < held


def test_reentrant_checkpoints_change_the_rounding_of_a_convolutions_bias_alone():
    model, (x, labels) = prepared(), data()
    names = [name for name, _ in model.named_parameters()]
    expected = gradients(model, x, labels)
    model.use_reentrant = True
    pairs = dict(zip(names, zip(gradients(model, x, labels), expected)))
    assert_near(*pairs.pop("embed.bias"), factor=10)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs.values())


def test_part_of_an_input_group_in_a_checkpoint():
    """The core that a layer outside of the checkpoint made serves one within it, both times."""
    model = nn.ModuleDict({"outside": nn.Linear(32, 32), "inside": nn.Linear(32, 32)})

    def run(model, x, use_checkpoint):
        h = torch.tanh(x)
        y = model["outside"](h)
        inner = checkpoint(model["inside"], h, use_reentrant=False) if use_checkpoint else model["inside"](h)
        return (y * inner).square().mean()

    lance.compress_(model, lance.LanceConfig())
    x = torch.randn(4, 9, 32)
    found = lance.calibrate(model, [x], forward_fn=lambda model, x: run(model, x, False), progress=False)
    assert found.shared == {"inside": "outside"}
    results = [torch.autograd.grad(run(model, x, flag), list(model.parameters())) for flag in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpoint_sequential():
    model = prepared(nn.Sequential(*(Block() for _ in range(4))).eval(), torch.randn(4, 9, 32))
    x = torch.randn(4, 9, 32)
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    y = checkpoint_sequential(model, 2, x, use_reentrant=False)
    actual = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_gradient_checkpointing_of_transformers():
    model, (x, labels) = vit(), images()
    lance.compress_(model)
    lance.calibrate(model, [x], progress=False)
    model.train()

    def run():
        model.zero_grad()
        torch.manual_seed(0)
        nn.functional.cross_entropy(model(x).logits, labels).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = run()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(run(), expected))


def test_accumulated_gradients_are_the_sum():
    model = prepared(core_bits=None).eval()
    batches = [data(4) for _ in range(3)]
    parts = [gradients(model, *batch) for batch in batches]
    model.zero_grad()
    for batch in batches:
        loss_of(model, *batch).backward()
    for parameter, *grads in zip(model.parameters(), *parts):
        assert_near(parameter.grad, sum(grads), factor=10)


def test_several_forwards_before_one_backward():
    model = prepared().eval()
    batches = [data(4) for _ in range(2)]
    first, second = (gradients(model, *batch) for batch in batches)
    model.zero_grad()
    torch.stack([loss_of(model, *batch) for batch in batches]).sum().backward()
    for parameter, one, two in zip(model.parameters(), first, second):
        assert_near(parameter.grad, one + two, factor=10)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    model, (x, labels) = prepared(), data()
    expected = gradients(model, x, labels)
    model.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else not p.grad.any() for p in model.parameters())
    loss_of(model, x, labels).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected))


def test_clipping():
    model, (x, labels) = prepared(), data()
    before = gradients(model, x, labels)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    assert_near(norm, torch.stack([grad.norm() for grad in before]).norm(), factor=10)
    after = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert float(after) == pytest.approx(0.01, rel=1e-3)
    gradients(model, x, labels)
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)
    assert all(parameter.grad.abs().max() <= 1e-4 for parameter in model.parameters())


def test_parameter_groups_and_a_layer_frozen_on_the_way():
    model, (x, labels) = prepared(), data()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "lr": 0.0}], lr=0.01)
    before = [parameter.detach().clone() for parameter in rest]
    gradients(model, x, labels)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(rest, before))
    model.blocks[0].requires_grad_(False)
    model.zero_grad()
    loss_of(model, x, labels).backward()
    assert all(parameter.grad is None for parameter in model.blocks[0].parameters())
    assert model.blocks[1].up.weight.grad.any()
    optimizer.step()
    assert not model.blocks[0].query.lance_keeps_core()
    model.blocks[0].requires_grad_(True)
    gradients(model, x, labels)
    assert model.blocks[0].query.weight.grad.any()


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_models(use_buffers):
    model, (x, labels) = prepared(), data()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        gradients(model, x, labels)
        optimizer.step()
        average.update_parameters(model)
    assert not torch.equal(average.module.head.weight, model.head.weight)
    for mine, theirs in zip(average.module.blocks[0].query.factors, model.blocks[0].query.factors):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    average.module.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(gradients(average.module, x, labels), gradients(model, x, labels)))
    fresh = AveragedModel(copy.deepcopy(model))
    fresh.load_state_dict(average.state_dict())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations_put_on_a_compressed_layer(norm):
    model, (x, labels) = prepared(core_bits=None, energy=1.0, companions="none").eval(), data()
    plain = lance.revert_(copy.deepcopy(model))
    for one in (model, plain):
        torch.manual_seed(1)
        norm(one.head)
        norm(one.blocks[0].up)
        one.eval()
    lance.calibrate(model, [x], progress=False)
    # Parametrizing swaps the class for a subclass of ours.
    assert isinstance(model.head, lance.nn.Linear)
    assert model.head.is_calibrated
    for mine, theirs in zip(gradients(model, x, labels), gradients(plain, x, labels)):
        assert_near(mine, theirs, factor=1000)
    parametrize.remove_parametrizations(model.head, "weight")
    assert isinstance(model.head, lance.nn.Linear)
    gradients(model, x, labels)


def test_a_parametrized_layer_is_reverted():
    model, (x, labels) = prepared(companions="none").eval(), data()
    plain = lance.revert_(copy.deepcopy(model))
    for one in (model, plain):
        parametrizations.weight_norm(one.head)
    lance.revert_(model)
    assert type(model.head).__mro__[1] is nn.Linear
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x, labels), gradients(plain, x, labels)))
    parametrize.remove_parametrizations(model.head, "weight")
    assert type(model.head) is nn.Linear


def test_layers_whose_forward_was_replaced_are_left():
    model = Network()
    for layer in (model.head, model.blocks[0].norm):
        add_hook_to_module(layer, ModelHook())
    summary = lance.compress_(model, lance.LanceConfig(companions="quantized"))
    assert summary.left == {"head": "its forward was replaced"}
    assert summary.companions["blocks.0.norm"] == "LayerNorm left alone, its forward was replaced"


def test_hooks_of_accelerate_that_came_after():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    plain, x = copy.deepcopy(model), torch.randn(20, 3) @ torch.randn(3, 8)
    prepared(model, x, companions="smallest")
    for module in model:
        add_hook_to_module(module, ModelHook())
    loss_of(plain, x, torch.arange(20) % 4).backward()
    expected = [parameter.grad for parameter in plain.parameters()]
    assert not torch.equal(gradients(model, x, torch.arange(20) % 4)[0], expected[0])
    with lance.exact(model):
        assert all(map(torch.equal, gradients(model, x, torch.arange(20) % 4), expected))
    assert not torch.equal(gradients(model, x, torch.arange(20) % 4)[0], expected[0])
    lance.revert_(model)
    assert all(map(torch.equal, gradients(model, x, torch.arange(20) % 4), expected))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    # What it shares is the process's.
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_wraps_and_unwraps(accelerator):
    # A root with functional calls of its own.
    x, labels = torch.randn(4, 9, 32), torch.arange(128).view(4, 32) % 9
    model = prepared(Block(), x, companions="quantized").eval()
    plain = lance.revert_(copy.deepcopy(model))
    held = lance.held_bytes(model, x)
    model = accelerator.prepare(model)
    with lance.exact(model):
        exact = lance.held_bytes(model, x)
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert lance.held_bytes(model, x) == held
    lance.revert_(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, x, labels), gradients(plain, x, labels)))
    plain = accelerator.prepare(plain)
    assert exact == lance.held_bytes(plain, x)


def test_hooks_see_what_they_do_around_plain_layers():
    model, (x, labels) = prepared(core_bits=None, companions="none"), data()
    plain = lance.revert_(copy.deepcopy(model))
    seen = {}
    for name, one in (("ours", model), ("plain", plain)):
        calls = seen.setdefault(name, [])
        for layer in (one.embed, one.blocks[0].query, one.blocks[0].key, one.head):
            layer.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0].detach().clone()))
            layer.register_forward_hook(lambda _, args, y, calls=calls: calls.append(y.detach().clone()))
            layer.register_full_backward_pre_hook(lambda _, grads, calls=calls: calls.append(grads[0].clone()))
            layer.register_full_backward_hook(lambda _, ins, outs, calls=calls: calls.append(outs[0].clone()))
            layer.weight.register_hook(lambda grad, calls=calls: calls.append(torch.tensor(grad.shape)))
            layer.weight.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(torch.ones(1)))
        one.train()
        loss_of(one, x, labels).backward()
    assert len(seen["ours"]) == len(seen["plain"]) == 24
    assert all(torch.equal(a, b) for a, b in zip(seen["ours"], seen["plain"]) if a.shape == b.shape)


def test_hooks_that_change_inputs_and_outputs():
    model, (x, labels) = prepared(core_bits=None, companions="none"), data()
    handle = model.blocks[0].key.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    other = model.head.register_forward_hook(lambda _, args, y: 3 * y)
    with lance.exact(model):
        expected = loss_of(model, x, labels)
    assert torch.equal(loss_of(model, x, labels), expected)
    gradients(model, x, labels)
    handle.remove()
    other.remove()


def test_saved_tensors_on_the_host():
    model, (x, labels) = prepared(), data()
    expected = gradients(model, x, labels)
    with torch.autograd.graph.save_on_cpu():
        actual = gradients(model, x, labels)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_an_optimizer_in_the_backward_pass():
    model, (x, labels) = prepared(), data()
    twin = copy.deepcopy(model)
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    loss_of(model, x, labels).backward()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    gradients(twin, x, labels)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
