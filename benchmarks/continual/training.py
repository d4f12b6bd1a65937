"""Trains one method on a sequence of tasks, the same way for all, and notes what it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import lance_kernels as lance
from benchmarks.continual.methods import Joint, Learner
from benchmarks.continual.networks import MultiHead
from benchmarks.continual.tasks import Batch, Tasks, sample
from benchmarks.data import Split
from benchmarks.finetune import Recipe, accuracy, batches

Make = Callable[[MultiHead, torch.optim.Optimizer, int], Learner]


@dataclass(frozen=True)
class Setting:
    """What all methods have in common.

    Attributes:
        tasks: the tasks in their order.
        network: makes an untrained network; equal seeds of the global generator give equal ones.
        recipe: how to train on each task; the learning rate falls to zero by a cosine within it.
        seed: of weights and of the data's order.
        sampled: batches of a task that methods may look at before and after training on it.
    """

    tasks: Tasks
    network: Callable[[], MultiHead]
    recipe: Recipe
    seed: int
    sampled: int = 8

    def untrained(self) -> MultiHead:
        """The network that every method starts from."""
        torch.manual_seed(self.seed)
        return self.network()

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD as the recipe has it."""
        recipe = self.recipe
        return torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, 0, recipe.weight_decay)

    def loader(self, index: int) -> list[Batch]:
        """The sample of a task's batches."""
        return sample(self.tasks[index].train, self.recipe.batch, self.sampled, 1000 * self.seed + index)


@dataclass
class Run:
    """A method on its way through the tasks.

    Attributes:
        setting: what all methods have in common.
        name: the method's name.
        make: makes the method.
        matrix: test accuracy in percent on every task, a row after each task.
        memory: bytes of task memory after each task.
        working: bytes of what was made from task memory and held in each task.
        held: bytes that autograd holds in a step at the beginning of the first and of the last task.
    """

    setting: Setting
    name: str
    make: Make
    matrix: list[list[float]] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    working: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.setting.untrained()
        self.optimizer = self.setting.optimizer(self.model)
        self.learner = self.make(self.model, self.optimizer, self.setting.seed)
        self.begun = -1

    def until_last(self) -> None:
        """Trains on all tasks but the last, and begins that."""
        for index in range(len(self.setting.tasks) - 1):
            self.begin(index)
            self.finish(index)
        self.begin(len(self.setting.tasks) - 1)

    def begin(self, index: int) -> None:
        """Begins a task: selects its head and lets the method look at a sample of it."""
        self.begun = index
        self.model.select(index)
        self.model.train()
        self.optimizer.state.clear()
        loader = self.setting.loader(index)
        self.learner.begin_task(index, loader)
        self.working.append(self.learner.working_bytes())
        if index in (0, len(self.setting.tasks) - 1):
            self.held.append(held_bytes(self.learner, loader[0]))

    def finish(self, index: int) -> None:
        """Trains on a task that has begun, ends it, and tests on all."""
        task, recipe = self.setting.tasks[index], self.setting.recipe
        order = torch.Generator().manual_seed(1000 * self.setting.seed + index)
        self.model.train()
        self._train(task.train, self.learner.step, order, recipe, f"task {index + 1}")
        self.learner.end_task(index, task, self.setting.loader(index))
        self.memory.append(self.learner.memory_bytes())
        self.matrix.append(test(self.model, self.setting.tasks))

    def all_at_once(self) -> None:
        """Trains on all tasks together, as often on each image as `finish` does."""
        assert isinstance(self.learner, Joint)
        learner, (split, tasks) = self.learner, self.setting.tasks.all_at_once()
        order = torch.Generator().manual_seed(1000 * self.setting.seed)

        def step(images: torch.Tensor, chosen: torch.Tensor) -> None:
            self.optimizer.zero_grad(set_to_none=True)
            learner.joint_loss(images, split.labels[chosen], tasks[chosen]).backward()
            self.optimizer.step()

        self.model.train()
        numbered = Split(split.images, torch.arange(len(split.labels)))
        self._train(numbered, step, order, self.setting.recipe, "all tasks")
        self.matrix.append(test(self.model, self.setting.tasks))

    def paused(self) -> Callable[[], None]:
        """Remembers model and optimizer; the function that is returned brings them back."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        state = copy.deepcopy(self.optimizer.state_dict())

        def back() -> None:
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(weights[name])
            self.optimizer.load_state_dict(state)
            self.optimizer.zero_grad(set_to_none=True)

        return back

    def _train(
        self,
        split: Split,
        step: Callable[[torch.Tensor, torch.Tensor], None],
        order: torch.Generator,
        recipe: Recipe,
        title: str,
    ) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = recipe.learning_rate
        steps = recipe.epochs * (len(split.labels) // min(recipe.batch, len(split.labels)))
        schedule = CosineAnnealingLR(self.optimizer, steps)
        with tqdm(total=steps, desc=f"{self.name}, {title}", unit="step", dynamic_ncols=True, leave=False) as progress:
            for _ in range(recipe.epochs):
                for images, labels in batches(split, recipe.batch, order):
                    step(images, labels)
                    schedule.step()
                    progress.update()


def test(model: MultiHead, tasks: Tasks) -> list[float]:
    """Test accuracy on every task, in percent; the selected head stays."""
    selected = model.task
    found = []
    for index, task in enumerate(tasks):
        model.select(index)
        found.append(accuracy(model, task.test))
    model.select(selected)
    return found


class _Loss(nn.Module):
    """A method's loss as the output of a module."""

    def __init__(self, learner: Learner, labels: torch.Tensor) -> None:
        super().__init__()
        self.model, self.learner, self.labels = learner.model, learner, labels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.learner.loss(images, self.labels)


def held_bytes(learner: Learner, batch: Batch) -> int:
    """Bytes that autograd holds between the forward and the backward pass of one of the method's steps."""
    images, labels = batch
    learner.model.train()
    return lance.held_bytes(_Loss(learner, labels), images, lambda loss: loss)


def held_by(setting: Setting, make: Make) -> int:
    """Bytes that autograd holds in a step of a method that has only just begun the first task."""
    model = setting.untrained()
    model.train()
    learner = make(model, setting.optimizer(model), setting.seed)
    loader = setting.loader(0)
    learner.begin_task(0, loader)
    found = held_bytes(learner, loader[0])
    learner.close()
    return found
