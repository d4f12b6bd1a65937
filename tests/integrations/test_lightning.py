"""`NullSpaceCallback` in the real Lightning trainer."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.05, weight_decay=0.1)


def fit(module: pl.LightningModule, task: int, callback: NullSpaceCallback) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data(task)), 8, shuffle=True))


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
