"""Cases of the suite `memory` on the demo's fine-tuning network: the gradient that a budget of bytes buys."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lance_kernels as lance
from benchmarks.data import load
from benchmarks.finetune import Recipe, batches, counted_bytes, loss_of
from benchmarks.network import freeze_for_fine_tuning, train_mode
from benchmarks.pretrained import pretrained
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.memory import SUITE

PLANNED, ONE_ENERGY, PUBLISHED = "lance, planned", "lance, one energy, 4 bits", "published"
SHARES = (0.001, 0.002, 0.005, 0.01, 0.03, 0.1, 0.3)
ENERGIES = [step / 200 for step in range(199, 19, -1)]
GAINS = {0.7: 0.09, 0.85: 0.06}
CONFIGS = {
    PUBLISHED: lance.LanceConfig.published(),
    ONE_ENERGY: lance.LanceConfig(companions="none"),
    # Judged by its cosine here.
    PLANNED: lance.LanceConfig(companions="none", rounding_weight=1.0),
}
BATCH = 64


class Network:
    """The demo's network, pretrained on half of the classes, ready to be fine-tuned on the rest.

    Attributes:
        model: the network, plain.
        names: its last four convolutions.
        data: the classes to fine-tune on.
    """

    def __init__(self, data: Path | None, quick: bool, seed: int) -> None:
        images = load(data)
        _, self.data = images.halves()
        small = images.train.images.shape[-1] <= 16
        epochs = 1 if quick else 8 if small else 6
        self.model = pretrained(images, Recipe(epochs, BATCH, 0.05), seed)
        self.model.replace_head(self.data.classes, torch.Generator().manual_seed(seed))
        self.names = freeze_for_fine_tuning(self.model, "last4")
        train_mode(self.model, frozen_norms=True)

    @cache  # noqa: B019 - the networks of a process are few and live as long as it
    def form(self, method: str) -> tuple[nn.Module, lance.Calibration]:
        """A copy of the network, compressed as `method` does and calibrated on up to 100 batches."""
        model = copy.deepcopy(self.model)
        lance.compress_(model, replace(CONFIGS[method], target_modules=self.names))
        loader = [images for images, _ in batches(self.data.train, BATCH, torch.Generator().manual_seed(0))]
        return model, lance.calibrate(model, loader, progress=False)

    def cosines(self, method: str, count: int) -> list[float]:
        """Gradient cosine of every layer of a form as it is now, the mean over `count` batches."""
        ours, true = self.gradients(self.form(method)[0], count), self.gradients(self.model, count)
        similarity = partial(nn.functional.cosine_similarity, dim=0)
        pairs = [[similarity(a.flatten(), b.flatten()) for a, b in zip(*two)] for two in zip(ours, true)]
        return torch.tensor(pairs).mean(0).tolist()

    def gradients(self, model: nn.Module, count: int) -> list[list[torch.Tensor]]:
        """Weight gradients of the four layers for the first `count` batches of another order."""
        weights = [model.get_submodule(name).weight for name in self.names]
        found = []
        for images, labels in batches(self.data.train, BATCH, torch.Generator().manual_seed(1)):
            found.append(list(torch.autograd.grad(loss_of(labels)(model(images)), weights)))
            if len(found) == count:
                break
        return found


@cache
def network(data: Path | None, quick: bool, seed: int) -> Network:
    """The network, pretrained once a process."""
    return Network(data, quick, seed)


def dense_bytes(calibration: lance.Calibration) -> int:
    """Bytes of the layers' inputs."""
    return sum(4 * torch.Size(spectrum.size).numel() for spectrum in calibration.layers.values())


def fit_energy(net: Network, method: str, budget: int) -> bool:
    """Gives a form the factors of the highest energy whose bytes fit into the budget; False when none does."""
    model, calibration = net.form(method)
    for energy in ENERGIES:
        ranks = calibration.apply(model, replace(CONFIGS[method], energy=energy))
        if counted_bytes(calibration, ranks, CONFIGS[method].core_bits) <= budget:
            return True
    return False


def fit_plan(net: Network, budget: int) -> lance.Plan | None:
    """Gives the planned form the ranks and bits of its plan; None where the budget is below the least possible."""
    model, calibration = net.form(PLANNED)
    try:
        planned = lance.plan(model, calibration, budget)
    except ValueError:
        return None
    planned.apply(model, calibration)
    return planned


def at_budget(share: float, context: Context) -> list[Row]:
    """Gradient cosine of every method within a share of the inputs' bytes."""
    net, count = _network(context), _count(context)
    budget = int(share * dense_bytes(net.form(PLANNED)[1]))
    found = {}
    for method in (PUBLISHED, ONE_ENERGY):
        if fit_energy(net, method, budget):
            found[method] = [_mean(net.cosines(method, count))]
    if fit_plan(net, budget) is not None:
        found[PLANNED] = [_mean(net.cosines(PLANNED, count))]
    details = {method: {"share": share} for method in found}
    return _rows(context, found, "gradient cosine", details)


def at_published(energy: float, context: Context) -> list[Row]:
    """What the plan gains at the bytes that the published form takes at an energy."""
    net, count = _network(context), _count(context)
    model, calibration = net.form(PUBLISHED)
    ranks = calibration.apply(model, replace(CONFIGS[PUBLISHED], energy=energy))
    budget = counted_bytes(calibration, ranks, None)
    share = budget / dense_bytes(calibration)
    published = _mean(net.cosines(PUBLISHED, count))
    if fit_plan(net, budget) is None:
        return _rows(context, {PUBLISHED: [published]}, "gradient cosine", {PUBLISHED: {"share": share}})
    planned = _mean(net.cosines(PLANNED, count))
    details = {method: {"share": share} for method in (PUBLISHED, PLANNED)}
    rows = _rows(context, {PUBLISHED: [published], PLANNED: [planned]}, "gradient cosine", details)
    gain = {PLANNED: {"share": share, "least": GAINS[energy]}}
    return rows + _rows(context, {PLANNED: [planned - published]}, "cosine gained", gain)


def prediction(context: Context) -> list[Row]:
    """Rank correlation, over layers and budgets, of the plan's predicted errors with the measured ones."""
    from scipy.stats import spearmanr

    net, count = _network(context), _count(context)
    predicted: list[float] = []
    measured: list[float] = []
    for share in SHARES:
        planned = fit_plan(net, int(share * dense_bytes(net.form(PLANNED)[1])))
        if planned is None:
            continue
        predicted += [layer.predicted_error for layer in planned.layers.values()]
        measured += [1 - cosine for cosine in net.cosines(PLANNED, count)]
    correlation = float(spearmanr(predicted, measured).statistic)
    details = {PLANNED: {"least": 0.9, "predicted": predicted, "measured": measured}}
    return _rows(context, {PLANNED: [correlation]}, "rank correlation of predicted and measured error", details)


def _rows(context: Context, samples: dict[str, list[float]], quantity: str, details: dict[str, Any]) -> list[Row]:
    return context.rows(
        samples,
        quantity=quantity,
        unit="",
        details=details,
    )


def _network(context: Context) -> Network:
    return network(context.data, context.quick, context.seed)


def _count(context: Context) -> int:
    return 2 if context.quick else 8


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _register() -> None:
    def add(case: str, measure: Callable[[Context], list[Row]]) -> None:
        SUITE.case(f"curve: {case}")(measure)

    for share in SHARES:
        add(f"{100 * share:g}%", partial(at_budget, share))
    for energy in GAINS:
        add(f"the published form's at energy {energy:g}", partial(at_published, energy))
    add("all budgets", prediction)


_register()
