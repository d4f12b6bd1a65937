"""Avalanche: every experience is a task."""

from __future__ import annotations

from typing import Any

from avalanche.training.plugins import SupervisedPlugin
from torch.utils.data import DataLoader

from lance_kernels.integrations import Attached


class NullSpacePlugin(Attached, SupervisedPlugin):  # type: ignore[misc]
    """Begins a task before a strategy trains on an experience, and ends it afterwards.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.
    """

    def __init__(self, **arguments: Any) -> None:
        SupervisedPlugin.__init__(self)
        Attached.__init__(self, **arguments)

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Begins a task, once the strategy has adapted model, optimizer and data to the experience."""
        self.begin_task(strategy.model, [strategy.optimizer], self._loader(strategy))

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Ends the task."""
        self.end_task(self._loader(strategy))

    def _loader(self, strategy: Any) -> DataLoader[Any]:
        return DataLoader(strategy.adapted_dataset, batch_size=strategy.train_mb_size)
