"""Ways to learn tasks one after the other that need no projection: plain, joint, EWC, experience replay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from benchmarks.continual.networks import MultiHead
from benchmarks.continual.tasks import Batch, Task


class Learner:
    """Plain fine-tuning, and the places where other methods differ from it.

    Args:
        model: the network; a method may change it in place.
        optimizer: trains it.
        seed: of whatever a method draws.
    """

    def __init__(self, model: MultiHead, optimizer: torch.optim.Optimizer, seed: int) -> None:
        self.model, self.optimizer = model, optimizer
        self.generator = torch.Generator().manual_seed(seed)

    def begin_task(self, index: int, loader: Sequence[Batch]) -> None:
        """Before training on a task; `loader` is a sample of its batches."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What a step minimizes."""
        return cross_entropy(self.model(images), labels)

    def after_backward(self) -> None:
        """Between the backward pass and the optimizer's step."""

    def end_task(self, index: int, task: Task, loader: Sequence[Batch]) -> None:
        """After training on a task."""

    def memory_bytes(self) -> int:
        """Bytes that past tasks have left behind."""
        return 0

    def working_bytes(self) -> int:
        """Bytes of what is made from task memory and held while training."""
        return 0

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One training step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(images, labels).backward()
        self.after_backward()
        self.optimizer.step()

    def close(self) -> None:
        """Takes all changes back."""


class Joint(Learner):
    """Training on all tasks at once, the upper bound; the training loop gives it the tasks of the images."""

    def joint_loss(self, images: torch.Tensor, labels: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of every image at its own task's head."""
        return cross_entropy(self.model.of_tasks(images, tasks), labels)


class ElasticWeights(Learner):
    """Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, equation 3).

    The penalty `strength / 2 sum_t sum_i F_t,i (theta_i - theta_t,i)^2` runs over all past tasks. It is kept as
    `sum_t F_t` and `sum_t F_t theta_t`, two tensors the size of the parameters however many tasks there are, which
    give the same gradient. A task's own head has no Fisher information from other tasks.

    Args:
        model: the network.
        optimizer: trains it.
        seed: not used.
        strength: of the penalty, the paper's lambda.
        samples: images over which the Fisher information is averaged.
    """

    def __init__(
        self, model: MultiHead, optimizer: torch.optim.Optimizer, seed: int, strength: float, samples: int = 128
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.strength, self.samples = strength, samples
        self.weights: dict[str, torch.Tensor] = {}
        self.weighted: dict[str, torch.Tensor] = {}

    def after_backward(self) -> None:
        """Adds the penalty's gradient, `strength (sum_t F_t theta - sum_t F_t theta_t)`."""
        for name, parameter in self.model.named_parameters():
            if name in self.weights and parameter.grad is not None:
                parameter.grad += self.strength * (self.weights[name] * parameter.detach() - self.weighted[name])

    def end_task(self, index: int, task: Task, loader: Sequence[Batch]) -> None:
        """Adds the task's Fisher information and parameters."""
        images = torch.cat([images for images, _ in loader])[: self.samples]
        parameters = dict(self.model.named_parameters())
        for name, found in fisher_diagonal(self.model, images).items():
            weighted = found * parameters[name].detach()
            self.weights[name] = self.weights[name] + found if name in self.weights else found
            self.weighted[name] = self.weighted[name] + weighted if name in self.weighted else weighted

    def memory_bytes(self) -> int:
        """The two tensors of every parameter."""
        return sum(tensor.nbytes for kept in (self.weights, self.weighted) for tensor in kept.values())


def fisher_diagonal(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Diagonal of the Fisher information, `E_x sum_y p(y | x) (d log p(y | x) / d theta)^2`.

    The sum over labels is taken in full, so nothing is drawn.

    Args:
        model: the network, in the mode in which it is evaluated.
        images: `(N, C, H, W)`, the samples of `x`.

    Returns:
        One tensor of the parameter's shape for each that the output depends on.
    """
    training = model.training
    model.eval()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}

    def log_probability(values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = functional_call(model, (values, buffers), (image.unsqueeze(0),))
        return logits.log_softmax(1)[0, label]

    by_image = vmap(grad(log_probability), in_dims=(None, 0, None))
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    found = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for label in range(probabilities.shape[1]):
        for part, share in zip(images.split(32), probabilities[:, label].split(32)):
            for name, gradient in by_image(parameters, part, torch.tensor(label)).items():
                found[name] += torch.einsum("n,n...->...", share, gradient.square()) / len(images)
    model.train(training)
    return {name: value for name, value in found.items() if value.any()}


class Replay(Learner):
    """Experience replay with a tiny memory (Chaudhry et al., arXiv 1902.10486).

    Each step's batch is joined by as many images drawn from the memory, which holds the same number of random images
    of every past task. Images are kept as the network takes them, labels in one byte.

    Args:
        model: the network.
        optimizer: trains it.
        seed: of what is kept and drawn.
        kept: images kept of each task.
    """

    def __init__(self, model: MultiHead, optimizer: torch.optim.Optimizer, seed: int, kept: int) -> None:
        super().__init__(model, optimizer, seed)
        self.kept = kept
        self.images = torch.zeros(0)
        self.labels = torch.zeros(0, dtype=torch.uint8)
        self.tasks = torch.zeros(0, dtype=torch.uint8)

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the batch and of as many images from the memory."""
        if not len(self.labels):
            return super().loss(images, labels)
        drawn = torch.randint(len(self.labels), (len(labels),), generator=self.generator)
        tasks = torch.cat([torch.full_like(labels, self.model.task), self.tasks[drawn].long()])
        images = torch.cat([images, self.images[drawn]])
        labels = torch.cat([labels, self.labels[drawn].long()])
        return cross_entropy(self.model.of_tasks(images, tasks), labels)

    def end_task(self, index: int, task: Task, loader: Sequence[Batch]) -> None:
        """Keeps random images of the task."""
        chosen = torch.randperm(len(task.train.labels), generator=self.generator)[: self.kept]
        images, labels = task.train.images[chosen], task.train.labels[chosen].to(torch.uint8)
        self.images = torch.cat([self.images, images]) if len(self.labels) else images
        self.labels = torch.cat([self.labels, labels])
        self.tasks = torch.cat([self.tasks, torch.full_like(labels, index)])

    def memory_bytes(self) -> int:
        """Images, labels and tasks."""
        return self.images.nbytes + self.labels.nbytes + self.tasks.nbytes
