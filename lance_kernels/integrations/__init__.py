"""`NullSpaceLearner` in other libraries' training loops; each module is imported only by whoever uses its library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lance_kernels.continual import NullSpaceLearner


class Attached:
    """A learner that is made when a loop first shows its model and optimizers, and follows later optimizers.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.

    Attributes:
        learner: the learner; None before the first task.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        self.learner: NullSpaceLearner | None = None

    def begin_task(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], loader: Iterable[Any]) -> None:
        """Begins a task with the loop's present optimizers; one that has not ended, as its loop failed, is dropped.

        Raises:
            ValueError: the model is another than before.
        """
        optimizers = tuple(map(_unwrapped, optimizers))
        if self.learner is None:
            self.learner = NullSpaceLearner(model, optimizers, **self.arguments)
        elif getattr(model, "module", model) is not self.learner.model:
            raise ValueError(
                f"{type(self).__name__}: got another {type(model).__name__} than in the task before; expected the same"
            )
        elif optimizers != self.learner.optimizers:
            self.learner.use_optimizer(optimizers)
        if self.learner.in_task:
            self.learner.drop_task()
        self.learner.begin_task(loader)

    def end_task(self, loader: Iterable[Any]) -> None:
        """Ends the task that has begun."""
        assert self.learner is not None
        self.learner.end_task(loader)

    def close(self) -> None:
        """Leaves a plain model."""
        if self.learner is not None:
            self.learner.close()


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a wrapper (accelerate's, Lightning's) holds, whose steps have hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
