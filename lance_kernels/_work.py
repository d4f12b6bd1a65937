"""Operations of the layers that train from one core: what `plan` weighs against bytes and error."""

from __future__ import annotations

from collections.abc import Sequence

from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops.tucker import mode_product_flops


class Work:
    """Operations of the layers that share one core.

    Attributes:
        layers: the layers.
        size: shape of their input.
        dense: operations of their weight gradients from the whole input.
    """

    def __init__(self, layers: Sequence[CompressedLayer], size: Sequence[int]) -> None:
        self.layers, self.size = list(layers), list(size)
        self.dense = sum(layer.lance_weight_grad_flops(self.size) for layer in self.layers)

    def from_core(self, ranks: Sequence[int | None]) -> int:
        """Operations of the projection to a core of these ranks, and of all weight gradients from it."""
        gradients = sum(layer.lance_weight_grad_flops(self.size, ranks) for layer in self.layers)
        return mode_product_flops(self.size, ranks) + gradients
