"""Compressed models under `torch.compile` and `torch.export`, and what `torch.func` says."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lance_kernels as lance
from tests.models import MODELS, images, with_statistics

# By default one that traces forward and backward, decomposes and partitions as Inductor does, and runs without code
# generation. LANCE_COMPILE_BACKEND=inductor takes Inductor itself, which compiles for minutes (docs/decisions.md).
BACKEND = os.environ.get("LANCE_COMPILE_BACKEND", "aot_eager_decomp_partition")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def near(mine, theirs):
    # Gradients that are zero but for rounding (a key's bias) have no direction.
    return float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()) + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    model = with_statistics(MODELS[name]())
    plain = copy.deepcopy(model)
    x, labels = images()
    lance.compress_(model)
    lance.calibrate(model, [x], progress=False)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    nn.functional.cross_entropy(compiled(x).logits, labels).backward()
    mine = [parameter.grad.clone() for parameter in model.parameters()]
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x).logits, labels), list(model.parameters()))
    assert all(near(a, b) for a, b in zip(mine, expected))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x).logits, labels).backward()
        optimizer.step()
    assert counter.frame_count == 1
    held, plain_held = lance.held_bytes(compiled, x), lance.held_bytes(plain, x)
    # Inductor lays convolutions' weights out anew, and keeps these copies for backward, of a plain model alike.
    added = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Conv2d) and BACKEND == "inductor")
    if name != "mobilenet":
        torch._dynamo.reset()
        plain_compiled = lance.held_bytes(torch.compile(plain, backend=BACKEND, fullgraph=True), x)
        # PyTorch 2.11 keeps an attention's weights when it compiles.
        added = max(added, plain_compiled - plain_held)
        assert held < plain_compiled
    assert held <= lance.held_bytes(model, x) + added
    assert held < plain_held


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def blocks(count=4, **config):
    model = nn.Sequential(*(Block() for _ in range(count)))
    lance.compress_(model, lance.LanceConfig(**config))
    return model


def test_the_default_backend():
    model, x = blocks(1), torch.randn(3, 5, 64)
    lance.calibrate(model, [x], progress=False)
    torch.compile(model, fullgraph=True)(x).square().mean().backward()
    expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    assert all(near(parameter.grad, grad) for parameter, grad in zip(model.parameters(), expected))


def test_a_batch_that_changes_compiles_once_more_at_most():
    model = blocks(2)
    lance.calibrate(model, [torch.randn(6, 5, 64)], progress=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (6, 4, 8, 3, 7):
        x = torch.randn(batch, 5, 64)
        compiled(x).square().mean().backward()
        mine = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        expected = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
        assert all(near(a, b) for a, b in zip(mine, expected))
    assert counter.frame_count <= 2


def test_a_dynamic_batch_from_the_start():
    model = blocks(2)
    lance.calibrate(model, [torch.randn(6, 5, 64)], progress=False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (6, 4, 8):
        x = torch.randn(batch, 5, 64)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).square().mean().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("equal", [True, False])
def test_blocks_compiled_one_by_one_share_code_where_ranks_are_equal(equal):
    x = torch.randn(6, 5, 64)
    counters = []
    for model in (nn.Sequential(*(Block() for _ in range(4))), blocks(4)):
        torch._dynamo.reset()
        for index, block in enumerate(model):
            if isinstance(block.up, lance.nn.Linear):
                block.up.set_factors([None, None, _leading(64, 16 if equal else 8 + index)])
                block.down.set_factors([None, None, _leading(96, 32)])
            counters.append(CompileCounterWithBackend("aot_eager"))
            block.compile(backend=counters[-1], fullgraph=True)
        model(x).square().mean().backward()
    plain, ours = (sum(counter.frame_count for counter in counters[i : i + 4]) for i in (0, 4))
    assert (ours == plain) if equal else (ours <= plain + 3)


def _leading(size, rank):
    return torch.linalg.qr(torch.randn(size, size))[0][:, :rank]


def test_rank_multiple_rounds_ranks_up():
    model = blocks(2, rank_multiple=16, energy=0.6)
    lance.calibrate(model, [torch.randn(6, 5, 64)], progress=False)
    ranks = [layer.factors[2].shape[1] for block in model for layer in (block.up, block.down)]
    assert all(rank % 16 == 0 for rank in ranks)


def test_toggling_exact_recompiles_and_is_right():
    model, x = blocks(1), torch.randn(6, 5, 64)
    lance.calibrate(model, [x], progress=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().mean().backward()
    approximate = model[0].up.weight.grad.clone()
    model.zero_grad()
    with lance.exact(model):
        compiled(x).square().mean().backward()
        (dense,) = torch.autograd.grad(model(x).square().mean(), [model[0].up.weight])
    assert near(model[0].up.weight.grad, dense)
    assert not torch.equal(approximate, dense)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_export_in_eval_mode(name):
    model = with_statistics(MODELS[name]())
    x, _ = images(4)
    lance.compress_(model)
    lance.calibrate(model, [x], progress=False)
    program = torch.export.export(model.eval(), (x,), strict=False)
    called = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in called if "tucker_project" in target or target.startswith("lance.linear")]
    assert torch.equal(program.module()(x).logits, model(x).logits)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_says_why_not_and_works_within_exact(transform):
    model, x = blocks(1, companions="none"), torch.randn(3, 5, 64)
    lance.calibrate(model, [x], progress=False)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    def run():
        if transform == "grad":
            return torch.func.grad(loss)(parameters, x)
        if transform == "vmap":
            return torch.func.vmap(lambda one: loss(parameters, one))(x)
        return torch.func.jvp(lambda one: loss(parameters, one), (x,), (x,))

    with pytest.raises(RuntimeError, match=r"torch.func transforms .* within lance_kernels.exact"):
        run()
    with lance.exact(model):
        run()


def test_functional_call_alone_works():
    model, x = blocks(1), torch.randn(3, 5, 64)
    lance.calibrate(model, [x], progress=False)
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    torch.func.functional_call(model, parameters, (x,)).square().mean().backward()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name].grad, parameter.grad)
