"""`report` against what can be worked out by hand, and that it touches nothing."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lance_kernels as lance
from tests.models import MODELS, images

ROOT = Path(__file__).parent.parent


def mean(output):
    return output.mean()


def test_held_bytes_of_a_plain_model_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30), nn.Tanh())
    x = torch.randn(7, 10)
    result = lance.report(model, x, mean)
    # ReLU's output (the second layer's input too) and tanh's output; x, weights and biases do not count.
    assert result.held_bytes == 4 * 7 * (20 + 30)
    assert [entry.bytes for entry in result.held] == [4 * 7 * 30, 4 * 7 * 20]
    assert result.held_by_module() == {"3": 4 * 7 * 30, "1": 4 * 7 * 20}
    assert result.held[0].operators == ("TanhBackward0",)
    assert set(result.held[1].operators) == {"ReluBackward0", "AddmmBackward0"}
    assert lance.held_bytes(model, x, mean) == result.held_bytes


def test_views_count_their_whole_storage_once():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 10, bias=False)

        def forward(self, x):
            wide = self.fc(x)
            return wide[:, :5] * wide[:, 5:]

    assert lance.report(Views(), torch.randn(6, 10), mean).held_bytes == 4 * 6 * 10


def test_what_the_forward_pass_itself_drops_is_not_held():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(10, 10, bias=False)

        def forward(self, x):
            self.fc(x).exp().sum()
            return self.fc(x).detach().sum() + self.fc.weight.sum()

    assert lance.report(Drops(), torch.randn(6, 10), mean).held_bytes == 0


def compressed(energy=0.6, core_bits=None):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 5))
    lance.compress_(model, lance.LanceConfig(energy=energy, core_bits=core_bits, companions="none"))
    x = torch.randn(6, 3, 8, 8)
    lance.calibrate(model, [x], progress=False)
    return model, x


@pytest.mark.parametrize("core_bits", [None, 4])
def test_counted_bytes_are_the_core_as_it_is_held(core_bits):
    model, x = compressed(core_bits=core_bits)
    result = lance.report(model, x, mean)
    assert result.dense_bytes == 4 * (6 * 3 * 64 + 6 * 512)
    # A chain of compressed layers holds its cores and nothing else.
    assert result.counted_bytes == result.held_bytes
    assert result.counted_bytes < result.dense_bytes
    assert [layer.held_bytes for layer in result.layers] == [layer.counted_bytes for layer in result.layers]


def test_gradient_cosine_by_layer():
    model, x = compressed()
    result = lance.report(model, x, lambda y: y.square().sum())

    def gradients():
        loss = model(x).square().sum()
        return torch.autograd.grad(loss, [model[0].weight, model[2].weight])

    ours = gradients()
    with lance.exact(model):
        true = gradients()
    expected = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in zip(ours, true)]
    assert [layer.gradient_cosine for layer in result.layers] == pytest.approx(expected, abs=1e-5)
    assert result.gradient_cosine == pytest.approx(sum(expected) / 2, abs=1e-5)
    assert 0 < result.gradient_cosine < 1


def test_flops_match_the_counter_by_layer_and_in_total():
    model, x = compressed()
    result = lance.report(model, x, mean)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(x).mean().backward()
    assert result.flops == counter.get_total_flops()
    assert sum(layer.flops for layer in result.layers) == result.flops


def test_flops_where_forward_fn_calls_a_part():
    model, x = compressed()
    outer = nn.ModuleDict({"body": model})
    parts = lance.report(outer, x, mean, forward_fn=lambda outer, x: outer["body"](x))
    assert [row.flops for row in parts.layers] == [row.flops for row in lance.report(model, x, mean).layers]


def test_peak_is_at_least_what_is_held_and_the_gradients():
    model = nn.Sequential(nn.Linear(100, 200), nn.Tanh(), nn.Linear(200, 300), nn.Tanh())
    x = torch.randn(50, 100)
    result = lance.report(model, x, mean)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert result.held_bytes <= result.peak_bytes <= result.held_bytes + weights + 4 * x.shape[0] * 300 * 4


@pytest.mark.parametrize("training", [True, False])
def test_touches_nothing(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 5))
    lance.compress_(model)
    x = torch.randn(4, 3, 8, 8)
    lance.calibrate(model, [x], progress=False)
    model.train(training)
    model(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    lance.report(model, x, mean)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert model.training is training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_puts_back_buffers_that_the_forward_pass_replaces_and_lets_a_step_under_way_go_on():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            return x - self.mean

    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), Average(), nn.Linear(4, 4))
    lance.compress_(model)
    x = torch.randn(32, 6)
    lance.calibrate(model, [x], progress=False)
    loss = model(x).square().mean()
    before = list(model.buffers())
    values = [buffer.clone() for buffer in before]
    lance.report(model, x, mean)
    assert all(buffer is old for buffer, old in zip(model.buffers(), before))
    assert all(torch.equal(buffer, value) for buffer, value in zip(before, values))
    loss.backward()


@pytest.mark.parametrize("case", ["first frozen", "first left out", "second frozen"])
def test_a_shared_core_is_counted_by_the_layer_that_keeps_it(case):
    model = nn.ModuleDict({"first": nn.Linear(6, 4), "second": nn.Linear(6, 4)})
    lance.compress_(model, lance.LanceConfig(core_bits=8, energy=0.5))
    x = torch.randn(32, 6)

    def both(model, x):
        return model["first"](x) + model["second"](x)

    lance.calibrate(model, [x], forward_fn=both, progress=False)
    assert model["second"].lance_source is model["first"]
    expected = lance.report(model, x, mean, forward_fn=both).counted_bytes
    assert expected > 0
    if "frozen" in case:
        model[case.split()[0]].requires_grad_(False)
    run = both if "frozen" in case else lambda model, x: model["second"](x)
    assert lance.report(model, x, mean, forward_fn=run).counted_bytes == expected


def test_a_dataclass_is_an_output():
    @dataclass
    class Output:
        values: torch.Tensor

    model = nn.Linear(4, 3)
    lance.report(model, torch.randn(2, 4), forward_fn=lambda model, x: Output(model(x)))
    with pytest.raises(ValueError, match="report: the output, a str, has no floating tensor; expected a loss_fn"):
        lance.report(model, torch.randn(2, 4), forward_fn=lambda model, x: "three")


def test_measuring_computes_no_checkpointed_block_again():
    calls = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 10))

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

        def inner(self, x):
            calls.append(None)
            return self.body(x)

    model = nn.Sequential(nn.Linear(10, 10), Block(), nn.Tanh())
    # The block's input and tanh's result; nothing from within the block.
    assert lance.held_bytes(model, torch.randn(7, 10), mean) == 4 * 7 * (10 + 10)
    assert len(calls) == 1


def test_leaves_no_graph_behind():
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5), nn.Tanh())
    outputs = []
    model[1].register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    lance.report(model, torch.randn(7, 10), mean)
    lance.held_bytes(model, torch.randn(7, 10), mean)
    gc.collect()
    assert outputs
    assert all(reference() is None for reference in outputs)


def test_prints_and_serialises():
    model, x = compressed()
    result = lance.report(model, x)
    text = str(result)
    for word in ("layer", "counted", "held", "cosine", "total", "elsewhere", "peak"):
        assert word in text
    again = json.loads(json.dumps(result.to_dict()))
    assert again["held_bytes"] == result.held_bytes
    assert again["layers"][0]["name"] == "0"


def test_plots_who_holds_what(tmp_path):
    model, x = compressed()
    lance.report(model, x).plot(tmp_path / "held.png")
    assert (tmp_path / "held.png").read_bytes().startswith(b"\x89PNG")


def wide_model(width):
    model = nn.Sequential(nn.Linear(64, int(width)), nn.Tanh(), nn.Linear(int(width), 1))
    return model, torch.randn(4096, 64), mean


def test_peak_resident_memory_in_a_fresh_process():
    found = []
    for width in ("256", "2048"):
        command = [sys.executable, "-m", "lance_kernels.report", "tests.test_report:wide_model", width]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found.append(json.loads(answer.stdout))
    # Tanh's output, its gradient and the gradient before it: at least two of them are there at once.
    for width, entry in zip((256, 2048), found):
        assert entry["above"] == entry["peak"] - entry["before"]
        assert entry["above"] >= 2 * 4 * 4096 * width
    assert found[1]["above"] <= 6 * 4 * 4096 * 2048


def test_a_model_without_compression_and_a_huggingface_loss():
    x, labels = images(4)
    result = lance.report(MODELS["resnet"](), {"pixel_values": x, "labels": labels})
    assert result.layers == []
    assert result.gradient_cosine is None
    assert result.held_bytes > 0


def test_compiled_model_is_counted_too():
    model, x = compressed()
    assert lance.held_bytes(torch.compile(model), x, mean) <= 1.1 * lance.held_bytes(model, x, mean)


@pytest.mark.parametrize("part", ["model", "layer", "in place"])
def test_a_compiled_model_that_has_run_has_the_same_rows(part):
    model, x = compressed()
    expected = lance.report(model, x, mean)
    if part == "layer":
        model[0] = torch.compile(model[0], backend="aot_eager")
    elif part == "in place":
        model.compile(backend="aot_eager")
    compiled = torch.compile(model, backend="aot_eager") if part == "model" else model
    compiled(x).mean().backward()
    found = lance.report(compiled, x, mean)
    assert [row.counted_bytes for row in found.layers] == [row.counted_bytes for row in expected.layers]
    assert [row.flops for row in found.layers] == [row.flops for row in expected.layers]
    assert found.gradient_cosine == pytest.approx(expected.gradient_cosine)


def test_a_sample_that_reaches_no_layer_is_refused():
    model = nn.ModuleDict({"used": nn.Bilinear(4, 4, 3), "idle": nn.Linear(4, 3)})
    lance.compress_(model)
    with pytest.raises(ValueError, match="report: sample reached none of the 1 compressed layers"):
        lance.report(model, torch.randn(2, 4), mean, forward_fn=lambda model, x: model["used"](x, x))


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="the loss needs no gradient"):
        lance.report(nn.Linear(4, 3).requires_grad_(False), torch.randn(2, 4))
