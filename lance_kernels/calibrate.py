"""One HOSVD of every compressed layer's input over a few batches: `calibrate`."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lance_kernels._batches import run_model, to_device_of
from lance_kernels._grams import Collector, Grams, Seen, agree, groups_within
from lance_kernels._ranks import choose_ranks
from lance_kernels.config import LanceConfig, is_count
from lance_kernels.convert import compressed_layers
from lance_kernels.distributed import Ranks
from lance_kernels.ops._checks import FLOATING
from lance_kernels.plan import PLANNED_BITS, Plan, plan
from lance_kernels.state import atomic_save, share_factors


@dataclass
class Spectrum:
    """What calibration found out about one layer's input.

    Attributes:
        size: the input's shape in the first batch.
        eigenvalues: of every mode's Gram matrix, descending, `(size_n,)`; None for a mode that is kept.
        eigenvectors: as columns in the same order, `(size_n, size_n)`; None for a mode that is kept.
        varied: modes that are kept because their size changed from batch to batch.
        calls: most calls of the layer in one batch.
    """

    size: tuple[int, ...]
    eigenvalues: list[torch.Tensor | None]
    eigenvectors: list[torch.Tensor | None]
    varied: tuple[int, ...] = ()
    calls: int = 1

    def shares(self, mode: int) -> torch.Tensor:
        """A mode's eigenvalues over their sum, float64, on the CPU, `(size_n,)`; the mode has some above zero."""
        values = self.eigenvalues[mode]
        assert values is not None
        shares = values.double().cpu().clamp_min(0)
        return shares / shares.sum()

    def factors(self, ranks: Sequence[int | None]) -> list[torch.Tensor | None]:
        """The leading eigenvectors, `(size_n, rank_n)`, of every mode; None where the mode or its rank is."""
        pairs = zip(self.eigenvectors, ranks)
        return [None if vectors is None or rank is None else vectors[:, :rank] for vectors, rank in pairs]


@dataclass
class Calibration:
    """What `calibrate` found: enough to choose other ranks without the data.

    Attributes:
        layers: spectra by layer name.
        uncalled: layers that no batch reached; they are left uncalibrated, that is, plain.
        batches: number of batches seen, over all ranks.
        shared: by layer that had the same input tensors as another, the name of that other; their spectra are one.
    """

    layers: dict[str, Spectrum] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    batches: int = 0
    shared: dict[str, str] = field(default_factory=dict)

    def apply(self, model: nn.Module, config: LanceConfig | None = None) -> dict[str, list[int | None]]:
        """Gives the model's layers factors of ranks chosen from these spectra, and the bits of their cores.

        Layers that no batch reached become plain. Layers of equal configurations have one byte budget between them.

        Args:
            model: a compressed model with these layers.
            config: how ranks and bits are chosen; None takes each layer's own, from `compress_`.

        Returns:
            The ranks by layer; None for a mode that is kept.

        Raises:
            ValueError: the model lacks a layer, or a rank pattern does not fit; the model is left as it was.
        """
        layers = dict(compressed_layers(model))
        missing = [name for name in self.layers if name not in layers]
        if missing:
            raise ValueError(f"Calibration.apply: model has no compressed layers {missing}; calibrated another model?")
        rules = {name: config or layers[name].lance_config for name in self.layers}
        plans = self._plans(model, rules, config)
        chosen: dict[str, list[int | None]] = {}
        for name, spectrum in self.layers.items():
            if rules[name].budget_bytes is None:
                chosen[name] = choose_ranks(name, spectrum.eigenvalues, rules[name])
        for name, ranks in chosen.items():
            layers[name].set_factors(self.layers[name].factors(ranks))
            layers[name].lance_core_bits = rules[name].core_bits or 0
        for planned in plans:
            planned.apply(model, self)
            chosen.update({name: layer.ranks for name, layer in planned.layers.items()})
        for name in self.uncalled:
            if name in layers:
                layers[name].lance_clear_factors()
        share_factors(model, self.shared)
        return {name: chosen[name] for name in self.layers}

    def _plans(self, model: nn.Module, rules: Mapping[str, LanceConfig], config: LanceConfig | None) -> list[Plan]:
        """A plan for the layers of every configuration that has a byte budget."""
        plans = []
        budgeted = [rule for rule in rules.values() if rule.budget_bytes is not None]
        for rule in [rule for index, rule in enumerate(budgeted) if rule not in budgeted[:index]]:
            layers = {name: spectrum for name, spectrum in self.layers.items() if rules[name] == rule}
            shared = {name: owner for name, owner in self.shared.items() if {name, owner} <= layers.keys()}
            bits = (rule.core_bits,) if rule.core_bits in (None, 1) else PLANNED_BITS
            assert rule.budget_bytes is not None
            part = Calibration(layers, shared=shared)
            plans.append(plan(model, part, rule.budget_bytes, bits=bits, config=config))
        return plans

    def save(self, path: str | Path) -> None:
        """Writes the spectra to a file that `Calibration.load` reads; a file that is there is replaced at the end."""
        content = {
            "layers": {name: vars(spectrum) for name, spectrum in self.layers.items() if name not in self.shared},
            "uncalled": self.uncalled,
            "batches": self.batches,
            "shared": self.shared,
        }
        atomic_save(content, path)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote, to the CPU, without running code from the file.

        Raises:
            ValueError: the file is no calibration, or is damaged.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            layers = {name: Spectrum(**spectrum) for name, spectrum in content["layers"].items()}
            for name, spectrum in layers.items():
                _check_spectrum(name, spectrum)
            shared = dict(content["shared"])
            layers.update({name: layers[owner] for name, owner in shared.items()})
            return cls(layers, list(content["uncalled"]), int(content["batches"]), shared)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Calibration.load: {path} holds no calibration ({error})") from error
        except (RuntimeError, EOFError, pickle.UnpicklingError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"Calibration.load: {path} is damaged or no calibration ({reason})") from error


def _check_spectrum(name: str, spectrum: Spectrum) -> None:
    modes = len(spectrum.size)
    if not is_count(spectrum.calls):
        raise ValueError(f"layer {name!r} has {spectrum.calls!r} calls a batch")
    if not len(spectrum.eigenvalues) == len(spectrum.eigenvectors) == modes:
        raise ValueError(f"layer {name!r} has {modes} modes, but another number of eigenvalues or eigenvectors")
    for mode, (values, vectors) in enumerate(zip(spectrum.eigenvalues, spectrum.eigenvectors)):
        if values is None and vectors is None:
            continue
        size = spectrum.size[mode]
        if not (_is_floating(values, (size,)) and _is_floating(vectors, (size, size))):
            raise ValueError(
                f"layer {name!r}, mode {mode}: expected {size} eigenvalues and {size}x{size} eigenvectors, finite"
            )


def _is_floating(tensor: object, shape: tuple[int, ...]) -> bool:
    right = isinstance(tensor, torch.Tensor) and tuple(tensor.shape) == shape and tensor.dtype in FLOATING
    return right and isinstance(tensor, torch.Tensor) and bool(tensor.isfinite().all())


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None = 100,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    max_bytes: int | None = 2**31,
    process_group: dist.ProcessGroup | None = None,
) -> Calibration:
    """Runs a few batches forward and gives every compressed layer the factors of its input's HOSVD.

    The model runs in eval mode without gradients; every module's mode is restored, also when the loader raises. Every
    sample weighs the same. One Gram matrix a mode is held, never an activation; layers whose input is the same tensor
    have one between them, and share one core in training where their ranks come out the same. Should anything raise,
    the layers keep the factors they had.

    A compiled model runs as eager code here, and compiled code sees the new factors.

    Under `torch.distributed`, every rank calls this with its own share of the data, which may be empty; Grams are
    summed over the ranks, and every rank gets the same factors. A rank that fails makes the others raise.

    Args:
        model: a model that `compress_` changed.
        loader: batches; a tensor is the model's input, of a tuple or list the first entry is, a dict gives keyword
            arguments. Tensors are moved to the device of the model's first parameter.
        max_batches: number of batches to use, on this rank; None for all.
        forward_fn: `forward_fn(model, batch)` runs the model on a batch of any other form.
        progress: show a progress bar.
        max_bytes: most bytes of Gram matrices held at once, 2 GiB by default; None for no limit. Beyond it the layers
            are taken in groups, with one pass over `loader` each, and what was found is kept in host memory. One layer
            is never split: it is held however large its Grams are.
        process_group: ranks to sum over; None for all.

    Returns:
        The eigenvalues and eigenvectors by layer and mode.

    Raises:
        ValueError: the model has no compressed layer, the loader gave no batch on any rank, or `loader` can be
            iterated once only and `max_bytes` asks for more passes.
        RuntimeError: an input holds NaN or infinity, and the message names the layer; or another rank failed.
    """
    layers = dict(compressed_layers(model))
    if not layers:
        raise ValueError("calibrate: model has no compressed layers; call compress_ first")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"calibrate: max_bytes is {max_bytes}; expected at least 1, or None")
    if max_batches is not None and not is_count(max_batches):
        raise ValueError(f"calibrate: max_batches is {max_batches!r}; expected at least 1, or None")
    ranks = Ranks(process_group)
    run = Runner(model, loader, max_batches, forward_fn, progress)
    calibration = Calibration()
    groups: list[Collection[str]] = [list(layers)]
    while groups:
        group = groups.pop(0)
        collector = Collector({name: layers[name] for name in group}, max_bytes, run.repeatable)
        everyone = _pass_over(run, collector, ranks)
        if run.passes == 1:
            calibration.batches = sum(batches for batches, _ in everyone)
            if not calibration.batches:
                raise ValueError("calibrate: loader gave no batch; expected at least one")
        views, owners = agree(collector, [seen for _, seen in everyone])
        for name in group:
            calibration.shared.pop(name, None)
        calibration.shared.update(owners)
        waiting = {name: view for name, view in views.items() if any(seen.deferred for seen in view)}
        done = {name: view for name, view in views.items() if name not in waiting}
        _decompose(calibration, collector, ranks, done, bool(waiting) or run.passes > 1)
        sizes = {name: max(seen.bytes for seen in view) for name, view in waiting.items()}
        groups += groups_within(sizes, max_bytes, calibration.shared)
    calibration.shared = {name: owner for name, owner in calibration.shared.items() if owner in calibration.layers}
    for name, owner in calibration.shared.items():
        calibration.layers[name] = calibration.layers[owner]
    calibration.layers = {name: calibration.layers[name] for name in layers if name in calibration.layers}
    calibration.uncalled = [name for name in layers if name not in calibration.layers]
    calibration.apply(model)
    if calibration.uncalled:
        warnings.warn(
            f"calibrate: no batch reached {', '.join(calibration.uncalled)}; these layers stay plain", stacklevel=2
        )
    return calibration


class Runner:
    """One pass over the calibration batches, as often as it is asked for."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        max_batches: int | None,
        forward_fn: Callable[[nn.Module, Any], Any] | None,
        progress: bool,
    ) -> None:
        # DDP broadcasts buffers in every forward, which ranks with fewer batches would not join.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.loader, self.max_batches, self.forward_fn, self.progress = loader, max_batches, forward_fn, progress
        self.repeatable = not isinstance(loader, Iterator)
        self.passes = 0

    def __call__(self, collector: Collector) -> int:
        self.passes += 1
        run = self.forward_fn or run_model
        batches = 0
        # Hooks that came after compilation run in eager code alone.
        with collector.watching(), _eval_mode(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            total = self.max_batches
            if total is None:
                # A `DataLoader` of an `IterableDataset` has a `__len__` that raises.
                total = length_hint(self.loader) or None
            label = "calibrating" if self.passes == 1 else f"calibrating, pass {self.passes}"
            with tqdm(total=total, desc=label, unit="batch", disable=not self.progress, leave=False) as bar:
                for batch in self.loader:
                    collector.begin_batch()
                    run(self.model, batch if self.forward_fn is not None else to_device_of(self.model, batch))
                    self._check_repeatable(collector)
                    batches += 1
                    bar.update()
                    if batches == self.max_batches:
                        break
        return batches

    def _check_repeatable(self, collector: Collector) -> None:
        if collector.deferred() and not self.repeatable:
            raise ValueError(
                f"calibrate: the Gram matrices of this model exceed max_bytes, {collector.limit}, so that several "
                f"passes are needed, and loader, a {type(self.loader).__name__}, can be iterated once only; pass a "
                "list or a DataLoader, or a larger max_bytes"
            )


def _pass_over(run: Runner, collector: Collector, ranks: Ranks) -> list[tuple[int, dict[str, Seen]]]:
    """Runs the batches; returns every rank's number of them and what it saw, or raises on all ranks."""
    error: Exception | None = None
    batches = 0
    try:
        batches = run(collector)
    except Exception as raised:
        error = raised
    return ranks.exchange((batches, collector.seen()), error)


def _decompose(
    calibration: Calibration, collector: Collector, ranks: Ranks, views: Mapping[str, list[Seen]], to_host: bool
) -> None:
    """Sums Grams over the ranks and adds their eigenvalues and eigenvectors, each layer's found by one rank."""
    for name, view in views.items():
        collector.records[name].sum_over(ranks, view)
    found: dict[str, Spectrum] = {}
    error: Exception | None = None
    for index, name in enumerate(views):
        if index % ranks.count == ranks.rank and error is None:
            try:
                found[name] = _spectrum(name, collector.records[name])
            except Exception as raised:
                error = raised
    ranks.exchange(None, error)
    for index, name in enumerate(views):
        record = collector.records[name]
        spectrum = found.pop(name, None) or _empty_spectrum(record)
        for tensor in (*spectrum.eigenvalues, *spectrum.eigenvectors):
            if tensor is not None:
                ranks.broadcast_(tensor, index % ranks.count)
        record.grams = []
        if to_host:
            spectrum.eigenvalues = [None if values is None else values.cpu() for values in spectrum.eigenvalues]
            spectrum.eigenvectors = [None if vectors is None else vectors.cpu() for vectors in spectrum.eigenvectors]
        calibration.layers[name] = spectrum


def _spectrum(name: str, record: Grams) -> Spectrum:
    assert record.size is not None
    spectrum = Spectrum(record.size, [], [], tuple(sorted(record.varied)), record.most_calls)
    for mode, gram in enumerate(record.grams):
        if gram is None:
            spectrum.eigenvalues.append(None)
            spectrum.eigenvectors.append(None)
            continue
        try:
            values, vectors = torch.ops.lance.gram_eigh(gram)
        except RuntimeError as error:
            raise RuntimeError(
                f"calibrate: layer {name!r}, mode {mode} of its input: {error} (squares of float32 values above 1e19 "
                "are infinite)"
            ) from error
        spectrum.eigenvalues.append(values)
        spectrum.eigenvectors.append(vectors)
        record.grams[mode] = None
    return spectrum


def _empty_spectrum(record: Grams) -> Spectrum:
    """Room for what another rank found."""
    assert record.size is not None
    values = [None if gram is None else gram.new_empty(gram.shape[0]) for gram in record.grams]
    vectors = [None if gram is None else torch.empty_like(gram) for gram in record.grams]
    return Spectrum(record.size, values, vectors, tuple(sorted(record.varied)), record.most_calls)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
