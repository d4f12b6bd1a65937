"""Hugging Face Trainer: every `train()` is a task."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lance_kernels.integrations import Attached


class NullSpaceCallback(Attached, TrainerCallback):
    """Begins a task when a `Trainer` begins to train, and ends it when that has ended.

    Give the same callback to the trainer of every task; all train the same model.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a task on the trainer's own batches."""
        self.begin_task(kwargs["model"], [kwargs["optimizer"]], kwargs["train_dataloader"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the task."""
        self.end_task(kwargs["train_dataloader"])
