"""Sequences of tasks: the classes of a data set in groups, or all its images under another permutation each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.data import Images, Split
from benchmarks.finetune import batches

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: its name in tables.
        train: training split, labels from zero within the task.
        test: test split.
    """

    name: str
    train: Split
    test: Split


@dataclass(frozen=True)
class Tasks:
    """Tasks in the order in which they come.

    Attributes:
        name: the sequence's name in tables.
        tasks: the tasks.
        classes: classes of each task.
        own_heads: whether every task has a head of its own (task-incremental), or all share one (domain-incremental).
    """

    name: str
    tasks: Sequence[Task]
    classes: int
    own_heads: bool

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: int) -> Task:
        return self.tasks[index]

    @property
    def image_size(self) -> torch.Size:
        """Channels, height and width of the images."""
        return self.tasks[0].train.images.shape[1:]

    def all_at_once(self) -> tuple[Split, torch.Tensor]:
        """The training images of all tasks, labels within their tasks, and the task of each, `(N,)`."""
        images = torch.cat([task.train.images for task in self.tasks])
        labels = torch.cat([task.train.labels for task in self.tasks])
        owners = torch.cat([torch.full_like(task.train.labels, index) for index, task in enumerate(self.tasks)])
        return Split(images, labels), owners


def split_classes(name: str, images: Images, classes: int, seed: int) -> Tasks:
    """Tasks of a few classes each, in an order of classes drawn from `seed`.

    Images are scaled by the mean and the deviation of each channel over the whole training split.

    Args:
        name: name of the sequence.
        images: the data set.
        classes: classes a task.
        seed: of the order.

    Raises:
        ValueError: the number of classes does not divide.
    """
    if classes < 2 or images.classes % classes:
        raise ValueError(f"split_classes: classes is {classes}; expected a divisor of {images.classes}, at least 2")
    order = torch.randperm(images.classes, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [order[start : start + classes] for start in range(0, images.classes, classes)]
    return _in_groups(name, images, groups)


def one_after_the_other(name: str, images: Images, classes: int, seed: int) -> Tasks:
    """Tasks of consecutive classes, in an order of the tasks drawn from `seed`: data sets that were put in a row.

    Args:
        name: name of the sequence.
        images: the data sets, `classes` classes each.
        classes: classes a task.
        seed: of the order.
    """
    order = torch.randperm(images.classes // classes, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [list(range(classes * place, classes * (place + 1))) for place in order]
    return _in_groups(name, images, groups)


def permuted(name: str, images: Images, count: int, seed: int) -> Tasks:
    """The whole data set under `count` permutations of the pixels, the first of them the identity.

    Args:
        name: name of the sequence.
        images: the data set.
        count: number of tasks.
        seed: of the permutations.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"permuted: count is {count}; expected at least 1")
    train, test = _standardized(images)
    generator = torch.Generator().manual_seed(seed)
    size = train.images[0].numel()
    orders = [torch.arange(size), *(torch.randperm(size, generator=generator) for _ in range(count - 1))]

    def turned(split: Split, order: torch.Tensor) -> Split:
        return Split(split.images.flatten(1)[:, order].view_as(split.images), split.labels)

    tasks = [Task(f"permutation {n}", turned(train, order), turned(test, order)) for n, order in enumerate(orders)]
    return Tasks(name, tasks, images.classes, False)


def subset(images: Images, train: int | None = None, test: int | None = None) -> Images:
    """The first images of every class.

    Args:
        images: the data set.
        train: training images a class; None for all.
        test: test images a class; None for all.
    """
    return Images(images.name, _first(images.train, train), _first(images.test, test), images.classes)


def sample(split: Split, batch: int, count: int, seed: int) -> list[Batch]:
    """At most `count` batches of a split, in an order drawn from `seed`."""
    order = torch.Generator().manual_seed(seed)
    return [pair for pair, _ in zip(batches(split, batch, order), range(count))]


def _first(split: Split, count: int | None) -> Split:
    if count is None:
        return split
    chosen = torch.cat([(split.labels == label).nonzero()[:count, 0] for label in split.labels.unique()])
    chosen = chosen.sort().values
    return Split(split.images[chosen], split.labels[chosen])


def _standardized(images: Images) -> tuple[Split, Split]:
    mean = images.train.images.mean((0, 2, 3), keepdim=True)
    deviation = images.train.images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    train, test = (Split((part.images - mean) / deviation, part.labels) for part in (images.train, images.test))
    return train, test


def _of(split: Split, classes: Sequence[int]) -> Split:
    """The images of some classes, relabelled from zero in their order."""
    places = torch.full((int(split.labels.max()) + 1,), -1)
    places[torch.tensor(classes)] = torch.arange(len(classes))
    chosen = places[split.labels] >= 0
    return Split(split.images[chosen], places[split.labels[chosen]])


def _in_groups(name: str, images: Images, groups: Sequence[Sequence[int]]) -> Tasks:
    """A task for each of some groups of as many classes, with heads of their own."""
    train, test = _standardized(images)
    tasks = [Task(_listed(group), _of(train, group), _of(test, group)) for group in groups]
    return Tasks(name, tasks, len(groups[0]), True)


def _listed(classes: Sequence[int]) -> str:
    return "classes " + ", ".join(map(str, classes))
