"""What the tests of all integrations share: two small tasks, and what has to hold after the second."""

from __future__ import annotations

import torch
from torch import nn

from lance_kernels.continual import NullSpaceLearner

ARGUMENTS = {"energy": 0.9, "progress": False}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def data(task: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(task)
    directions = torch.randn(3, 8, generator=generator)
    x = torch.randn(48, 3, generator=generator) @ directions
    return x, x[:, :3].argmax(1)


class Watch:
    """Remembers, at the end of the first task, what later ones must keep."""

    def __init__(self, learner: NullSpaceLearner) -> None:
        self.learner = learner
        self.weights = {n: p.layer.weight.detach().clone() for n, p in learner._protected.items()}
        self.kept = {n: p.basis.dense().float() for n, p in learner._protected.items()}

    def check(self, tasks: int = 2) -> None:
        assert self.learner.tasks == tasks
        moved = {n: p.layer.weight.detach() - self.weights[n] for n, p in self.learner._protected.items()}
        for name, change in moved.items():
            assert (change @ self.kept[name]).norm() < 1e-6 * self.weights[name].norm()
        assert max(float(change.norm()) for change in moved.values()) > 1e-3
