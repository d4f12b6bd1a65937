"""Shapes of the GPU suite, with random tensors on the device, and the least time that memory and arithmetic leave."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from benchmarks import published
from benchmarks.layers import Convolution, Layer, Linear, Tensors

BANDWIDTH, RATE = 3.0e12, 798e12  # an H100's, measured: bytes copied, and operations of an 8192^3 bfloat16 product

WIDE = Linear("D=O=4096, 128x1024 tokens, ranks 64,128", 128, 1024, 4096, 4096, (64, 128))
STEP_WIDE = Linear("D=O=4096, 64x1024 tokens, ranks 64,128", 64, 1024, 4096, 4096, (64, 128))
STEP_MIDDLE = Linear("D=O=1024, 64x1024 tokens, ranks 64,64", 64, 1024, 1024, 1024, (64, 64))
STEP_NARROW = Linear("D=192, O=768, 256x197 tokens, ranks 16,24", 256, 197, 192, 768, (16, 24))
IMAGE_56 = Convolution("256x256x56x56, ranks 32,8,8", 256, 256, 256, 3, 56, (32, 8, 8))
IMAGE_14 = Convolution("256x1024x14x14, ranks 64,4,4", 256, 1024, 1024, 3, 14, (64, 4, 4))
CONV_28 = Convolution("256->256 3x3, 28x28, B=128, ranks 32,6,6", 128, 256, 256, 3, 28, (32, 6, 6))
CONV_7 = Convolution("512->512 3x3, 7x7, B=256, ranks 64,3,3", 256, 512, 512, 3, 7, (64, 3, 3))
CONV_56 = Convolution("64->64 3x3, 56x56, B=128, ranks 16,8,8", 128, 64, 64, 3, 56, (16, 8, 8))
CONV_14 = Convolution("256->256 3x3, 14x14, B=128, ranks 64,5,5", 128, 256, 256, 3, 14, (64, 5, 5))
POINT_14 = Convolution("1024->256 1x1, 14x14, B=128, ranks 128,6,6", 128, 1024, 256, 1, 14, (128, 6, 6))


@dataclass(frozen=True)
class DeviceTensors(Tensors):
    """Tensors of a layer on a device, with a bias.

    Attributes:
        bias: bias of the layer.
    """

    bias: torch.Tensor

    @cached_property
    def narrow_factors(self) -> list[torch.Tensor]:
        """The factors of compressed modes in the dtype of `x`, as the published layer multiplies with them."""
        return [factor.to(self.x.dtype) for factor in self.kept_factors]

    def published_project(self) -> torch.Tensor:
        """The core of `x`, by the published layer's products."""
        return published.project(self.x, self.narrow_factors)


def small(layer: Layer) -> Layer:
    """A shape cut down for a trial run."""
    if isinstance(layer, Linear):
        return replace(layer, batch=2, tokens=20, in_features=24, out_features=16, ranks=(3, 5))
    return replace(layer, batch=2, in_channels=8, out_channels=8, size=min(layer.size, 9), ranks=(3, 2, 2))


def tensors(layer: Layer, device: str, dtype: torch.dtype, seed: int, channels_last: bool = False) -> DeviceTensors:
    """Random tensors of a layer, made on the device; the factors are float32, as layers keep them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        made = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return made.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else made

    if isinstance(layer, Linear):
        sizes = (layer.tokens, layer.in_features)
        x, weight = normal(layer.batch, *sizes), normal(layer.out_features, layer.in_features)
        grad = normal(layer.batch, layer.tokens, layer.out_features)
    else:
        sizes = (layer.in_channels, layer.size, layer.size)
        output = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1
        x = normal(layer.batch, *sizes)
        weight = normal(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
        grad = normal(layer.batch, layer.out_channels, output, output)
    factors = [
        torch.linalg.qr(torch.randn(size, rank, generator=generator, device=device))[0].contiguous()
        for size, rank in zip(sizes, layer.ranks)
    ]
    bias = torch.zeros(weight.shape[0], device=device, dtype=dtype)
    return DeviceTensors(x, weight / weight[0].numel() ** 0.5, grad, [None, *factors], bias)


def floor(byte_count: float, operations: float) -> float:
    """Seconds that an H100 needs at least: the larger of bytes over bandwidth and operations over rate."""
    return max(byte_count / BANDWIDTH, operations / RATE)


def projection_floor(layer: Layer, itemsize: int) -> float:
    """Of reading the input once and writing the core."""
    sizes = _input_sizes(layer)
    core = sizes[0] * math.prod(layer.ranks)
    first = min(layer.ranks[0], math.prod(layer.ranks[1:]))
    return floor(itemsize * (math.prod(sizes) + core), 2 * math.prod(sizes) * first)


def weight_grad_floor(layer: Layer, itemsize: int) -> float:
    """Of reading `grad_output` and the core once and writing the gradient."""
    core = layer.batch * math.prod(layer.ranks)
    if isinstance(layer, Linear):
        grad, weight = layer.batch * layer.tokens * layer.out_features, layer.in_features * layer.out_features
        project = 2 * grad * layer.ranks[0] + 2 * core * layer.out_features
        expand = 2 * core * layer.tokens + 2 * grad * layer.ranks[1]
        work = min(project, expand) + 2 * layer.out_features * layer.in_features * layer.ranks[1]
        return floor(itemsize * (grad + core + weight), work)
    output = (layer.size + 2 * layer.padding - layer.kernel) // layer.stride + 1
    grad = layer.batch * layer.out_channels * output**2
    weight = layer.out_channels * layer.in_channels * layer.kernel**2
    channel, height, width = layer.ranks
    taps_h, taps_w = layer.kernel * height, layer.kernel * width
    shifted = 2 * layer.batch * layer.out_channels * output * (output * taps_w + taps_h * taps_w)
    shifted += 2 * layer.batch * layer.out_channels * taps_h * taps_w * channel
    expanded = 2 * layer.batch * channel * layer.size * (height * width + layer.size * width)
    expanded += 2 * grad * layer.kernel**2 * channel
    work = min(shifted, expanded) + 2 * weight * channel
    return floor(itemsize * (grad + core + weight), work)


def _input_sizes(layer: Layer) -> tuple[int, ...]:
    if isinstance(layer, Linear):
        return layer.batch, layer.tokens, layer.in_features
    return layer.batch, layer.in_channels, layer.size, layer.size
