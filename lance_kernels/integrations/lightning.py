"""Lightning: every `fit` is a task."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lance_kernels.integrations import Attached


class NullSpaceCallback(Attached, Callback):
    """Begins a task when a `Trainer` begins to fit, and ends it when that has ended.

    The module's `forward` takes a batch's first entry. Give the same callback to the trainer of every task.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a task on the trainer's own batches."""
        self.begin_task(pl_module, trainer.optimizers, self._loader(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the task."""
        self.end_task(self._loader(trainer))

    def _loader(self, trainer: Trainer) -> Any:
        return trainer.train_dataloader
