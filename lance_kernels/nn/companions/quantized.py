"""Drop-in modules whose gradient is approximate. Each subclasses its `torch.nn` namesake and adds no state.

The classes that end in `4` keep 4 bits a derivative where the others keep 8.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lance_kernels.nn.companions import functional_quantized as companion
from lance_kernels.nn.companions.exact import EXACT, FrozenBatchNorm


class GELU(nn.GELU):
    """`torch.nn.GELU` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.gelu(input, self.approximate, self.lance_bits)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.silu(input, self.inplace, self.lance_bits)


class Hardswish(nn.Hardswish):
    """`torch.nn.Hardswish` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.hardswish(input, self.inplace, self.lance_bits)


class Hardsigmoid(nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.hardsigmoid(input, self.inplace, self.lance_bits)


class Sigmoid(nn.Sigmoid):
    """`torch.nn.Sigmoid` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.sigmoid(input, self.lance_bits)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh` that keeps 8 bits an element."""

    lance_bits: ClassVar[int] = 8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.tanh(input, self.lance_bits)


class GELU4(GELU):
    """`torch.nn.GELU` that keeps 4 bits an element."""

    lance_bits = 4


class SiLU4(SiLU):
    """`torch.nn.SiLU` that keeps 4 bits an element."""

    lance_bits = 4


class Hardswish4(Hardswish):
    """`torch.nn.Hardswish` that keeps 4 bits an element."""

    lance_bits = 4


class Hardsigmoid4(Hardsigmoid):
    """`torch.nn.Hardsigmoid` that keeps 4 bits an element."""

    lance_bits = 4


class Sigmoid4(Sigmoid):
    """`torch.nn.Sigmoid` that keeps 4 bits an element."""

    lance_bits = 4


class Tanh4(Tanh):
    """`torch.nn.Tanh` that keeps 4 bits an element."""

    lance_bits = 4


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` that keeps its normalised input in 8 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` that keeps its input in 8 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return companion.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that keeps its normalised input in 8 bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return companion.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _BatchNorm(FrozenBatchNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        frozen = not any(vector.requires_grad for vector in self.parameters(recurse=False))
        if not self.training and self.running_mean is not None and frozen:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        tracked = not self.training or self.track_running_stats
        return companion.batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            by_batch,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` that keeps its normalised input in 8 bits, or vectors only where those are exact."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that keeps its normalised input in 8 bits, or vectors only where those are exact."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` that keeps its normalised input in 8 bits, or vectors only where those are exact."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    **EXACT,
    nn.GELU: GELU,
    nn.SiLU: SiLU,
    nn.Hardswish: Hardswish,
    nn.Hardsigmoid: Hardsigmoid,
    nn.Sigmoid: Sigmoid,
    nn.Tanh: Tanh,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.GroupNorm: GroupNorm,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}

SMALLEST: dict[type[nn.Module], type[nn.Module]] = {
    **QUANTIZED,
    nn.GELU: GELU4,
    nn.SiLU: SiLU4,
    nn.Hardswish: Hardswish4,
    nn.Hardsigmoid: Hardsigmoid4,
    nn.Sigmoid: Sigmoid4,
    nn.Tanh: Tanh4,
}
