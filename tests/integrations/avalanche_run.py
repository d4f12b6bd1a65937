"""`python -m tests.integrations.avalanche_run`: `NullSpacePlugin` in the real Avalanche; prints "held" at its end.

A process of its own, for Avalanche imports torchvision, whose wheel changes what others import beside a PyTorch for the
CPU. Avalanche also imports a logger's client, which is not needed here and stands empty.
"""

from __future__ import annotations

import copy
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.integrations.loops import ARGUMENTS, Watch, data, network
from tests.torchvision_operators import define_torchvision_operators

ROOT = Path(__file__).parents[2]


class Labelled(TensorDataset):
    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(x, y)
        self.targets = y.tolist()


def main() -> None:
    sys.path += [str(ROOT / "build" / "avalanche"), str(ROOT / "build" / "torchvision")]
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.modules["wandb"].__spec__ = ModuleSpec("wandb", None)
    define_torchvision_operators()
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.supervised import Naive

    from lance_kernels.integrations.avalanche import NullSpacePlugin

    sets = [as_classification_dataset(Labelled(*data(task))) for task in range(2)]

    def naive(model: nn.Module, plugin: NullSpacePlugin) -> Naive:
        return Naive(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=8,
            train_epochs=2,
            plugins=[plugin],
        )

    model, plugin = network(), NullSpacePlugin(**ARGUMENTS)
    strategy = naive(model, plugin)
    first, second = benchmark_from_datasets(train=sets, test=sets).train_stream
    strategy.train(first)
    assert plugin.learner is not None
    watch = Watch(plugin.learner)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(plugin.state_dict())
    strategy.train(second)
    watch.check()

    other, later = network(), NullSpacePlugin(**ARGUMENTS)
    other.load_state_dict(weights)
    later.load_state_dict(state)
    naive(other, later).train(second)
    assert later.learner is not None
    watch.learner = later.learner
    watch.check()
    plugin.close()
    assert type(model[0]) is nn.Linear
    print("held")


if __name__ == "__main__":
    main()
