"""Lightning: every `fit` is a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lance_kernels._batches import run_model, to_device_of
from lance_kernels.integrations import Attached, unstepped


class NullSpaceCallback(Attached, Callback):
    """Begins a task when a `Trainer` begins to fit, and ends it when that has ended.

    The module's `forward` takes a batch's first entry, in the trainer's precision; `forward_fn` runs others. Give the
    same callback to the trainer of every task. Lightning's checkpoints have the learner's state in them. A new process
    that goes on from one calls `load_checkpoint(path)` before `fit(..., ckpt_path=path)`.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"forward_fn": _forward, **arguments})
        self._restores = True  # whether states that are loaded are taken

    def load_checkpoint(self, path: str | Path, weights_only: bool = True) -> None:
        """Goes on where the learner of a checkpoint was; `fit` loads model and optimizers.

        Args:
            path: the checkpoint.
            weights_only: as for `torch.load`: refuse what could run code.

        Raises:
            ValueError: the checkpoint has no learner's state, or one that is not of this model's.
        """
        states = torch.load(path, map_location="cpu", weights_only=weights_only).get("callbacks", {})
        if not states.get(self.state_key):
            raise ValueError(
                f"NullSpaceCallback: {path} has no state of {self.state_key}; expected the checkpoint of a run with it"
            )
        super().load_state_dict(states[self.state_key])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Swaps and freezes layers as in the checkpoint that was loaded, before the model's state is loaded."""
        self._restores = stage == "fit"
        if stage == "fit" and self._state is not None:
            if next(pl_module.parameters(), None) is None:
                raise RuntimeError(
                    f"NullSpaceCallback: {type(pl_module).__name__} has no parameters before its own setup; expected "
                    "its layers to be made in __init__, where training goes on from a checkpoint"
                )
            self.attach(pl_module, [unstepped(pl_module)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes states again."""
        self._restores = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another learner was, but for the states that Lightning loads to test and validate.

        Raises:
            ValueError: the state is not of this model's learner.
        """
        if self._restores:
            super().load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a task on the trainer's own batches, or goes on with that of the checkpoint."""
        self.begin_task(pl_module, trainer.optimizers, self._loader(trainer), trainer.ckpt_path is not None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the task."""
        self.end_task(self._loader(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a task that was trained to its end in the checkpoint: training has not begun then."""
        learner = self.learner
        if trainer.ckpt_path is not None and learner is not None and learner.in_task and learner.restored:
            self.end_task(self._loader(trainer))

    def _loader(self, trainer: Trainer) -> Any:
        return trainer.train_dataloader


def _forward(model: LightningModule, batch: Any) -> Any:
    return run_model(model, model.trainer.precision_plugin.convert_input(to_device_of(model, batch)))
