"""The suite `memory`: what its numbers are made of, checked where they can be worked out by hand."""

from __future__ import annotations

import copy

import torch
from torch import nn

import lance_kernels as lance
from benchmarks import environment
from benchmarks.data import load
from benchmarks.finetune import loss_of
from benchmarks.registry import Context
from benchmarks.results import make_rows
from benchmarks.suites import memory, memory_curve, memory_peak, memory_training
from benchmarks.suites.memory_tables import plot, tables


def test_implied_bytes_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU6())
    images = torch.randn(2, 3, 8, 8)
    assert memory.implied_bytes(model, images, 1000) == 1000 + 2 * 4 * 64 // 8 + 2 * 4 * 16 + 2 * 4 * 16 // 8
    assert not any(module._forward_hooks for module in model.modules())


def test_checkpointed_blocks_hold_less_and_give_the_same_gradients():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

        def forward(self, x):
            return x + self.body(x)

    plain = nn.Sequential(Block(), Block(), nn.Linear(8, 2))
    model = memory.checkpoint_blocks(copy.deepcopy(plain))
    x = torch.randn(4, 8)

    def loss(y):
        return y.square().sum()

    assert lance.held_bytes(model, x, loss) < lance.held_bytes(plain, x, loss)
    loss(model(x)).backward()
    loss(plain(x)).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))


def test_prepared_models_do_not_fade():
    images = memory.images_for(Context("memory", "held", environment.current(), quick=True), 4)
    model = memory.prepared("ResNet-18", images, "frozen")
    seen = []
    model.model.resnet.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    model(images)
    assert 0.01 < float(seen[0].detach().std()) < 100
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())


def test_the_curve_on_digits():
    context = Context("memory", "curve", environment.current(), quick=True)
    rows = memory_curve.at_budget(0.1, context)
    found = {row.method: row.median for row in rows}
    assert set(found) == {memory_curve.PUBLISHED, memory_curve.ONE_ENERGY, memory_curve.PLANNED}
    assert all(0 < value <= 1 for value in found.values())
    net = memory_curve.network(None, True, 0)
    planned = memory_curve.fit_plan(net, 100_000)
    assert planned is not None
    assert planned.bytes <= 100_000
    model, calibration = net.form(memory_curve.PLANNED)
    images = next(iter(memory_curve.batches(net.data.train, memory_curve.BATCH, torch.Generator().manual_seed(0))))[0]
    counted = lance.report(model, images).counted_bytes
    assert counted == planned.bytes
    ranks = calibration.apply(model, lance.LanceConfig(energy=0.8, companions="none"))
    assert lance.report(model, images).counted_bytes == memory_curve.counted_bytes(calibration, ranks, 4)


def test_peak_set_up_is_what_the_method_says():
    plain, images, loss = memory_peak.training("ResNet-18", "plain", "2", "32", "1")
    ours, _, _ = memory_peak.training("ResNet-18", "lance, default", "2", "32", "1")
    assert loss(plain(images)).requires_grad
    assert lance.held_bytes(ours, images, loss) < lance.held_bytes(plain, images, loss) / 4


def test_tables_and_plot_show_targets_met_and_missed(tmp_path):
    here = environment.current()

    def rows(case, quantity, values, **arguments):
        return make_rows("memory", case, values, environment=here, quick=True, quantity=quantity, unit="", **arguments)

    held = {"plain": [100.0], "good": [2.0], "bad": [50.0]}
    all_rows = rows("held: net", "held bytes", held, baseline="plain", targets={"good": 1 / 40, "bad": 1 / 40})
    all_rows += rows("held: net", "gradient cosine", {"good": [0.9]})
    all_rows += rows("held: net", "held over implied", {"good": [1.05]}, targets={"good": 1.1})
    all_rows += rows("curve: 1%", "gradient cosine", {"a": [0.8]}, details={"a": {"share": 0.01}})
    all_rows += rows("curve: x", "cosine gained", {"a": [0.1]}, details={"a": {"share": 0.01, "least": 0.09}})
    text = "\n".join(table.markdown() for table in tables(all_rows))
    for words in ("at least 40, met", "at least 40, missed", "0.9000", "1.05 times", "target at least 0.09"):
        assert words in text
    plot(all_rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()
    assert (tmp_path / "curve.png").exists()


def test_accuracy_of_quantized_companions_is_paired():
    context = Context("memory", "accuracy: residual network, quantized companions", environment.current(), quick=True)
    rows = {row.method: row for row in memory_training.accuracy("residual network", context)}
    plain, ours = (rows[method].details["by_seed"] for method in (memory_training.PLAIN, memory_training.QUANTIZED))
    details = rows[memory_training.QUANTIZED].details
    assert details["difference"] == sum(ours) / 2 - sum(plain) / 2
    assert details["low"] <= details["difference"] <= details["high"]
    shown = next(table for table in tables(list(rows.values())) if "accuracy" in table.title)
    assert shown.rows[1][3] == f"{details['difference']:+.2f}"


def test_networks_for_accuracy_are_quantized_throughout():
    images = memory_training.scaled(load(None))
    for make_network, _ in memory_training.NETWORKS.values():
        plain = make_network(images)
        model = copy.deepcopy(plain)
        lance.compress_(model, lance.LanceConfig(companions="quantized", target_modules=()))
        batch, loss = images.train.images[:8], loss_of(images.train.labels[:8])
        # Of 8 bytes for a convolution's input and a norm's, 4 and 1 are left.
        assert lance.held_bytes(model, batch, loss) < 0.65 * lance.held_bytes(plain, batch, loss)
