"""`torch.nn.Conv1d`, `Conv2d` and `Conv3d` that keep a core of their input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.nn.companions.calls import OutsideCompanionCalls
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.convolution_weight_grad import weight_grad_flops


class _Convolution(CompressedLayer, nn.modules.conv._ConvNd):
    """The convolution layers' forward; a subclass names its plain type and the modes of a batched input."""

    batched_dim: ClassVar[int]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolution of `input`, `(B, C, *S)` or `(C, *S)`."""
        with OutsideCompanionCalls():
            y = self._lance_forward(input)
        return super().forward(input) if y is None else y

    def _lance_forward(self, input: torch.Tensor) -> torch.Tensor | None:
        """The convolution that keeps a core; None where the plain one is to run."""
        batched = input.dim() == self.batched_dim
        size = input.shape if batched else (1, *input.shape)
        factors = self.lance_factors_for(size) if self.lance_keeps_core() else None
        if factors is None:
            return None
        x = input if batched else input.unsqueeze(0)
        numbers = (self.stride, self.lance_padding(), self.dilation, self.groups)
        bits, kept, shared = self.lance_core_bits, self.lance_lengths_for(factors), self.lance_shared(input)
        core = None if shared is None else shared.find(self, input, factors, bits)
        y: torch.Tensor
        if core is not None:
            y = torch.ops.lance.convolution_given_core(
                x, self.weight, self.bias, *numbers, core, factors, bits, self.padding_mode, *kept
            )
        else:
            y, core = torch.ops.lance.convolution(
                x, self.weight, self.bias, *numbers, factors, bits, self.padding_mode, *kept
            )
            if shared is not None:
                shared.store(self, input, factors, bits, core)
        return y if batched else y.squeeze(0)

    def lance_padding(self) -> list[int]:
        """The padding as numbers: two a spatial mode (before, after)."""
        # torch keeps it last mode first, as torch.nn.functional.pad wants it.
        reversed_pairs = self._reversed_padding_repeated_twice
        pairs = zip(reversed_pairs[0::2], reversed_pairs[1::2])
        return [int(amount) for pair in reversed(list(pairs)) for amount in pair]

    def lance_weight_grad_flops(
        self, size: Sequence[int], core: Sequence[int], factors: Sequence[Sequence[int] | None]
    ) -> int:
        """Operations of the weight gradient from a core."""
        geometry = Geometry.of(self.stride, self.lance_padding(), self.dilation, self.groups, self.padding_mode)
        output = output_size(size, self.weight.shape, geometry)
        return weight_grad_flops(output, core, factors, self.weight.shape, *geometry)


class Conv1d(_Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` whose weight gradient comes from a Tucker core of the input; forward and input gradient exact.

    Args:
        *args: as `torch.nn.Conv1d`.
        config: how far to compress; `LanceConfig()` by default.
        **kwargs: as `torch.nn.Conv1d`.
    """

    plain_type = nn.Conv1d
    batched_dim = 3


class Conv2d(_Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight gradient comes from a Tucker core of the input; forward and input gradient exact.

    Args:
        *args: as `torch.nn.Conv2d`.
        config: how far to compress; `LanceConfig()` by default.
        **kwargs: as `torch.nn.Conv2d`.
    """

    plain_type = nn.Conv2d
    batched_dim = 4


class Conv3d(_Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` whose weight gradient comes from a Tucker core of the input; forward and input gradient exact.

    Args:
        *args: as `torch.nn.Conv3d`.
        config: how far to compress; `LanceConfig()` by default.
        **kwargs: as `torch.nn.Conv3d`.
    """

    plain_type = nn.Conv3d
    batched_dim = 5
