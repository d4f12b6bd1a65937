"""Small networks and tasks for the tests of continual learning, and the figures their guarantees are about."""

from __future__ import annotations

import torch
from torch import nn

import lance_kernels as lance

SIZE = (3, 8, 8)


def network() -> nn.Sequential:
    """Convolutions with padding, stride, dilation and groups, and linear layers; nothing random between calls."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 2, dilation=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def task(number: int, batches: int = 2, size: tuple[int, ...] = SIZE) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a task: images from a few directions of its own, and labels."""
    generator = torch.Generator().manual_seed(number)
    directions = torch.randn(4, torch.Size(size).numel(), generator=generator)
    return [
        (
            (torch.randn(8, 4, generator=generator) @ directions).view(8, *size),
            torch.randint(0, 5, (8,), generator=generator),
        )
        for _ in range(batches)
    ]


def train(model, optimizer, data, steps, before_step=None):
    """Some training steps; `before_step` is called with the model between backward and step."""
    model.train()
    for step in range(steps):
        images, labels = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()


def learner_of(model, optimizer, **arguments) -> lance.continual.NullSpaceLearner:
    return lance.continual.NullSpaceLearner(model, optimizer, **{"energy": 0.9, "progress": False, **arguments})


def weights(learner) -> dict[str, torch.Tensor]:
    """Copies of the protected weights, float64."""
    return {name: p.layer.weight.detach().double().clone() for name, p in learner._protected.items()}


def drifts(learner, before) -> dict[str, tuple[float, float]]:
    """By layer that has protected and free directions: the weight's relative change along the former, and in all.

    The protected directions are formed explicitly, in float64.
    """
    found = {}
    for name, protection in learner._protected.items():
        if not protection.basis.used or protection.full:
            continue
        now = protection.layer.weight.detach().double()
        change = (now - before[name]).reshape(protection.groups, -1, protection.size)
        along = [change[group] @ protection.basis.dense(group) for group in range(protection.groups)]
        norm = now.norm()
        found[name] = (float(torch.cat([a.flatten() for a in along]).norm() / norm), float(change.norm() / norm))
    return found


def assert_protected(learner, before, tolerance: float = 1e-6) -> None:
    """Every layer that is not full moved by a hundredth at least, and by no more than `tolerance` where it must not."""
    figures = drifts(learner, before)
    assert figures
    for name, (along, whole) in figures.items():
        assert along <= tolerance, (name, along)
        assert whole >= 1e-2, (name, whole)
