"""Tucker forms of a layer's input in which the batch mode is compressed too: LANCE as published, HOSVD and ASI."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from benchmarks import published
from benchmarks.methods.kept import Compression, Layer, padding_of
from lance_kernels._ranks import energy_rank
from lance_kernels.ops.mode_gram import gram_eigh, mode_gram
from lance_kernels.ops.tucker import mode_product, tucker_project, tucker_reconstruct


class Tucker(Compression):
    """Weight gradient from a core and one factor a mode, in the order of arXiv 2411.06346 (section 3.3).

    The gradient of the output is projected on the batch factor, then the contractions of `benchmarks.published`
    follow, which arXiv 2509.21617 takes over. Grouped or dilated convolutions, for which neither paper gives an order,
    form the approximate input again.
    """

    def from_core(
        self, core: torch.Tensor, factors: Sequence[torch.Tensor], grad_output: torch.Tensor, layer: Layer
    ) -> torch.Tensor:
        """Weight gradient.

        Args:
            core: `(r_0, r_1, ...)`, one entry a mode of the input.
            factors: `(size_n, rank_n)` for every mode.
            grad_output: gradient with respect to the output.
            layer: the layer.
        """
        thin = mode_product(grad_output, factors[0].mT, 0)
        if isinstance(layer, nn.Linear):
            if core.dim() == 3:
                return published.linear_weight_grad(thin, core, factors[1:])
            x_hat = tucker_reconstruct(core, [None, *factors[1:]])
            return thin.flatten(0, -2).mT @ x_hat.flatten(0, -2)
        stride, padding = layer.stride, padding_of(layer)
        if layer.groups == 1 and set(layer.dilation) == {1} and len({*stride}) == len({*padding}) == 1:
            kernel = (layer.kernel_size[0], layer.kernel_size[1])
            return published.convolution_weight_grad(thin, core, factors[1:], kernel, stride[0], padding[0])
        x_hat = tucker_reconstruct(core, [None, *factors[1:]])
        return conv2d_weight(x_hat, layer.weight.shape, thin, stride, padding, layer.dilation, layer.groups)


class Fixed(Tucker):
    """LANCE as published: factors of every mode from calibration; only the core is kept."""

    def __init__(self, factors: Sequence[torch.Tensor]) -> None:
        self.factors = list(factors)

    def keep(self, x: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
        """The core."""
        return [published.contract(x.clone(), self.factors, 0)]

    def weight_grad(
        self, kept: Sequence[torch.Tensor], grad_output: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """From the core and the factors of calibration."""
        return self.from_core(kept[0], self.factors, grad_output, layer)


class Decomposed(Tucker):
    """A form whose factors are new at every step, so that they are kept beside the core."""

    def factors_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One `(size_n, rank_n)` factor a mode of `x`, columns orthonormal."""
        raise NotImplementedError

    def keep(self, x: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
        """The core and the factors."""
        factors = self.factors_of(x)
        return [tucker_project(x, factors), *factors]

    def weight_grad(
        self, kept: Sequence[torch.Tensor], grad_output: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """From what was kept."""
        return self.from_core(kept[0], kept[1:], grad_output, layer)


class Hosvd(Decomposed):
    """Nguyen et al., "Activation Map Compression through Tensor Decomposition", NeurIPS 2024 (arXiv 2411.06346).

    The input of every step is decomposed by HOSVD, with the smallest ranks that keep a fraction of every mode's
    energy. The singular vectors come from the unfoldings' Gram matrices: the same as the paper's, and cheaper.
    """

    def __init__(self, energy: float) -> None:
        self.energy = energy

    def factors_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Leading singular vectors of every unfolding."""
        return hosvd_factors(x, self.energy)


def hosvd_factors(x: torch.Tensor, energy: float) -> list[torch.Tensor]:
    """Leading singular vectors of every unfolding of `x` that keep a fraction `energy` of its sum of squares."""
    factors = []
    for mode in range(x.dim()):
        values, vectors = gram_eigh(mode_gram(x, mode))
        factors.append(vectors[:, : energy_rank(values, energy)].to(x.dtype))
    return factors


class SubspaceIteration(Decomposed):
    """Nguyen et al., "Beyond Low-rank Decomposition" (ASI), ICML 2025 (arXiv 2505.05086), algorithm 1.

    Every mode has a fixed rank. Its factor is last step's after one step of subspace iteration: with `A` the unfolding
    and `U` last step's factor (random normal at first), `U = orthonormalize(A (A^T U))`.
    """

    def __init__(self, ranks: Sequence[int], seed: int = 0) -> None:
        self.ranks = list(ranks)
        self.generator = torch.Generator().manual_seed(seed)
        self.last: list[torch.Tensor] = []

    def factors_of(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One step of subspace iteration for every mode."""
        if [factor.shape[0] for factor in self.last] != list(x.shape):
            starts = [torch.randn(size, rank, generator=self.generator) for size, rank in zip(x.shape, self.ranks)]
            self.last = [start.to(x.device, x.dtype) for start in starts]
        for mode, factor in enumerate(self.last):
            unfolded = x.movedim(mode, 0).flatten(1)
            self.last[mode] = torch.linalg.qr(unfolded @ (unfolded.mT @ factor))[0]
        return list(self.last)
