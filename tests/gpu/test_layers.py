"""Compressed models on a device: gradients as on the CPU, calibration, mixed precision, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.functional import cross_entropy

import lance_kernels as lance
from lance_kernels.ops.pack_core import scale_table


class Network(nn.Module):
    """Two convolutions with norms and activations, then linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU6(), nn.MaxPool2d(2))
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.body(self.stem(x)).flatten(2).mT
        tokens = tokens + self.down(torch.nn.functional.gelu(self.up(self.norm(tokens))))
        return self.head(tokens.mean(1))


def batch(device):
    torch.manual_seed(1)
    return torch.randn(8, 3, 16, 16).to(device), (torch.arange(8) % 10).to(device)


def network():
    torch.manual_seed(0)
    model = Network()
    for norm in (model.stem[1], model.body[1]):
        norm.eval().requires_grad_(False)
    return model


def gradients(model, device):
    x, labels = batch(device)
    model.zero_grad()
    cross_entropy(model(x), labels).backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(mine, theirs, tolerance):
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert (gradient - theirs[name]).norm() <= tolerance * theirs[name].norm() + 1e-6, name


@pytest.mark.parametrize("companions", ["none", "exact"])
@pytest.mark.parametrize("core_bits", [None, 4])
def test_gradients_are_those_of_the_cpu(device, companions, core_bits, full_precision):
    model = network()
    lance.compress_(model, lance.LanceConfig(companions=companions, core_bits=core_bits))
    lance.calibrate(model, [batch("cpu")[0]], progress=False)
    mine = copy.deepcopy(model).to(device)
    # A value beside a step of the packed core may round the other way.
    assert_alike(gradients(mine, device), gradients(model, "cpu"), 1e-3 if core_bits is None else 3e-2)


def test_calibration_finds_the_same_energies(device):
    model, mine = network(), network().to(device)
    spectra = []
    for one, place in ((model, "cpu"), (mine, device)):
        lance.compress_(one)
        found = lance.calibrate(one, [batch(place)[0]], progress=False)
        spectra.append({name: layer.eigenvalues for name, layer in found.layers.items()})
    for name, values in spectra[0].items():
        for theirs, own in zip(values, spectra[1][name]):
            assert (theirs is None) == (own is None)
            if theirs is not None:
                assert (own.cpu() - theirs).abs().max() <= 1e-4 * theirs.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(device, dtype):
    model = network().to(device)
    lance.compress_(model, lance.LanceConfig(core_bits=None))
    lance.calibrate(model, [batch(device)[0]], progress=False)
    exact = gradients(model, device)
    with torch.autocast(device, dtype):
        x, labels = batch(device)
        loss = cross_entropy(model(x), labels)
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in found.items():
        if gradient.norm() > 1e-4:
            cosine = torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0)
            assert cosine > 0.97, name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"] if torch.cuda.is_available() else ["default"])
def test_compiled_whole(device, mode):
    model = network().to(device)
    lance.compress_(model)
    lance.calibrate(model, [batch(device)[0]], progress=False)
    torch._dynamo.reset()
    how = {"mode": mode} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(model, fullgraph=True, **how)
    x, labels = batch(device)
    # What is made once is made in the first step, which allocates in the memory of the CUDA graphs to come.
    scale_table.cache_clear()
    for _ in range(4):  # the last steps are replayed
        torch.compiler.cudagraph_mark_step_begin()
        model.zero_grad()
        cross_entropy(compiled(x), labels).backward()
    mine = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert_alike(mine, gradients(model, device), 3e-2)


def test_report_compares_steps_with_the_same_dropout(device):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 16)).to(device)
    lance.compress_(model, lance.LanceConfig(energy=1.0, core_bits=None))
    x = torch.randn(64, 32, device=device)
    lance.calibrate(model, [x], progress=False)
    assert lance.report(model, x).gradient_cosine > 0.999


@pytest.mark.parametrize("companions", ["none", "exact"])
def test_a_captured_step_trains_as_an_eager_one(device, companions):
    model = network().to(device)
    lance.compress_(model, lance.LanceConfig(companions=companions))
    lance.calibrate(model, [batch(device)[0]], progress=False)
    other = copy.deepcopy(model)
    x, labels = batch(device)

    def step_of(trained):
        optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.01, momentum=0.9)

        def step():
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(trained(x), labels).backward()
            optimizer.step()

        return step

    eager, captured = step_of(other), step_of(model)
    for _ in range(6):
        eager()
    if device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                captured()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured()
        captured = graph.replay
    for _ in range(3 if device == "cuda" else 6):
        captured()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5), name
