"""Suite `models`: whole training steps of `transformers` models, their last two, last four or all layers trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks import methods
from benchmarks.methods import Batch, Method
from benchmarks.methods.steps import measure_steps
from benchmarks.models import natural_images
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.step_tables import plot
from benchmarks.step_tables import tables as step_tables
from benchmarks.suites.memory import prepared
from benchmarks.tables import Table

BATCH, SIZE = 4, 224
# What operations and time of ours over plain's should be at most on ResNet-18, by trained layers.
OPERATIONS = {"last4": 0.87, "all": 0.75}
TIMES = {"last4": 0.95, "all": 0.8}

NOTE = (
    "Random weights that keep the variance, on images with the spectrum of photographs. Such features have far less "
    "low-rank structure than a trained network's: at equal energy ranks and operations are higher than there, as the "
    "suite finetune shows with a pretrained network."
)


def tables(rows: list[Row]) -> list[Table]:
    """One table a case, with what to know of the weights."""
    found = step_tables(rows)
    if found:
        found[-1].caption += f"\n{NOTE}"
    return found


SUITE = register(
    Suite(
        "models",
        "Training steps of whole models",
        "python -m benchmarks --suite models --threads 1",
        tables=tables,
        plot=plot,
        devices=("cpu", "cuda"),
    )
)

MAKERS: dict[str, Callable[[], Method]] = {
    "plain": methods.plain,
    "checkpointed by block": methods.checkpointed,
    "published": methods.published,
    "lance": methods.ours,
    "lance, energy 0.7": partial(methods.ours, energy=0.7),
    "lance, no companions": partial(methods.ours, companions="none"),
    "HOSVD every step": methods.hosvd,
    "ASI": methods.asi,
    "gradient filtering, R=4": methods.gradient_filtering,
    "LoRA, rank 8": methods.lora,
}
CHOICES = {
    "ResNet-18": ("last2", "last4", "all"),
    "MobileNetV2": ("last4",),
    "DeiT-Tiny": ("last2", "last4", "all"),
}


def choose_layers(model: nn.Module, layers: str) -> list[str]:
    """Leaves a model's classifier and its last layers trainable and freezes everything else.

    Args:
        model: a classifier whose last linear layer is its head.
        layers: `last2`, `last4` or `all` of the linear and convolution layers but the head.

    Returns:
        Names of the trained layers without the head.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    chosen = names[:-1] if layers == "all" else names[:-1][-int(layers.removeprefix("last")) :]
    model.requires_grad_(False)
    for name in (*chosen, names[-1]):
        model.get_submodule(name).requires_grad_(True)
    return chosen


def case(name: str, layers: str, timed: bool, context: Context) -> list[Row]:
    """Every method on one model, counted only or `timed` too."""
    torch.manual_seed(context.seed)
    batch, size = (2, 64) if context.quick and name != "DeiT-Tiny" else (2 if context.quick else BATCH, SIZE)
    labels = torch.arange(batch, device=context.device) % 100
    images = [natural_images(batch, size, context.seed + index).to(context.device) for index in range(3)]
    loader: list[Batch] = [(one, labels) for one in images]
    # Random weights that keep the variance: at others' features fade to rank 1, which any method compresses.
    model = prepared(name, images[0].cpu(), "frozen").to(context.device)
    names = choose_layers(model, layers)
    targets = {"operations": OPERATIONS.get(layers), "step time": TIMES.get(layers)}
    chosen = {
        quantity: {"lance": value} for quantity, value in targets.items() if value is not None and name == "ResNet-18"
    }
    return measure_steps(context, model, names, loader, MAKERS, chosen, timed=timed)


def _register() -> None:
    for name, choices in CHOICES.items():
        for layers in choices:
            SUITE.case(f"operations: {name}, {layers}")(partial(case, name, layers, False))
            SUITE.case(f"step: {name}, {layers}")(partial(case, name, layers, True))


_register()
