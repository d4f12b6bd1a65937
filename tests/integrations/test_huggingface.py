"""`NullSpaceCallback` in the real Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from lance_kernels.integrations.huggingface import STATE_NAME, NullSpaceCallback
from tests.integrations.loops import ARGUMENTS, Watch, data, network


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def trainer(model: nn.Module, task: int, callback: NullSpaceCallback, folder: Path, save: str = "no") -> Trainer:
    dataset = [{"x": x, "labels": y} for x, y in zip(*data(task))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        weight_decay=0.1,
        report_to=[],
        save_strategy=save,
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


class Stopping(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def first_task(folder: Path) -> tuple[Classifier, NullSpaceCallback]:
    model, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    trainer(model, 0, callback, folder).train()
    return model, callback


def test_a_new_process_goes_on_in_the_middle_of_a_task(tmp_path: Path) -> None:
    model, callback = first_task(tmp_path)
    trainer(model, 1, callback, tmp_path / "whole").train()
    stopped, broken = first_task(tmp_path)
    run = trainer(stopped, 1, broken, tmp_path / "parts", save="epoch")
    run.add_callback(Stopping())
    with pytest.raises(KeyboardInterrupt):
        run.train()

    other, later, checkpoint = Classifier(), NullSpaceCallback(**ARGUMENTS), str(tmp_path / "parts/checkpoint-6")
    later.load_checkpoint(checkpoint)
    trainer(other, 1, later, tmp_path / "parts").train(resume_from_checkpoint=checkpoint)
    assert later.learner is not None
    assert callback.learner is not None
    assert later.learner.tasks == 2
    for name, weight in weights(model).items():
        assert torch.equal(weight, weights(other)[name]), name
    for name, protection in callback.learner._protected.items():
        assert torch.equal(protection.basis.packed, later.learner._protected[name].basis.packed)


def test_a_checkpoint_without_a_learner_is_refused(tmp_path: Path) -> None:
    trainer(Classifier(), 0, NullSpaceCallback(**ARGUMENTS), tmp_path, save="epoch").train()
    checkpoint = tmp_path / "checkpoint-6"
    again = trainer(Classifier(), 0, NullSpaceCallback(**ARGUMENTS), tmp_path)
    with pytest.raises(RuntimeError, match=r"goes on from step 6 without .* expected load_checkpoint\(folder\)"):
        again.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / STATE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=STATE_NAME):
        NullSpaceCallback(**ARGUMENTS).load_checkpoint(checkpoint)


def test_a_state_of_another_model_leaves_the_model_plain(tmp_path: Path) -> None:
    _, callback = first_task(tmp_path)
    model, later = Classifier(), NullSpaceCallback(**ARGUMENTS)
    model.body[2] = nn.Linear(16, 4)
    later.load_state_dict(callback.state_dict())
    with pytest.raises(ValueError, match=r"NullSpaceLearner\.load_state_dict: layer 'body\.2'"):
        trainer(model, 1, later, tmp_path)
    assert type(model.body[0]) is nn.Linear
    assert later.learner is None


def test_a_finished_task_is_ended_once(tmp_path: Path) -> None:
    model, callback = Classifier(), NullSpaceCallback(**ARGUMENTS, after_first_task="train")
    trainer(model, 0, callback, tmp_path, save="epoch").train()
    last = str(tmp_path / "checkpoint-12")
    with pytest.raises(RuntimeError, match="goes on from step 12 without the learner of the steps before"):
        trainer(model, 0, callback, tmp_path).train(resume_from_checkpoint=last)
    other, later = Classifier(), NullSpaceCallback(**ARGUMENTS, after_first_task="train")
    later.load_checkpoint(last)
    with pytest.raises(RuntimeError, match="from the middle of a task; expected the loop to go on"):
        trainer(other, 1, later, tmp_path / "next").train()
    trainer(other, 0, later, tmp_path).train(resume_from_checkpoint=last)
    assert later.learner is not None
    assert later.learner.tasks == 1
    watch = Watch(later.learner)
    trainer(other, 1, later, tmp_path / "next").train()
    watch.check()
