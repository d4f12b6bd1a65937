"""Layers that read the same tensor hold one core, made once, in eager and compiled code."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lance_kernels as lance
from lance_kernels import _grams
from tests.models import images, resnet, vit
from tests.ops.cases import assert_near

SIZE = 96


class Heads(nn.Module):
    """Query, key and value of one input, as attention has them."""

    def __init__(self, share=True):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(SIZE, SIZE) for _ in range(3))
        self.share = share

    def forward(self, x):
        h = torch.tanh(x)
        inputs = (h, h, h) if self.share else (h, h.clone(), h.clone())
        q, k, v = (layer(one) for layer, one in zip((self.query, self.key, self.value), inputs))
        return q + 2 * k + 3 * v


class Pair(nn.Module):
    """A block's first convolution and its shortcut."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        h = torch.tanh(x)
        return self.first(h) + self.shortcut(h)


class Projections(TorchDispatchMode):
    """Counts the calls of the projection."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.lance.tucker_project.default
        return func(*args, **(kwargs or {}))


def prepared(model, x, **config):
    lance.compress_(model, lance.LanceConfig(**{"energy": 0.7, "companions": "none", **config}))
    found = lance.calibrate(model, [x], progress=False)
    return model, found


def held_in(model, x):
    return {entry.shape for entry in lance.report(model, x).held if entry.dtype == "uint8"}, lance.held_bytes(model, x)


@pytest.mark.parametrize("core_bits", [4, None])
def test_one_core_is_held_and_one_projection_made(core_bits):
    x = torch.randn(4, 24, SIZE)
    model, found = prepared(Heads(), x, core_bits=core_bits)
    assert found.shared == {"key": "query", "value": "query"}
    assert model.key.factors[2] is model.query.factors[2]
    single, _ = prepared(nn.Sequential(nn.Tanh(), nn.Linear(SIZE, SIZE)), x, core_bits=core_bits)
    # What tanh keeps is counted in both.
    assert lance.held_bytes(model, x) == lance.held_bytes(single, x)
    with Projections() as projections:
        model(x)
    assert projections.calls == 1


def test_the_gradients_are_those_of_separate_cores():
    x = torch.randn(4, 24, SIZE)
    model, _ = prepared(Heads(), x)
    model(x).square().mean().backward()
    shared = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.share = False
    model(x).square().mean().backward()
    assert all(torch.equal(parameter.grad, before) for parameter, before in zip(model.parameters(), shared))


def test_convolutions_share_too():
    x = torch.randn(4, 8, 12, 12)
    model, found = prepared(Pair(), x, core_bits=None)
    assert found.shared == {"shortcut": "first"}
    single, _ = prepared(nn.Sequential(nn.Tanh(), nn.Conv2d(8, 8, 1)), x, core_bits=None)
    assert lance.held_bytes(model, x) == lance.held_bytes(single, x)
    model(x).square().mean().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    hook = model.shortcut.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    model(x).square().mean().backward()
    hook.remove()
    for parameter, before in zip(model.parameters(), grads):
        assert_near(parameter.grad, before)


@pytest.mark.parametrize("make", [vit, resnet])
def test_other_peoples_models_have_groups(make):
    model, x = make(), images()[0]
    lance.compress_(model, lance.LanceConfig(companions="none"))
    found = lance.calibrate(model, [x], progress=False)
    assert len(found.shared) == (4 if make is vit else 1)
    separate = make()
    lance.compress_(separate, lance.LanceConfig(companions="none"))
    lance.Calibration(found.layers, [], 1).apply(separate)
    assert lance.held_bytes(model, x) < lance.held_bytes(separate, x)


def test_a_tensor_that_was_written_to_is_another_input():
    layer, _ = prepared(Heads(), torch.randn(4, 24, SIZE))
    h = torch.randn(4, 24, SIZE)
    first = layer.query(h)
    h.mul_(0.5)
    second = layer.key(h)
    h.add_(0)
    expected = prepared_gradient(layer, h)
    (first.sum() * 0 + second.sum()).backward()
    assert torch.equal(layer.key.weight.grad, expected)


def prepared_gradient(layer, h):
    (gradient,) = torch.autograd.grad(layer.key(h.clone()).sum(), [layer.key.weight])
    return gradient


def test_the_core_is_freed_with_its_input():
    model, _ = prepared(Heads(), torch.randn(4, 24, SIZE))
    h = torch.randn(4, 24, SIZE)
    model.query(h)
    shared = model.query._lance_shared
    assert shared._core is not None
    del h
    assert shared._core is None


def test_inputs_that_differ_later_get_grams_of_their_own():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(SIZE, 4), nn.Linear(SIZE, 4)

        def forward(self, x):
            return self.one(x) + self.two(x if x.shape[0] == 4 else x * torch.arange(SIZE))

    batches = [torch.randn(4, SIZE), torch.randn(5, SIZE), torch.randn(6, SIZE)]
    model = Shifted()
    lance.compress_(model, lance.LanceConfig(companions="none"))
    found = lance.calibrate(model, batches, progress=False)
    assert not found.shared
    seen = [batches[0], *(batch * torch.arange(SIZE) for batch in batches[1:])]
    gram = sum(batch.double().mT @ batch.double() for batch in seen)
    assert_near(found.layers["two"].eigenvalues[1], torch.linalg.eigvalsh(gram).flip(0), factor=10)
    gram = sum(batch.double().mT @ batch.double() for batch in batches)
    assert_near(found.layers["one"].eigenvalues[1], torch.linalg.eigvalsh(gram).flip(0), factor=10)


class Optional(nn.Module):
    """The first layer is called alone where the batch is odd."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(SIZE, 4) for _ in range(3))

    def forward(self, x):
        x = x * 1
        y = self.one(x) + self.three(x)
        return y if x.shape[0] % 2 else y + self.two(x)


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_a_layer_called_without_its_owner_gets_grams_of_its_own(max_bytes):
    batches = [torch.randn(4, SIZE), torch.randn(5, SIZE) * torch.arange(SIZE), torch.randn(6, SIZE)]
    model = Optional()
    lance.compress_(model, lance.LanceConfig(companions="none"))
    found = lance.calibrate(model, batches, progress=False, max_bytes=max_bytes)
    assert found.shared == {"three": "one"}
    assert not found.uncalled
    gram = sum(batch.double().mT @ batch.double() for batch in (batches[0], batches[2]))
    assert_near(found.layers["two"].eigenvalues[1], torch.linalg.eigvalsh(gram).flip(0), factor=10)
    lance.calibrate(model, iter(batches), progress=False)
    assert model.two.lance_source is model.two


def test_ranks_that_call_the_owner_alone_end_the_sharing():
    def seen_on(batch):
        model = Optional()
        lance.compress_(model)
        collector = _grams.Collector(dict(lance.convert.compressed_layers(model)), None, True)
        with collector.watching(), torch.no_grad():
            model(batch)
        return collector

    both, alone = seen_on(torch.randn(4, SIZE)), seen_on(torch.randn(5, SIZE))
    views, owners = _grams.agree(both, [both.seen(), alone.seen()])
    assert owners == {"three": "one"}
    assert list(views) == ["one", "two"]
    assert all(torch.equal(a, b) for a, b in zip(both.records["two"].grams[1:], both.records["one"].grams[1:]))


def test_other_ranks_end_the_sharing():
    x = torch.randn(4, 24, SIZE)
    model, found = prepared(Heads(), x)
    found.apply(model, lance.LanceConfig(rank_pattern={"key": 5}))
    assert model.value.factors[2] is model.query.factors[2]
    assert model.key.factors[2].shape == (SIZE, 5)
    model(x).sum().backward()


def test_compiled_code_holds_one_core_too():
    x = torch.randn(4, 24, SIZE)
    model, _ = prepared(Heads(), x)
    separate = Heads()
    lance.compress_(separate, lance.LanceConfig(energy=0.7, companions="none"))
    for layer in (separate.query, separate.key, separate.value):
        layer.set_factors(model.query.factors)
    compiled = {
        name: lance.held_bytes(torch.compile(one, backend="aot_eager_decomp_partition", fullgraph=True), x)
        for name, one in (("shared", model), ("separate", separate))
    }
    assert compiled["shared"] <= lance.held_bytes(model, x)
    assert compiled["shared"] < compiled["separate"]


def test_input_in_memory_that_someone_else_writes():
    buffer = torch.randn(16, SIZE).numpy()
    x = torch.from_numpy(buffer)
    model, found = prepared(Heads(), x)
    model.forward = lambda x: model.query(x) + 2 * model.key(x)
    for name in ("query", "key"):
        layer = model.get_submodule(name)
        layer.set_factors(found.layers["query"].eigenvectors)
        layer.lance_core_bits = 0
    lance.state.share_factors(model, {"key": "query"})
    for _ in range(2):
        buffer[...] = torch.randn(16, SIZE).numpy()
        model.zero_grad()
        with Projections() as projections:
            model(x).sum().backward()
        assert projections.calls == 1
        torch.testing.assert_close(model.key.weight.grad, 2 * x.sum(0).expand(SIZE, SIZE))


def test_whoever_comes_first_in_the_model_has_the_factors():
    class Backwards(Heads):
        def forward(self, x):
            h = torch.tanh(x)
            return self.value(h) + self.key(h) + self.query(h)

    model, found = prepared(Backwards(), torch.randn(4, 24, SIZE))
    assert found.shared == {"key": "value", "query": "value"}
    assert model.value.lance_source is model.key.lance_source is model.query
    assert model.query.lance_source is model.query
