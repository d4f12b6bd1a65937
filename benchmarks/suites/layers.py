"""Suite `layers`: one layer of well-known networks at a time, every method on the same step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from benchmarks import methods
from benchmarks.methods import Batch, Method
from benchmarks.methods.steps import measure_steps
from benchmarks.models import natural_images
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.step_tables import plot, tables

SUITE = register(
    Suite(
        "layers",
        "Single layers of well-known networks",
        "python -m benchmarks --suite layers",
        tables=tables,
        plot=plot,
        devices=("cpu", "cuda"),
    )
)


@dataclass(frozen=True)
class Shape:
    """A layer and its input.

    Attributes:
        make: makes the layer.
        size: shape of its input.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, ...]


def convolution(
    batch: int, size: int, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> Shape:
    """A convolution whose padding keeps the size."""
    make = partial(nn.Conv2d, in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return Shape(make, (batch, in_channels, size, size))


def linear(batch: int, tokens: int, in_features: int, out_features: int) -> Shape:
    """A linear layer on tokens."""
    return Shape(partial(nn.Linear, in_features, out_features), (batch, tokens, in_features))


SHAPES = {
    "ResNet-18, 64->64 3x3, 56x56, B=16": convolution(16, 56, 64, 64, 3),
    "ResNet-18, 512->512 3x3, 7x7, B=16": convolution(16, 7, 512, 512, 3),
    "ResNet-50, 256->64 1x1, 56x56, B=16": convolution(16, 56, 256, 64, 1),
    "ResNet-50, 512->512 3x3, 7x7, B=16": convolution(16, 7, 512, 512, 3),
    "MobileNetV2, 144 depthwise 3x3, 56x56, B=16": convolution(16, 56, 144, 144, 3, groups=144),
    "MobileNetV2, 160->960 1x1, 7x7, B=16": convolution(16, 7, 160, 960, 1),
    "MCUNet, 48->16 1x1, 40x40, B=16": convolution(16, 40, 48, 16, 1),
    "MCUNet, 240 depthwise 5x5, 10x10, B=16": convolution(16, 10, 240, 240, 5, groups=240),
    "DeiT-Tiny, 192->768, N=197, B=16": linear(16, 197, 192, 768),
    "ViT-B, 768->3072, N=197, B=8": linear(8, 197, 768, 3072),
    "Llama, 4096->11008, N=256, B=1": linear(1, 256, 4096, 11008),
}
MAKERS: dict[str, Callable[[], Method]] = {
    "plain": methods.plain,
    "published": methods.published,
    "lance": partial(methods.ours, energy=0.85),
    "lance, 32 bits": partial(methods.ours, energy=0.85, core_bits=None),
    "HOSVD every step": methods.hosvd,
    "ASI": methods.asi,
    "gradient filtering, R=4": methods.gradient_filtering,
}


class Single(nn.Module):
    """The layer between a shift, which asks it for the gradient of its input, and a loss's view of its output.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One value a sample and output feature, `(B, O)`."""
        y = torch.tanh(self.layer(x + self.shift))
        return y.flatten(2).mean(2) if isinstance(self.layer, nn.Conv2d) else y.flatten(1, -2).mean(1)


def inputs(size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Rectified random features of images, so that neighbouring pixels or tokens and channels are alike."""
    generator = torch.Generator().manual_seed(seed)
    channels = size[-1] if len(size) == 3 else size[1]
    side = size[-1] if len(size) == 4 else int(size[1] ** 0.5) + 1
    images = natural_images(size[0], max(side, 4), seed)[..., :side, :side]
    mixing = torch.randn(channels, 3, generator=generator)
    features = torch.einsum("cs,bshw->bchw", mixing, images)
    features = (features + 0.5 * torch.randn(features.shape, generator=generator)).relu()
    return features if len(size) == 4 else features.flatten(2).mT[:, : size[1]].contiguous()


def case(shape: Shape, context: Context) -> list[Row]:
    """Every method on one layer."""
    torch.manual_seed(context.seed)
    model = Single(shape.make()).to(context.device)
    size = (2, *shape.size[1:]) if context.quick and shape.size[0] > 1 else shape.size
    labels = torch.arange(size[0], device=context.device) % 10
    loader: list[Batch] = [(inputs(size, context.seed + index).to(context.device), labels) for index in range(3)]
    return measure_steps(context, model, ["layer"], loader, MAKERS)


def _register() -> None:
    for name, shape in SHAPES.items():
        SUITE.case(f"step: {name}")(partial(case, shape))


_register()
