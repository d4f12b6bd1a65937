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
        self._state: dict[str, Any] | None = None  # of a learner that is still to be made

    def begin_task(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        loader: Iterable[Any],
        resumes: bool = False,
    ) -> None:
        """Begins a task with the loop's present optimizers; one that has not ended, as its loop failed, is dropped.

        Where a state was loaded that was taken in the middle of a task, that task goes on.

        Args:
            model: the loop's model.
            optimizers: the loop's optimizers.
            loader: the task's batches.
            resumes: whether the loop goes on from a checkpoint.

        Raises:
            ValueError: the model is another than before, or a state that was loaded is not of its learner.
            RuntimeError: a state from the middle of a task was loaded, and the loop begins another.
        """
        learner = self.attach(model, optimizers)
        if learner.in_task and learner.restored:
            if not resumes:
                raise RuntimeError(
                    f"{type(self).__name__}: the state that was loaded is from the middle of a task; expected the loop "
                    "to go on from the same checkpoint, which ends a task that was trained to its end, too, or "
                    "learner.drop_task() before"
                )
            learner.restored = False
            return
        if learner.in_task:
            learner.drop_task()
        learner.begin_task(loader)

    def attach(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> NullSpaceLearner:
        """The learner, made if there is none yet, with the loop's present optimizers.

        Raises:
            ValueError: the model is another than before, or a state that was loaded is not of its learner.
        """
        optimizers = tuple(map(_unwrapped, optimizers))
        if self.learner is None:
            learner = NullSpaceLearner(model, optimizers, **self.arguments)
            if self._state is not None:
                try:
                    learner.load_state_dict(self._state)
                except ValueError:
                    learner.close()
                    raise
            self.learner, self._state = learner, None
        elif getattr(model, "module", model) is not self.learner.model:
            raise ValueError(
                f"{type(self).__name__}: got another {type(model).__name__} than in the task before; expected the same"
            )
        elif optimizers != self.learner.optimizers:
            self.learner.use_optimizer(optimizers)
        return self.learner

    def end_task(self, loader: Iterable[Any]) -> None:
        """Ends the task that has begun."""
        assert self.learner is not None
        self.learner.end_task(loader)

    def state_dict(self) -> dict[str, Any]:
        """The learner's state; empty before the first task and after `close`."""
        return {} if self.learner is None or self.learner.closed else self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another learner of the same model and arguments was; the model's own state is loaded beside it.

        Where there is no learner yet, it takes the state when it is made.

        Raises:
            ValueError: the state is not of this model's learner.
        """
        if self.learner is None:
            self._state = state or None
        elif state:
            self.learner.load_state_dict(state)

    def close(self) -> None:
        """Leaves a plain model."""
        if self.learner is not None:
            self.learner.close()


def unstepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of all of a model's parameters, for a learner that is made before the loop's own optimizers."""
    return torch.optim.SGD(model.parameters(), 0.0)


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that a wrapper (accelerate's, Lightning's) holds, whose steps have hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
