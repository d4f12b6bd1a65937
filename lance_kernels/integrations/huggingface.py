"""Hugging Face Trainer: every `train()` is a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lance_kernels.continual.learner import read_state
from lance_kernels.integrations import Attached, unstepped

STATE_NAME = "null_space_learner.pt"


class NullSpaceCallback(Attached, TrainerCallback):
    """Begins a task when a `Trainer` begins to train, and ends it when that has ended.

    Give the same callback to the trainer of every task; all train the same model. The folder of a checkpoint
    has the learner's state in a file `null_space_learner.pt`. A new process that goes on from one calls
    `load_checkpoint(folder)` before it makes the trainer, and then `train(resume_from_checkpoint=folder)`.

    Args:
        **arguments: of `NullSpaceLearner`, other than `model` and `optimizer`.
    """

    def load_checkpoint(self, folder: str | Path) -> None:
        """Goes on where the learner of a checkpoint was; the trainer loads model and optimizer.

        Args:
            folder: the checkpoint's.

        Raises:
            FileNotFoundError: the checkpoint has no learner's state.
            ValueError: the file is damaged or no learner's, or not of this model's.
        """
        self.load_state_dict(read_state(Path(folder, STATE_NAME)))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Swaps and freezes layers as in the checkpoint that was loaded, before the trainer makes its optimizer."""
        if self._state is not None:
            self.attach(kwargs["model"], [unstepped(kwargs["model"])])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins a task on the trainer's own batches, or goes on with that of the checkpoint that was loaded.

        Raises:
            RuntimeError: training goes on from a checkpoint and the learner does not, or the other way round.
        """
        resumes = state.global_step > 0
        if resumes and (self.learner is None or not (self.learner.restored or self.learner.in_task)):
            raise RuntimeError(
                f"NullSpaceCallback: training goes on from step {state.global_step} without the learner of the steps "
                "before; expected load_checkpoint(folder) before the Trainer was made"
            )
        self.begin_task(kwargs["model"], [kwargs["optimizer"]], kwargs["train_dataloader"], resumes)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the learner's state into the checkpoint's folder."""
        if args.should_save and self.learner is not None and not self.learner.closed:
            self.learner.save(Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", STATE_NAME))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the task."""
        self.end_task(kwargs["train_dataloader"])
