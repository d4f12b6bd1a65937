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
        calls: calls in one step.
        dense: operations of their weight gradients from the whole input.
    """

    def __init__(self, layers: Sequence[CompressedLayer], size: Sequence[int], calls: int = 1) -> None:
        self.layers, self.size, self.calls = list(layers), list(size), calls
        self.dense = self._gradients([None] * len(self.size))

    def from_core(self, ranks: Sequence[int | None]) -> int:
        """Operations of the projection to a core of these ranks, and of all weight gradients from it."""
        return self.calls * mode_product_flops(self.size, ranks) + self._gradients(ranks)

    def _gradients(self, ranks: Sequence[int | None]) -> int:
        core = [size if rank is None else rank for size, rank in zip(self.size, ranks)]
        factors = [None if rank is None else (size, rank) for size, rank in zip(self.size, ranks)]
        return self.calls * sum(layer.lance_weight_grad_flops(self.size, core, factors) for layer in self.layers)
