"""What a task's data says about the layers: Gram matrices of their inputs, and the factors these give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lance_kernels._grams import Collector, Grams, agree
from lance_kernels._ranks import choose_ranks
from lance_kernels.calibrate import Runner, _pass_over
from lance_kernels.continual.basis import Basis
from lance_kernels.continual.layers import PatchConvolution, PatchFactors
from lance_kernels.continual.protection import Protection
from lance_kernels.distributed import Ranks
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops._checks import accumulation_dtype
from lance_kernels.ops.pack_core import core_bytes
from lance_kernels.ops.patch_convolution import kept_patch_factors, patch_core_size


class FeatureGrams:
    """Sums of the Gram matrices of layers' features: a linear layer's last mode, a convolution's patches.

    Args:
        layers: the layers, by name.
    """

    def __init__(self, layers: Mapping[str, CompressedLayer]) -> None:
        self.layers = layers
        self.grams: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context the layers' inputs are looked at."""
        with _hooks(self.layers, self._look):
            yield

    def sum_over(self, ranks: Ranks) -> None:
        """Replaces the sums by those over all ranks, the same bits on each."""
        called = ranks.exchange({name: gram.dtype for name, gram in self.grams.items()})
        for name, layer in self.layers.items():
            dtypes = [one[name] for one in called if name in one]
            if not dtypes:
                continue
            dtype = torch.float64 if torch.float64 in dtypes else torch.float32
            gram = self.grams.get(name)
            gram = _zero_gram(layer, dtype) if gram is None else gram.to(dtype)
            ranks.sum_(gram)
            ranks.broadcast_(gram, 0)
            self.grams[name] = gram

    def _look(self, name: str, x: torch.Tensor) -> None:
        layer = self.layers[name]
        dtype = accumulation_dtype(x.dtype)
        if name not in self.grams:
            self.grams[name] = _zero_gram(layer, dtype)
        gram = self.grams[name]
        if isinstance(layer, PatchConvolution):
            torch.ops.lance.patch_gram_(gram, x, layer.kernel_size, *layer.lance_geometry())
        else:
            torch.ops.lance.mode_grams_([gram[0]], x, [x.dim() - 1])


def _zero_gram(layer: CompressedLayer, dtype: torch.dtype) -> torch.Tensor:
    groups = layer.groups if isinstance(layer, PatchConvolution) else 1
    size = layer.weight[0].numel()
    return torch.zeros(groups, size, size, dtype=dtype, device=layer.weight.device)


@contextmanager
def _hooks(layers: Mapping[str, CompressedLayer], look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Shows every layer's batched inputs to `look` while the context lasts."""

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            look(name, x.unsqueeze(0) if x.dim() + 1 == getattr(layer, "batched_dim", None) else x)

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watchers:
    """A `Collector`, or none, and further watchers of one pass, as `Runner` takes a collector."""

    limit = None

    def __init__(self, collector: Collector | None, *others: Any) -> None:
        self.collector, self.others = collector, others

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for watcher in (self.collector, *self.others):
                if watcher is not None:
                    stack.enter_context(watcher.watching())
            yield

    def begin_batch(self) -> None:
        if self.collector is not None:
            self.collector.begin_batch()

    def deferred(self) -> bool:
        return self.collector is not None and self.collector.deferred()

    def seen(self) -> dict[str, Any]:
        return {} if self.collector is None else self.collector.seen()


@dataclass
class Found:
    """What calibration of a task gave.

    Attributes:
        tucker: factors of ordinary cores, by layer.
        patches: factors of patch cores, by layer.
        shared: owner by layer, where two have the same input.
        uncalled: layers that no batch reached.
    """

    tucker: dict[str, list[torch.Tensor | None]] = field(default_factory=dict)
    patches: dict[str, PatchFactors] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)


class Gatherer:
    """Runs a task's batches through the model.

    Args:
        run: the model, with compressed layers, and its batches, iterated up to twice.
    """

    def __init__(self, run: Runner) -> None:
        self.run = run
        self.ranks = Ranks()

    def features(self, layers: Mapping[str, CompressedLayer]) -> dict[str, torch.Tensor]:
        """Gram matrices of the layers' features over the batches, `(groups, n, n)`, of every layer that was called."""
        grams = FeatureGrams(layers)
        self._pass(None, grams)
        grams.sum_over(self.ranks)
        return grams.grams

    def factors(self, layers: Mapping[str, CompressedLayer], protected: Mapping[str, Protection]) -> Found:
        """Factors whose features lie in what is free of the protected directions.

        Args:
            layers: all layers to find factors for, by name.
            protected: those of them that have protected directions.
        """
        found = Found()
        collector = Collector(layers, None, repeatable=False)
        patches = FeatureGrams({name: layer for name, layer in layers.items() if _has_patches(layer, name, protected)})
        everyone = self._pass(collector, patches)
        views, owners = agree(collector, [seen for _, seen in everyone])
        for name, view in views.items():
            collector.records[name].sum_over(self.ranks, view)
            for gram in collector.records[name].grams:
                if gram is not None:
                    self.ranks.broadcast_(gram, 0)
        patches.sum_over(self.ranks)
        found.shared = {name: owner for name, owner in owners.items() if owner in views}
        found.uncalled = [name for name in layers if name not in views and name not in found.shared]
        records = {
            name: collector.records[found.shared.get(name, name)] for name in layers if name not in found.uncalled
        }
        for name, record in records.items():
            layer = layers[name]
            basis = protected[name].basis if name in protected else None
            if name in patches.grams and basis is not None:
                found.patches[name] = _patch_factors(name, layer, patches.grams.pop(name), basis)
            restricting = None if isinstance(layer, PatchConvolution) else basis
            found.tucker[name] = _tucker_factors(name, layer, record, restricting)
        self._find_positions(found, layers)
        for name in list(found.patches):
            if _bytes_of_patches(found, name, layers, records) > _bytes_of_tucker(found, name, layers, records):
                del found.patches[name]
            else:
                del found.tucker[name]
        return found

    def _find_positions(self, found: Found, layers: Mapping[str, CompressedLayer]) -> None:
        """Adds the factors of the positions of the patch cores, from a pass of their own."""
        if not found.patches:
            return
        positions = PositionGrams({name: layers[name] for name in found.patches}, found.patches)
        self._pass(None, positions)
        for name, grams in positions.sum_over(self.ranks).items():
            spectra = [None if gram is None else _decomposed(name, gram) for gram in grams]
            values = [None, None, *(None if spectrum is None else spectrum[0] for spectrum in spectra)]
            ranks = choose_ranks(name, values, layers[name].lance_config)[2:]
            found.patches[name].spatial = [
                None if spectrum is None or rank is None else spectrum[1][:, :rank].contiguous()
                for spectrum, rank in zip(spectra, ranks)
            ]

    def _pass(self, collector: Collector | None, *others: Any) -> list[tuple[int, dict[str, Any]]]:
        everyone = _pass_over(self.run, _Watchers(collector, *others), self.ranks)  # type: ignore[arg-type]
        if not sum(batches for batches, _ in everyone):
            raise ValueError("NullSpaceLearner: loader gave no batch; expected at least one")
        return everyone


class PositionGrams:
    """Sums of the Gram matrices of the spatial modes of convolutions' projected patches.

    Args:
        layers: the convolutions, by name.
        factors: what projects their patches, by name.
    """

    def __init__(self, layers: Mapping[str, CompressedLayer], factors: Mapping[str, PatchFactors]) -> None:
        self.layers, self.factors = layers, factors
        self.grams: dict[str, list[torch.Tensor | None]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context the layers' inputs are looked at."""
        with _hooks(self.layers, self._look):
            yield

    def sum_over(self, ranks: Ranks) -> dict[str, list[torch.Tensor | None]]:
        """The sums over all ranks, the same bits on each; None for a mode whose size changed."""
        mine = {
            name: [None if gram is None else (len(gram), gram.dtype) for gram in grams]
            for name, grams in self.grams.items()
        }
        everyone = ranks.exchange(mine)
        for name, layer in self.layers.items():
            views = [one[name] for one in everyone if name in one]
            summed: list[torch.Tensor | None] = []
            for mode, described in enumerate(views[0]):
                if described is None or any(view[mode] != described for view in views):
                    summed.append(None)
                    continue
                size, dtype = described
                own = self.grams[name][mode] if name in self.grams else None
                gram = torch.zeros(size, size, dtype=dtype, device=layer.weight.device) if own is None else own
                ranks.sum_(gram)
                ranks.broadcast_(gram, 0)
                summed.append(gram)
            self.grams[name] = summed
        return self.grams

    def _look(self, name: str, x: torch.Tensor) -> None:
        layer = self.layers[name]
        assert isinstance(layer, PatchConvolution)
        factor, _ = kept_patch_factors(self.factors[name].factor, [], x.dtype)
        core = torch.ops.lance.patch_project(x, factor, layer.kernel_size, *layer.lance_geometry())
        if name not in self.grams:
            dtype = accumulation_dtype(core.dtype)
            self.grams[name] = [torch.zeros(size, size, dtype=dtype, device=x.device) for size in core.shape[2:]]
        grams = self.grams[name]
        for mode, size in enumerate(core.shape[2:]):
            gram = grams[mode]
            grams[mode] = gram if gram is not None and len(gram) == size else None
        wanted = {mode: gram for mode, gram in enumerate(grams) if gram is not None}
        torch.ops.lance.mode_grams_(list(wanted.values()), core, [2 + mode for mode in wanted])


def protected_directions(
    gram: torch.Tensor, basis: Basis, energy: float, layer: CompressedLayer, name: str
) -> tuple[list[torch.Tensor], int]:
    """What has to be protected beside a basis for it to carry a share of a Gram matrix's energy.

    The criterion of Saha et al. (arXiv 2103.09762, equation 9): the energy along directions that are protected already
    counts towards the share.

    Args:
        gram: `(groups, n, n)`.
        basis: the directions protected so far.
        energy: the share, in (0, 1].
        layer: the layer whose features these are.
        name: its name, for messages.

    Returns:
        By group, free coordinates of the new directions, `(n - k, count)`, float64; and the directions, of all groups,
        that a next task with this Gram matrix would train.
    """
    found, following = [], 0
    for group, whole in enumerate(gram.double()):
        values, vectors = _decomposed(name, basis.restricted(whole, group))
        total = whole.trace()
        kept = (total - values.sum()).clamp_min(0) + torch.cat([values.new_zeros(1), values.cumsum(0)])
        count = min(int((kept < energy * total * (1 - 1e-12)).sum()), len(values))
        found.append(vectors[:, :count])
        # What the new directions leave has the other eigenvalues.
        following += _feature_rank(name, layer, values[count:]) if count < len(values) else 0
    return found, following


def _has_patches(layer: CompressedLayer, name: str, protected: Mapping[str, Protection]) -> bool:
    return isinstance(layer, PatchConvolution) and name in protected


def _decomposed(name: str, gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        values, vectors = torch.ops.lance.gram_eigh(gram)
    except RuntimeError as error:
        raise RuntimeError(f"NullSpaceLearner: layer {name!r}, its input: {error}") from error
    return values, vectors


def _feature_rank(name: str, layer: CompressedLayer, values: torch.Tensor) -> int:
    """Rank that the layer's config gives its feature mode, for these eigenvalues."""
    modes = getattr(layer, "batched_dim", None)
    feature = 1 if modes is not None else 0
    spectra: list[torch.Tensor | None] = [None] * (modes or 1)
    spectra[feature] = values
    rank = choose_ranks(name, spectra, layer.lance_config)[feature]
    return len(values) if rank is None else rank


def _patch_factors(name: str, layer: CompressedLayer, gram: torch.Tensor, basis: Basis) -> PatchFactors:
    """The leading directions of the patches that are free, as many in every group; fewer where no more are free."""
    spectra = [_decomposed(name, basis.restricted(whole, group)) for group, whole in enumerate(gram.double())]
    rank = max(_feature_rank(name, layer, values) for values, _ in spectra if len(values))
    factor = gram.new_zeros(basis.groups, basis.size, rank)
    for group, (_, vectors) in enumerate(spectra):
        count = min(rank, vectors.shape[1])
        factor[group, :, :count] = basis.embedded(vectors[:, :count], group)
    return PatchFactors(factor, [])


def _tucker_factors(name: str, layer: CompressedLayer, record: Grams, basis: Basis | None) -> list[torch.Tensor | None]:
    """Factors of every mode of the input; with a basis, the last mode's lie in what is free of it."""
    spectra: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    last = len(record.grams) - 1
    for mode, gram in enumerate(record.grams):
        if gram is not None and mode == last and basis is not None and basis.width:
            gram = basis.restricted(gram.double(), 0)
        spectra.append(None if gram is None else _decomposed(name, gram))
    ranks = choose_ranks(name, [None if s is None else s[0] for s in spectra], layer.lance_config)
    factors = [None if s is None or rank is None else s[1][:, :rank] for s, rank in zip(spectra, ranks)]
    spectrum = spectra[last]
    if basis is not None and basis.width and spectrum is not None:
        kept = factors[last]
        factors[last] = basis.embedded(spectrum[1] if kept is None else kept, 0)
    return factors


def _bytes_of_tucker(
    found: Found, name: str, layers: Mapping[str, CompressedLayer], records: Mapping[str, Grams]
) -> int:
    size = records[name].size
    assert size is not None
    ranks = [extent if f is None else f.shape[1] for extent, f in zip(size, found.tucker[name])]
    return core_bytes(ranks, layers[name].lance_core_bits, layers[name].weight.element_size())


def _bytes_of_patches(
    found: Found, name: str, layers: Mapping[str, CompressedLayer], records: Mapping[str, Grams]
) -> int:
    layer, size, patch = layers[name], records[name].size, found.patches[name]
    assert size is not None
    assert isinstance(layer, PatchConvolution)
    core = patch_core_size(size, patch.factor, patch.spatial, layer.kernel_size, layer.lance_geometry())
    return core_bytes(core, layer.lance_core_bits, layer.weight.element_size())
