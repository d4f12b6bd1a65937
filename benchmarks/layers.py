"""The layer shapes that suites measure, with the ranks of their factors and random tensors of those shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks import published
from lance_kernels import ops

Factors = list[torch.Tensor | None]


def orthonormal(size: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """A random `(size, rank)` matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution on square images, and the ranks of its input's core.

    Attributes:
        name: name of the shape in cases.
        batch: images.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: height and width of the kernel.
        size: height and width of the input.
        ranks: ranks of the channel, height and width modes.
        stride: stride of both axes; the padding is half of the kernel.
    """

    name: str
    batch: int
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    ranks: tuple[int, int, int]
    stride: int = 1

    @property
    def padding(self) -> int:
        """Padding of both axes."""
        return self.kernel // 2

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation and groups, as the operators take them."""
        return [self.stride] * 2, [self.padding] * 2, [1, 1], 1

    def with_batch(self, batch: int) -> Convolution:
        """The same shape with another batch."""
        return replace(self, batch=batch)

    def tensors(self, seed: int) -> Tensors:
        """Random tensors of this shape."""
        generator = torch.Generator().manual_seed(seed)
        sizes = (self.in_channels, self.size, self.size)
        x = torch.randn(self.batch, *sizes, generator=generator)
        weight = torch.randn(self.out_channels, self.in_channels, self.kernel, self.kernel, generator=generator)
        output = (self.size + 2 * self.padding - self.kernel) // self.stride + 1
        grad = torch.randn(self.batch, self.out_channels, output, output, generator=generator)
        factors = [orthonormal(size, rank, generator) for size, rank in zip(sizes, self.ranks)]
        return Tensors(x, weight / weight[0].numel() ** 0.5, grad, [None, *factors])

    def dense_weight_grad(self, tensors: Tensors) -> torch.Tensor:
        """PyTorch's weight gradient, and nothing else of the backward pass."""
        stride, padding, dilation, groups = self.geometry
        return torch.ops.aten.convolution_backward(
            tensors.grad, tensors.x, tensors.weight, None, stride, padding, dilation, False, [0, 0], groups,
            [False, True, False],
        )[1]  # fmt: skip

    def weight_grad(self, tensors: Tensors, core: torch.Tensor) -> torch.Tensor:
        """Weight gradient from the core, by the operator."""
        return ops.convolution_weight_grad(
            tensors.grad, core, tensors.factors, list(tensors.weight.shape), *self.geometry
        )

    def published_weight_grad(self, tensors: Tensors, core: torch.Tensor) -> torch.Tensor:
        """Weight gradient from the core, by the published contractions."""
        kernel = (self.kernel, self.kernel)
        return published.convolution_weight_grad(
            tensors.grad, core, tensors.kept_factors, kernel, self.stride, self.padding
        )

    def plain_forward(self, tensors: Tensors) -> torch.Tensor:
        """PyTorch's forward pass."""
        return torch.convolution(
            tensors.x, tensors.weight, None, *self.geometry[:3], False, [0, 0], self.geometry[3]
        )  # fmt: skip

    def forward(self, tensors: Tensors) -> torch.Tensor:
        """Forward pass of the operator that keeps the core."""
        return ops.convolution(tensors.x, tensors.weight, None, *self.geometry, tensors.factors)[0]


@dataclass(frozen=True)
class Linear:
    """A linear layer on `(batch, tokens, in_features)`, and the ranks of its input's core.

    Attributes:
        name: name of the shape in cases.
        batch: samples.
        tokens: tokens a sample.
        in_features: features of the input.
        out_features: features of the output.
        ranks: ranks of the token and feature modes.
    """

    name: str
    batch: int
    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, int]

    def with_batch(self, batch: int) -> Linear:
        """The same shape with another batch."""
        return replace(self, batch=batch)

    def tensors(self, seed: int) -> Tensors:
        """Random tensors of this shape."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, self.tokens, self.in_features, generator=generator)
        weight = torch.randn(self.out_features, self.in_features, generator=generator) / self.in_features**0.5
        grad = torch.randn(self.batch, self.tokens, self.out_features, generator=generator)
        sizes = (self.tokens, self.in_features)
        factors = [orthonormal(size, rank, generator) for size, rank in zip(sizes, self.ranks)]
        return Tensors(x, weight, grad, [None, *factors])

    def dense_weight_grad(self, tensors: Tensors) -> torch.Tensor:
        """The product that PyTorch's backward pass computes for the weight."""
        return tensors.grad.flatten(0, 1).mT @ tensors.x.flatten(0, 1)

    def weight_grad(self, tensors: Tensors, core: torch.Tensor) -> torch.Tensor:
        """Weight gradient from the core, by the operator."""
        return ops.linear_weight_grad(tensors.grad, core, tensors.factors)

    def published_weight_grad(
        self, tensors: Tensors, core: torch.Tensor, *, features_last: bool = False
    ) -> torch.Tensor:
        """Weight gradient from the core, by the published contractions."""
        return published.linear_weight_grad(tensors.grad, core, tensors.kept_factors, features_last=features_last)

    def plain_forward(self, tensors: Tensors) -> torch.Tensor:
        """PyTorch's forward pass."""
        return torch.nn.functional.linear(tensors.x, tensors.weight)

    def forward(self, tensors: Tensors) -> torch.Tensor:
        """Forward pass of the operator that keeps the core."""
        return ops.linear(tensors.x, tensors.weight, None, tensors.factors)[0]


@dataclass(frozen=True)
class Tensors:
    """What a layer's case works on.

    Attributes:
        x: the input.
        weight: the weight.
        grad: gradient with respect to the output.
        factors: one a mode of `x`, None for the batch.
    """

    x: torch.Tensor
    weight: torch.Tensor
    grad: torch.Tensor
    factors: Factors

    @property
    def kept_factors(self) -> list[torch.Tensor]:
        """The factors of every mode but the batch."""
        return [factor for factor in self.factors if factor is not None]

    def project(self) -> torch.Tensor:
        """The core of `x`, by the operator."""
        return ops.tucker_project(self.x, self.factors)

    def published_project(self) -> torch.Tensor:
        """The core of `x`, by the published layer's products."""
        return published.project(self.x, self.kept_factors)

    def step(self, forward: Callable[[Tensors], torch.Tensor]) -> Callable[[], None]:
        """A whole step: forward pass and the gradients of input and weight."""
        leaves = replace(self, x=self.x.detach().requires_grad_(), weight=self.weight.detach().requires_grad_())

        def run() -> None:
            torch.autograd.grad(forward(leaves), (leaves.x, leaves.weight), self.grad)

        return run


Layer = Convolution | Linear

CONV_512 = Convolution("conv 512->512 3x3, 7x7, B=32, ranks 32,3,3", 32, 512, 512, 3, 7, (32, 3, 3))
CONV_256 = Convolution("conv 256->512 3x3 stride 2, 14x14, B=32, ranks 32,4,4", 32, 256, 512, 3, 14, (32, 4, 4), 2)
LINEAR_768 = Linear("linear 768->3072, B=16, N=197, ranks 24,64", 16, 197, 768, 3072, (24, 64))
CONV_64 = Convolution("conv 64->64 3x3, 56x56, B=32, ranks 16,8,8", 32, 64, 64, 3, 56, (16, 8, 8))
CONV_1X1 = Convolution("conv 320->1280 1x1, 7x7, B=32, ranks 32,3,3", 32, 320, 1280, 1, 7, (32, 3, 3))
LINEAR_192 = Linear("linear 192->768, B=32, N=197, ranks 16,24", 32, 197, 192, 768, (16, 24))
LAYERS: tuple[Layer, ...] = (CONV_512, CONV_256, LINEAR_768, CONV_64, CONV_1X1, LINEAR_192)
