"""`NullSpaceCallback` in the real Lightning trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lance_kernels.integrations.lightning import NullSpaceCallback
from tests.integrations.loops import ARGUMENTS, Watch, data, network


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.05, weight_decay=0.1)


def fit(
    module: pl.LightningModule,
    task: int,
    callback: NullSpaceCallback,
    others: Sequence[pl.Callback] = (),
    shuffle: bool = True,
    path: Path | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback, *others],
        logger=False,
        enable_checkpointing=bool(others),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data(task)), 8, shuffle=shuffle), ckpt_path=path)
    return trainer


def test_two_fits_are_two_tasks() -> None:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    fit(module, 0, callback)
    assert callback.learner is not None
    watch = Watch(callback.learner)
    fit(module, 1, callback)
    watch.check()
    callback.close()
    assert type(module.body[0]) is nn.Linear


class Failing(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.fails = True

    def training_step(self, batch: list[torch.Tensor], index: int) -> None:
        if self.fails and index == 2:
            raise OSError("disk gone")
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(part.parameters(), 0.05, weight_decay=0.1) for part in (self.body[0], self.body[2])]


def test_a_fit_after_a_failed_one_and_two_optimizers() -> None:
    module, callback = Failing(), NullSpaceCallback(**ARGUMENTS)
    with pytest.raises(OSError, match="disk gone"):
        fit(module, 0, callback)
    module.fails = False
    fit(module, 0, callback)
    assert callback.learner is not None
    watch = Watch(callback.learner)
    module.fails = True
    with pytest.raises(OSError, match="disk gone"):
        fit(module, 1, callback)
    module.fails = False
    fit(module, 1, callback)
    watch.check()


class Stopping(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 8:
            raise OSError("stopped")


def first_task() -> tuple[Classifier, NullSpaceCallback]:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    fit(module, 0, callback, shuffle=False)
    return module, callback


def assert_same(module: Classifier, callback: NullSpaceCallback, other: Classifier, later: NullSpaceCallback) -> None:
    assert callback.learner is not None
    assert later.learner is not None
    assert callback.learner.tasks == later.learner.tasks == 2
    for name, weight in module.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
    for name, protection in callback.learner._protected.items():
        assert torch.equal(protection.basis.packed, later.learner._protected[name].basis.packed)


def test_a_new_process_goes_on_in_the_middle_of_a_task(tmp_path: Path) -> None:
    module, callback = first_task()
    fit(module, 1, callback, shuffle=False)
    stopped, broken = first_task()
    saving = ModelCheckpoint(tmp_path, filename="middle", save_on_train_epoch_end=True)
    with pytest.raises(OSError, match="stopped"):
        fit(stopped, 1, broken, [saving, Stopping()], shuffle=False)
    other, later = Classifier(), NullSpaceCallback(**ARGUMENTS)
    later.load_checkpoint(tmp_path / "middle.ckpt")
    fit(other, 1, later, shuffle=False, path=tmp_path / "middle.ckpt")
    assert_same(module, callback, other, later)


def test_a_new_process_goes_on_with_the_next_task(tmp_path: Path) -> None:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    fit(module, 0, callback, shuffle=False).save_checkpoint(tmp_path / "first.ckpt")
    fit(module, 1, callback, shuffle=False)
    other, later = Classifier(), NullSpaceCallback(**ARGUMENTS)
    other.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"])
    later.load_checkpoint(tmp_path / "first.ckpt")
    fit(other, 1, later, shuffle=False)
    assert_same(module, callback, other, later)


def test_a_checkpoint_without_a_learner_is_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", max_epochs=0, logger=False, enable_progress_bar=False)
    trainer.fit(Classifier(), DataLoader(TensorDataset(*data(0)), 8))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="has no state of NullSpaceCallback; expected"):
        NullSpaceCallback(**ARGUMENTS).load_checkpoint(tmp_path / "plain.ckpt")


def test_testing_the_best_weights_leaves_the_learner_as_it_is(tmp_path: Path) -> None:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    saving = ModelCheckpoint(tmp_path, filename="best", save_on_train_epoch_end=True)
    trainer = fit(module, 0, callback, [saving])
    trainer.test(module, DataLoader(TensorDataset(*data(0)), 8), ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert callback.learner is not None
    assert (callback.learner.tasks, callback.learner.in_task) == (1, False)
    assert not module.body[0].bias.requires_grad
    watch = Watch(callback.learner)
    fit(module, 1, callback)
    watch.check()


def test_going_on_from_the_end_of_a_task_ends_it(tmp_path: Path) -> None:
    module, callback = first_task()
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(module, 1, callback, [saving], shuffle=False)
    other, later = Classifier(), NullSpaceCallback(**ARGUMENTS)
    later.load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(RuntimeError, match="from the middle of a task; expected the loop to go on"):
        fit(other, 2, later)
    fit(other, 1, later, shuffle=False, path=tmp_path / "last.ckpt")
    assert_same(module, callback, other, later)
    assert later.learner is not None
    watch = Watch(later.learner)
    fit(other, 2, later)
    watch.check(tasks=3)


def test_a_closed_learner_is_not_saved(tmp_path: Path) -> None:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    trainer = fit(module, 0, callback)
    callback.close()
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert callback.state_dict() == {}
    assert set(torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]) == set(Classifier().state_dict())


class Late(Classifier):
    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        self.body = network()


def test_layers_that_are_made_later_are_named(tmp_path: Path) -> None:
    callback = NullSpaceCallback(**ARGUMENTS)
    fit(Late(), 0, callback).save_checkpoint(tmp_path / "late.ckpt")
    later = NullSpaceCallback(**ARGUMENTS)
    later.load_checkpoint(tmp_path / "late.ckpt")
    with pytest.raises(RuntimeError, match="Late has no parameters before its own setup"):
        fit(Late(), 0, later, path=tmp_path / "late.ckpt")


class Named(Classifier):
    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return cross_entropy(self(batch["x"]), batch["labels"])


def test_batches_of_another_form() -> None:
    module = Named()
    callback = NullSpaceCallback(**ARGUMENTS, forward_fn=lambda model, batch: model(batch["x"]))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
    )
    trainer.fit(module, DataLoader([{"x": x, "labels": y} for x, y in zip(*data(0))], 8))
    assert callback.learner is not None
    assert callback.learner.tasks == 1


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_batches_have_the_precision_of_the_trainer(precision: str) -> None:
    module, callback = Classifier(), NullSpaceCallback(**ARGUMENTS)
    for task in range(2):
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            precision=precision,
        )
        trainer.fit(module, DataLoader(TensorDataset(*data(task)), 8))
    assert callback.learner is not None
    assert callback.learner.tasks == 2


class Interrupted(Classifier):
    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        raise KeyError("test")


def test_a_checkpoint_is_loaded_after_a_test_that_failed(tmp_path: Path) -> None:
    module, callback = Interrupted(), NullSpaceCallback(**ARGUMENTS)
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    trainer = fit(module, 0, callback, [saving])
    with pytest.raises(KeyError):
        trainer.test(module, DataLoader(TensorDataset(*data(0)), 8), verbose=False)
    callback.load_checkpoint(tmp_path / "last.ckpt")
    assert callback.learner is not None
    assert callback.learner.in_task
