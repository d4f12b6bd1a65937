"""A small residual network for small images, and the choice of its layers that fine-tuning trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad


class Block(nn.Module):
    """Basic residual block: two 3x3 convolutions with batch norm, and a shortcut without parameters.

    The shortcut takes every `stride`-th pixel and pads new channels with zeros (He et al., CVPR 2016, option A), so
    that autograd keeps nothing for it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        out = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(out)) + shortcut)


class ResidualNetwork(nn.Module):
    """A 3x3 stem, stages of basic blocks (each but the first halves the image), average pooling and a linear head.

    Args:
        in_channels: channels of the images.
        classes: number of classes.
        widths: channels of each stage.
        depths: blocks of each stage.
    """

    def __init__(self, in_channels: int, classes: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for index in range(depth):
                blocks.append(Block(channels, width, 2 if stage and not index else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def replace_head(self, classes: int, generator: torch.Generator) -> None:
        """Starts a new head, its weights drawn from `generator`."""
        restart_head(self, classes, generator)


def restart_head(model: nn.Module, classes: int, generator: torch.Generator) -> None:
    """Gives a network a new last linear layer, its weights drawn from `generator`.

    Args:
        model: the network; its last linear layer is its head.
        classes: outputs of the head.
        generator: source of the weights.

    Raises:
        ValueError: the network has no linear layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"restart_head: {type(model).__name__} has no linear layer; expected a classifier")
    old = model.get_submodule(linears[-1])
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, classes)
    bound = old.in_features**-0.5
    with torch.no_grad():
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.zero_()
    model.set_submodule(linears[-1], head.to(old.weight.device))


def convolutions(model: nn.Module) -> list[str]:
    """Names of the convolutions in the order in which they run."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


def freeze_for_fine_tuning(model: ResidualNetwork, layers: str) -> list[str]:
    """Leaves the head and the chosen convolutions trainable and freezes everything else.

    Batch norms are frozen whole: their affine parameters get no gradient and `train_mode` keeps their statistics.

    Args:
        model: the network.
        layers: `last4` or `last2`, the last four or two convolutions, or `all`.

    Returns:
        Names of the trainable convolutions.
    """
    names = convolutions(model)
    chosen = names if layers == "all" else names[-int(layers.removeprefix("last")) :]
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    return chosen


def train_mode(model: nn.Module, *, frozen_norms: bool) -> nn.Module:
    """Puts `model` into training mode, its batch norms into evaluation mode when they are frozen."""
    model.train()
    if frozen_norms:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    return model
