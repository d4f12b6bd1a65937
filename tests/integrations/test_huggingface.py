"""`NullSpaceCallback` in the real Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from lance_kernels.integrations.huggingface import NullSpaceCallback
from tests.integrations.loops import ARGUMENTS, Watch, data, network


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def trainer(model: nn.Module, task: int, callback: NullSpaceCallback, folder: Path) -> Trainer:
    dataset = [{"x": x, "labels": y} for x, y in zip(*data(task))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=dataset, callbacks=[callback])


def test_two_trainers_are_two_tasks(tmp_path: Path) -> None:
    model, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    trainer(model, 0, callback, tmp_path).train()
    assert callback.learner is not None
    watch = Watch(callback.learner)
    trainer(model, 1, callback, tmp_path).train()
    watch.check()
    callback.close()
    assert type(model.body[0]) is nn.Linear


def test_another_model_is_refused(tmp_path: Path) -> None:
    callback = NullSpaceCallback(**ARGUMENTS)
    trainer(Classifier(), 0, callback, tmp_path).train()
    with pytest.raises(ValueError, match="got another Classifier than in the task before"):
        trainer(Classifier(), 1, callback, tmp_path).train()


def test_a_run_after_a_failed_one(tmp_path: Path) -> None:
    model, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    failing = trainer(model, 0, callback, tmp_path)
    failing.training_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        failing.train()
    trainer(model, 0, callback, tmp_path).train()
    assert callback.learner is not None
    assert callback.learner.tasks == 1
