"""Layers that keep less of their input: the forward pass is exact, the weight gradient comes from what was kept.

A rival is one `Compression`; everything else about a layer (bias, padding, bits of what is kept) is here, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.grad import conv2d_input

import lance_kernels.ops  # noqa: F401 - registers the operators that pack
from benchmarks.methods.interface import UnfitLayerError

Layer = nn.Conv2d | nn.Linear


class Compression:
    """How one layer's input is kept, and what is made of it in the backward pass."""

    def keep(self, x: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
        """What is kept of the input `x`: `(B, C, H, W)` for a convolution, `(..., D)` for a linear layer."""
        raise NotImplementedError

    def weight_grad(
        self, kept: Sequence[torch.Tensor], grad_output: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """Weight gradient from what `keep` returned.

        Args:
            kept: the tensors of `keep`, rounded where the layer packs them.
            grad_output: gradient with respect to the layer's output.
            size: shape of the input.
            layer: the layer.
        """
        raise NotImplementedError

    def input_grad(
        self, grad_output: torch.Tensor, weight: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """Gradient with respect to the input, exact unless a method says otherwise."""
        if isinstance(layer, nn.Linear):
            return grad_output @ weight
        return conv2d_input(size, weight, grad_output, layer.stride, padding_of(layer), layer.dilation, layer.groups)


class KeptLayer(nn.Module):
    """Mixin of the layers whose class `keep_less` swaps.

    Attributes:
        compression: how the input is kept.
        bits: bits a value of everything that is kept, 0 for its own dtype.
        kept_bytes: what the last call kept.
        seconds: time of `Compression.keep` in all calls so far, packing included.
    """

    compression: Compression
    bits: int
    kept_bytes: int
    seconds: float
    weight: torch.Tensor
    bias: torch.Tensor | None

    def dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The plain layer's forward pass."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The plain layer's output; what is kept of `x` is the compression's."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return self.dense(x, self.weight, self.bias)
        return _KeepLess.apply(x, self.weight, self.bias, self)


class KeptConv2d(KeptLayer, nn.Conv2d):
    """A convolution that keeps less."""

    def dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The convolution of `x`."""
        return self._conv_forward(x, weight, bias)


class KeptLinear(KeptLayer, nn.Linear):
    """A linear layer that keeps less."""

    def dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The product of `x` with the weight."""
        return linear(x, weight, bias)


class _KeepLess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: KeptLayer
    ) -> torch.Tensor:
        start = time.perf_counter()
        kept = layer.compression.keep(x, layer)
        ctx.layer, ctx.size, ctx.dtype = layer, x.shape, x.dtype
        ctx.shapes = [tensor.shape for tensor in kept]
        if layer.bits:
            kept = [torch.ops.lance.pack_core(tensor.contiguous(), layer.bits) for tensor in kept]
        layer.seconds += time.perf_counter() - start
        layer.kept_bytes = sum(tensor.numel() * tensor.element_size() for tensor in kept)
        ctx.save_for_backward(weight, *kept)
        return layer.dense(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, (weight, *kept) = ctx.layer, ctx.saved_tensors
        if layer.bits:
            pairs = zip(kept, ctx.shapes)
            kept = [torch.ops.lance.unpack_core(data, shape, layer.bits, ctx.dtype) for data, shape in pairs]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = layer.compression.input_grad(grad_output, weight, ctx.size, layer)
        if ctx.needs_input_grad[1]:
            grad_weight = layer.compression.weight_grad(kept, grad_output, ctx.size, layer)
        if ctx.needs_input_grad[2]:
            feature = 1 if isinstance(layer, nn.Conv2d) else grad_output.dim() - 1
            grad_bias = grad_output.sum([mode for mode in range(grad_output.dim()) if mode != feature])
        return grad_x, grad_weight, grad_bias, None


def keep_less(
    model: nn.Module, names: Sequence[str], make: Callable[[str, Layer], Compression], bits: int = 0
) -> nn.Module:
    """Swaps the named layers' classes, in place, for layers that keep less.

    Args:
        model: the model.
        names: its layers to change, each exactly a `Conv2d` with zero padding or a `Linear`.
        make: the compression of a layer, by name.
        bits: 8, 4, 2 or 1 bits a value of what is kept; 0 keeps the dtype.

    Returns:
        `model`.

    Raises:
        UnfitLayerError: a named module is of another kind.
    """
    kinds: dict[type[nn.Module], type[KeptLayer]] = {nn.Conv2d: KeptConv2d, nn.Linear: KeptLinear}
    for name in names:
        module = model.get_submodule(name)
        if type(module) not in kinds or getattr(module, "padding_mode", "zeros") != "zeros":
            raise UnfitLayerError(f"keep_less: {name} is {module}; expected a Conv2d with zero padding or a Linear")
        compression = make(name, module)
        module.__class__ = kinds[type(module)]
        module.compression, module.bits, module.kept_bytes, module.seconds = compression, bits, 0, 0.0
    return model


def kept_layers(model: nn.Module) -> dict[str, KeptLayer]:
    """The layers that `keep_less` changed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeptLayer)}


def padding_of(layer: nn.Conv2d) -> tuple[int, ...]:
    """The padding as numbers.

    Raises:
        ValueError: the padding differs before and after.
    """
    if not isinstance(layer.padding, str):
        return layer.padding
    pairs = list(zip(layer._reversed_padding_repeated_twice[0::2], layer._reversed_padding_repeated_twice[1::2]))
    if any(before != after for before, after in pairs):
        raise ValueError(f"keep_less: padding of {layer} is {pairs}; expected the same before and after")
    return tuple(before for before, _ in reversed(pairs))
