"""Steps that the GPU suite compares: dense, ours, and the published layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import published
from benchmarks.gpu.shapes import DeviceTensors
from benchmarks.layers import Convolution, Layer, Linear
from lance_kernels import ops

Step = Callable[[DeviceTensors], object]


class PublishedLinear(torch.autograd.Function):
    """The published linear layer: a copy of the input projected mode by mode, its einsums in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(published.project(x, factors), weight, *factors)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        core, weight, *factors = ctx.saved_tensors
        grad_weight = published.linear_weight_grad(grad, core, factors)
        return grad @ weight, grad_weight, grad.sum((0, 1)), *[None] * len(factors)


def dense(layer: Layer) -> Step:
    """PyTorch's own layer."""

    def forward(tensors: DeviceTensors) -> torch.Tensor:
        if isinstance(layer, Linear):
            return F.linear(tensors.x, tensors.weight, tensors.bias)
        stride, padding, dilation, groups = layer.geometry
        return torch.convolution(
            tensors.x, tensors.weight, tensors.bias, stride, padding, dilation, False, [0, 0], groups
        )

    return forward


def ours(layer: Layer) -> Step:
    """The operator that keeps a core."""

    def forward(tensors: DeviceTensors) -> torch.Tensor:
        if isinstance(layer, Linear):
            return ops.linear(tensors.x, tensors.weight, tensors.bias, tensors.factors)[0]
        return ops.convolution(tensors.x, tensors.weight, tensors.bias, *layer.geometry, tensors.factors)[0]

    return forward


def published_linear(tensors: DeviceTensors) -> torch.Tensor:
    """The published layer."""
    y: torch.Tensor = PublishedLinear.apply(tensors.x, tensors.weight, tensors.bias, *tensors.narrow_factors)
    return y


def with_gradients(forward: Step) -> Step:
    """Forward pass and the gradients of input, weight and bias."""

    def step(tensors: DeviceTensors) -> object:
        return torch.autograd.grad(forward(tensors), (tensors.x, tensors.weight, tensors.bias), tensors.grad)

    return step


def trainable(tensors: DeviceTensors) -> DeviceTensors:
    """The tensors as leaves that ask for gradients."""
    leaves = {name: getattr(tensors, name).detach().requires_grad_() for name in ("x", "weight", "bias")}
    return replace(tensors, **leaves)


def dense_weight_grad(layer: Convolution, with_bias: bool = False) -> Step:
    """The library's weight gradient, alone or with that of the bias."""

    def run(tensors: DeviceTensors) -> object:
        stride, padding, dilation, groups = layer.geometry
        return torch.ops.aten.convolution_backward(
            tensors.grad, tensors.x, tensors.weight, list(tensors.bias.shape), stride, padding, dilation, False, [0, 0],
            groups, [False, True, with_bias],
        )  # fmt: skip

    return run


def riding(tensors: DeviceTensors) -> object:
    """Output and core from one product: the feature factor's columns are appended to the weight."""
    token, feature = tensors.kept_factors
    outputs = tensors.weight.shape[0]
    wide = F.linear(tensors.x, torch.cat([tensors.weight, feature.to(tensors.x.dtype).mT]))
    y = wide[..., :outputs] + tensors.bias
    return y, token.to(tensors.x.dtype).mT @ wide[..., outputs:]
