"""Pretraining on half of the classes and fine-tuning on the other half, the same for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lance_kernels as lance
from benchmarks.data import Images, Split
from benchmarks.network import train_mode
from lance_kernels.ops.pack_core import core_bytes


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with momentum and a cosine schedule.

    Attributes:
        epochs: passes over the training split.
        batch: images a step; a last, smaller batch is left out.
        learning_rate: at the start.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    epochs: int
    batch: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over a split in random order, in whole batches."""
    size = min(size, len(split.labels))
    order = torch.randperm(len(split.labels), generator=generator)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield split.images[chosen], split.labels[chosen]


def accuracy(model: nn.Module, split: Split, batch: int = 256) -> float:
    """Percentage of a split that `model` classifies correctly in evaluation mode."""
    model.eval()
    with torch.no_grad():
        hits = [
            (model(images).argmax(1) == labels).sum()
            for images, labels in zip(split.images.split(batch), split.labels.split(batch))
        ]
    return 100 * float(sum(hits)) / len(split.labels)


def train(model: nn.Module, data: Images, recipe: Recipe, seed: int, title: str, *, frozen_norms: bool) -> list[float]:
    """Trains `model` in place.

    Args:
        model: the network.
        data: images and labels.
        recipe: how to train.
        seed: seed of the data's order; equal seeds give equal batches.
        title: heading of the progress bar.
        frozen_norms: keep batch norms in evaluation mode.

    Returns:
        Test accuracy after each epoch, in percent.
    """
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    steps = max(1, recipe.epochs * (len(data.train.labels) // min(recipe.batch, len(data.train.labels))))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    curve = []
    with tqdm(total=steps, desc=title, unit="step", dynamic_ncols=True) as progress:
        for _ in range(recipe.epochs):
            train_mode(model, frozen_norms=frozen_norms)
            for images, labels in batches(data.train, recipe.batch, generator):
                step(model, optimizer, images, labels)
                schedule.step()
                progress.update()
            curve.append(accuracy(model, data.test))
            progress.set_postfix_str(f"test accuracy {curve[-1]:.1f} %")
    return curve


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One training step."""
    optimizer.zero_grad(set_to_none=True)
    cross_entropy(model(images), labels).backward()
    optimizer.step()


def loss_of(labels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Cross-entropy with fixed labels, as a function of the network's output."""
    return lambda output: cross_entropy(output, labels)


def counted_bytes(calibration: lance.Calibration, ranks: dict[str, list[int | None]], bits: int | None) -> int:
    """Bytes of the cores of one batch of the calibration's size."""
    total = 0
    for name, chosen in ranks.items():
        core = [size if rank is None else rank for size, rank in zip(calibration.layers[name].size, chosen)]
        total += core_bytes(core, bits, 4)
    return total
