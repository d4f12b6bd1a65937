"""Networks with one head a task: small ones for two cores, and those of the papers.

No layer has a bias, as in the networks of gradient projection memory (Saha et al., ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class MultiHead(nn.Module):
    """A body and linear heads; `select` chooses the head that `forward` uses.

    Args:
        body: maps images to `(B, features)`.
        features: size of the body's output.
        classes: outputs of each head.
        heads: number of heads; with a single one all tasks share it.

    Attributes:
        task: index of the selected head.
    """

    def __init__(self, body: nn.Module, features: int, classes: int, heads: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList([nn.Linear(features, classes, bias=False) for _ in range(heads)])
        self.task = 0

    @property
    def head_patterns(self) -> tuple[str, ...]:
        """Patterns of the heads that belong to one task each; none where all tasks share one."""
        return (r"heads\.\d+",) if len(self.heads) > 1 else ()

    def protected_layers(self) -> dict[str, nn.Conv2d | nn.Linear]:
        """Convolutions and linear layers that all tasks share, by name."""
        layers = {n: m for n, m in self.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        shared = len(self.heads) == 1
        return {name: layer for name, layer in layers.items() if shared or not name.startswith("heads.")}

    def select(self, task: int) -> None:
        """Makes `forward` use a task's head."""
        self.task = min(task, len(self.heads) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the selected head, `(B, classes)`."""
        return self.heads[self.task](self.body(x))

    def of_tasks(self, x: torch.Tensor, tasks: torch.Tensor) -> torch.Tensor:
        """Logits of images of several tasks.

        Args:
            x: images.
            tasks: the task of each, `(B,)`.

        Returns:
            Logits of each image's own head, `(B, classes)`.
        """
        features = self.body(x)
        logits = torch.stack([head(features) for head in self.heads], dim=1)
        return logits[torch.arange(len(x), device=x.device), tasks.clamp_max(len(self.heads) - 1)]


def perceptron(size: torch.Size, classes: int, heads: int, widths: Sequence[int] = (100, 100)) -> MultiHead:
    """A fully connected network; two hidden layers of 100 are those of the GPM paper on permuted MNIST."""
    layers: list[nn.Module] = [nn.Flatten()]
    features = size.numel()
    for width in widths:
        layers += [nn.Linear(features, width, bias=False), nn.ReLU()]
        features = width
    return MultiHead(nn.Sequential(*layers), features, classes, heads)


def convolutional(
    size: torch.Size, classes: int, heads: int, widths: Sequence[int] = (32, 32, 32), features: int = 64
) -> MultiHead:
    """3x3 convolutions, each with ReLU and pooling by two, and a hidden linear layer; no norms."""
    layers: list[nn.Module] = []
    channels, height, width = size
    for out in widths:
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width = out, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, features, bias=False), nn.ReLU()]
    return MultiHead(_initialized(nn.Sequential(*layers)), features, classes, heads)


def alexnet_like(size: torch.Size, classes: int, heads: int, width: int = 64, dropout: bool = True) -> MultiHead:
    """The network of the GPM and LANCE papers on Split CIFAR-100: kernels 4, 3 and 2, then two wide linear layers.

    Args:
        size: of an image.
        classes: outputs of a head.
        heads: number of heads.
        width: channels of the first convolution; 64 in the papers. Linear layers are 32 times as wide.
        dropout: with dropout of 0.2 and 0.5 where the papers have it.
    """
    channels, extent, _ = size
    layers: list[nn.Module] = []
    for kernel, out, rate in ((4, width, 0.2), (3, 2 * width, 0.2), (2, 4 * width, 0.5)):
        layers += [nn.Conv2d(channels, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.Dropout(rate)] * dropout + [nn.MaxPool2d(2)]
        channels, extent = out, (extent - kernel + 1) // 2
    layers.append(nn.Flatten())
    features = channels * extent**2
    for _ in range(2):
        layers += [nn.Linear(features, 32 * width, bias=False), nn.BatchNorm1d(32 * width), nn.ReLU()]
        layers += [nn.Dropout(0.5)] * dropout
        features = 32 * width
    return MultiHead(nn.Sequential(*layers), features, classes, heads)


class _Block(nn.Module):
    """Basic residual block with a 1x1 convolution as shortcut where sizes differ (He et al., CVPR 2016, option B)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


def reduced_resnet18(size: torch.Size, classes: int, heads: int, width: int = 20) -> MultiHead:
    """ResNet-18 with 20 base filters, as in the papers (Lopez-Paz and Ranzato, NeurIPS 2017).

    The stem has stride 2 for images above 64 pixels (Split MiniImageNet), else 1.
    """
    channels, extent, _ = size
    stride = 2 if extent > 64 else 1
    extent = -(-extent // stride)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width, 8 * width)):
        for index in range(2):
            step = 2 if stage and not index else 1
            layers.append(_Block(channels, out, step))
            channels, extent = out, -(-extent // step)
    layers += [nn.AvgPool2d(2), nn.Flatten()]
    return MultiHead(nn.Sequential(*layers), channels * (extent // 2) ** 2, classes, heads)


def _initialized(body: nn.Module) -> nn.Module:
    """He initialization, which keeps the size of activations through layers without norms."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return body
