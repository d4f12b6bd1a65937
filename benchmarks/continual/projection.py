"""Ways to learn tasks in orthogonal subspaces: gradient projection memory, LANCE as published, and this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn.functional import unfold

import lance_kernels as lance
from benchmarks.continual.methods import Learner
from benchmarks.continual.networks import MultiHead
from benchmarks.continual.tasks import Batch, Task
from benchmarks.methods.kept import Compression, Layer, keep_less, padding_of
from benchmarks.published import contract
from lance_kernels._ranks import energy_rank


def patches(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What a layer multiplies its weight with.

    Args:
        x: the layer's input, `(B, C, H, W)` or `(B, D)`.
        layer: a convolution or a linear layer.

    Returns:
        `(B, n, L)`: the input's patches for a convolution, `n = C kH kW`, at `L` positions; features, `L = 1`, else.
    """
    if isinstance(layer, nn.Linear):
        return x.unsqueeze(2)
    return unfold(x, layer.kernel_size, layer.dilation, padding_of(layer), layer.stride)


def inputs_of(model: nn.Module, layers: Mapping[str, Layer], loader: Sequence[Batch]) -> dict[str, list[torch.Tensor]]:
    """The layers' inputs, one tensor a batch, in evaluation mode."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def look(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen[name].append(args[0].detach())

    handles = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    training = model.training
    model.eval()
    with torch.no_grad():
        for images, _ in loader:
            model(images)
    model.train(training)
    for handle in handles:
        handle.remove()
    return seen


def mode_grams(inputs: Sequence[torch.Tensor], layer: Layer) -> list[torch.Tensor]:
    """Gram matrices of the modes of a layer's patches `(B, n, L)`, summed over batches, float64.

    Left singular vectors and squared singular values of a mode's unfolding are the Gram matrix's eigenvectors and
    eigenvalues.
    """
    grams = [torch.zeros(0)] * 3
    for batch, x in enumerate(inputs):
        found = patches(x, layer).double()
        for mode, equation in enumerate(("bnl,cnl->bc", "bnl,bml->nm", "bnl,bnk->lk")):
            gram = torch.einsum(equation, found, found)
            grams[mode] = gram if batch == 0 else grams[mode] + gram
    return grams


def feature_gram(inputs: Sequence[torch.Tensor], layer: Layer) -> torch.Tensor:
    """Gram matrix `R R^T` of a layer's representation matrix (its patches as columns), `(n, n)`, float64."""
    total = torch.zeros(layer.weight[0].numel(), layer.weight[0].numel(), dtype=torch.float64)
    for x in inputs:
        columns = patches(x, layer).transpose(0, 1).flatten(1)
        total += (columns @ columns.mT).double()
    return total


def missing_directions(gram: torch.Tensor, basis: torch.Tensor, energy: float) -> torch.Tensor:
    """Directions that a basis lacks to carry a share of a Gram matrix's energy (arXiv 2103.09762, equations 8 and 9).

    Args:
        gram: `R R^T`, `(n, n)`, float64.
        basis: `M`, `(n, k)`, columns orthonormal.
        energy: the share.

    Returns:
        The leading left singular vectors of `R - M M^T R`, the fewest with which the share is reached, `(n, count)`.
    """
    held = basis.double()
    rest = gram - held @ (held.mT @ gram)
    rest = rest - (rest @ held) @ held.mT
    values, vectors = torch.linalg.eigh((rest + rest.mT) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = gram.trace()
    kept = (total - values.sum()).clamp_min(0) + torch.cat([values.new_zeros(1), values.cumsum(0)])
    count = min(int((kept < energy * total * (1 - 1e-12)).sum()), len(gram) - basis.shape[1])
    return vectors[:, :count]


class Protecting(Learner):
    """What methods with a basis of protected directions a layer share.

    Args:
        model: the network.
        optimizer: trains it.
        seed: not used.
        energy: share of a task's energy that the protected directions carry.
    """

    def __init__(self, model: MultiHead, optimizer: torch.optim.Optimizer, seed: int, energy: float) -> None:
        super().__init__(model, optimizer, seed)
        self.energy = energy
        self.layers = model.protected_layers()
        self.bases = {name: torch.zeros(layer.weight[0].numel(), 0) for name, layer in self.layers.items()}
        self.products: dict[str, torch.Tensor] = {}

    def end_task(self, index: int, task: Task, loader: Sequence[Batch]) -> None:
        """Adds what the task uses; norms are trained in the first task only, as in the papers."""
        for name, inputs in inputs_of(self.model, self.layers, loader).items():
            new = missing_directions(feature_gram(inputs, self.layers[name]), self.bases[name], self.energy)
            self.bases[name] = torch.cat([self.bases[name], new.float()], dim=1)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.requires_grad_(False)
                module.register_forward_pre_hook(_in_evaluation_mode)

    def memory_bytes(self) -> int:
        """The bases."""
        return sum(basis.nbytes for basis in self.bases.values())

    def working_bytes(self) -> int:
        """The products that pay."""
        return sum(product.nbytes for product in self.products.values())


def _in_evaluation_mode(module: nn.Module, args: object) -> None:
    module.training = False


class GradientProjection(Protecting):
    """Gradient projection memory (Saha et al., ICLR 2021): gradients lose their part along protected directions.

    `G - (G M) M^T` (equation 7), or `G - G (M M^T)` with the product formed once a task where that takes fewer
    operations.
    """

    def begin_task(self, index: int, loader: Sequence[Batch]) -> None:
        """Forms the products that pay."""
        self.products = {n: basis @ basis.mT for n, basis in self.bases.items() if 2 * basis.shape[1] > len(basis)}

    def after_backward(self) -> None:
        """Projects every protected layer's gradient."""
        for name, layer in self.layers.items():
            basis, gradient = self.bases[name], layer.weight.grad
            if basis.shape[1] and gradient is not None:
                rows = gradient.flatten(1)
                along = rows @ self.products[name] if name in self.products else (rows @ basis) @ basis.mT
                rows -= along


class PatchCore(Compression):
    """A layer's patches in the form of arXiv 2509.21617's continual learning: batch, features and positions projected.

    Attributes:
        factors: `(size_n, rank_n)` for batch, features and positions; empty to keep the input whole.
    """

    def __init__(self) -> None:
        self.factors: list[torch.Tensor] = []

    def keep(self, x: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
        """The core `(r_0, r_1, r_2)` of the patches, or `x`."""
        if not self.factors:
            return [x]
        return [contract(patches(x, layer), self.factors, 0)]

    def weight_grad(
        self, kept: Sequence[torch.Tensor], grad_output: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """From the core: `grad_output` projected on the batch factor, then on the positions, then the features'."""
        if not self.factors:
            columns = patches(kept[0], layer)
            return torch.einsum(
                "bol,bnl->on", grad_output.reshape(len(columns), -1, columns.shape[2]), columns
            ).view_as(layer.weight)
        batch, features, positions = self.factors
        thin = torch.einsum("bol,bk->kol", grad_output.reshape(len(batch), -1, len(positions)), batch)
        thin = torch.einsum("kol,lq->koq", thin, positions)
        return torch.einsum("koq,krq,nr->on", thin, kept[0], features).view_as(layer.weight)


class PublishedLance(Protecting):
    """LANCE's continual learning as published: the first task plain, later ones from cores free of what is protected.

    Batch and positions keep `mode_energy` of their energy; the features' rank is what the protected directions lack to
    the energy of protection, at least 1. Compared with the published code, sums over batches are true sums.

    Args:
        model: the network.
        optimizer: trains it.
        seed: not used.
        energy: share that protected and trained features carry together; 0.97 in the paper.
        mode_energy: share that the factors of batch and positions keep; 0.98 in the paper.
    """

    def __init__(
        self,
        model: MultiHead,
        optimizer: torch.optim.Optimizer,
        seed: int,
        energy: float = 0.97,
        mode_energy: float = 0.98,
    ) -> None:
        super().__init__(model, optimizer, seed, energy)
        self.mode_energy = mode_energy
        self.cores = {name: PatchCore() for name in self.layers}
        keep_less(model, list(self.layers), lambda name, layer: self.cores[name])
        self.layers = {name: model.get_submodule(name) for name in self.layers}

    def begin_task(self, index: int, loader: Sequence[Batch]) -> None:
        """Finds the factors of the task; none for the first."""
        if index == 0:
            return
        for name, inputs in inputs_of(self.model, self.layers, loader).items():
            grams = mode_grams(inputs, self.layers[name])
            features = missing_directions(grams[1], self.bases[name], self.energy)
            if not features.shape[1]:
                features = missing_directions(grams[1], self.bases[name], 1.0)[:, :1]
            batch, positions = (_leading(gram, self.mode_energy) for gram in (grams[0], grams[2]))
            self.cores[name].factors = [batch.float(), features.float(), positions.float()]


def _leading(gram: torch.Tensor, energy: float) -> torch.Tensor:
    values, vectors = torch.ops.lance.gram_eigh(gram)
    return vectors[:, : energy_rank(values, energy)]


class NullSpace(Learner):
    """This package's `NullSpaceLearner`.

    Args:
        model: the network.
        optimizer: trains it.
        seed: not used.
        energy: share of a task's energy that the protected directions carry.
        config: how inputs are compressed.
    """

    def __init__(
        self,
        model: MultiHead,
        optimizer: torch.optim.Optimizer,
        seed: int,
        energy: float,
        config: lance.LanceConfig | None = None,
    ) -> None:
        super().__init__(model, optimizer, seed)
        self.learner = lance.continual.NullSpaceLearner(
            model, optimizer, energy, config=config, heads=model.head_patterns, max_batches=None, progress=False
        )

    def begin_task(self, index: int, loader: Sequence[Batch]) -> None:
        """Factors free of what is protected."""
        self.learner.begin_task(loader)

    def end_task(self, index: int, task: Task, loader: Sequence[Batch]) -> None:
        """Protects what the task uses."""
        self.learner.end_task(loader)

    def memory_bytes(self) -> int:
        """Bases and remembered products."""
        return self.learner.memory().stored

    def working_bytes(self) -> int:
        """Orthonormal columns and probes made from them."""
        return self.learner.memory().working

    def close(self) -> None:
        """Leaves a plain model."""
        self.learner.close()
