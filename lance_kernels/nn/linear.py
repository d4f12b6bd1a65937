"""`torch.nn.Linear` that keeps a core of its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.nn.companions.calls import OutsideCompanionCalls
from lance_kernels.ops.linear import weight_grad_flops


class Linear(CompressedLayer, nn.Linear):
    """`torch.nn.Linear` whose weight gradient comes from a Tucker core of the input; forward and input gradient exact.

    Args:
        *args: as `torch.nn.Linear`.
        config: how far to compress; `LanceConfig()` by default.
        **kwargs: as `torch.nn.Linear`.
    """

    plain_type = nn.Linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`input @ weight^T + bias` for `input` of shape `(..., in_features)`."""
        with OutsideCompanionCalls():
            y = self._lance_forward(input)
        return super().forward(input) if y is None else y

    def _lance_forward(self, input: torch.Tensor) -> torch.Tensor | None:
        """The product that keeps a core; None where the plain one is to run."""
        # A nested tensor has no one length for a factor to fit.
        factors = self.lance_factors_for(input.shape) if not input.is_nested and self.lance_keeps_core() else None
        if factors is None:
            return None
        bits, kept, shared = self.lance_core_bits, self.lance_lengths_for(factors), self.lance_shared(input)
        core = None if shared is None else shared.find(self, input, factors, bits)
        y: torch.Tensor
        if core is not None:
            y = torch.ops.lance.linear_given_core(input, self.weight, self.bias, core, factors, bits, *kept)
            return y
        y, core = torch.ops.lance.linear(input, self.weight, self.bias, factors, bits, *kept)
        if shared is not None:
            shared.store(self, input, factors, bits, core)
        return y

    def lance_weight_grad_flops(
        self, size: Sequence[int], core: Sequence[int], factors: Sequence[Sequence[int] | None]
    ) -> int:
        """Operations of the weight gradient from a core."""
        return weight_grad_flops([*size[:-1], self.out_features], core, factors)
