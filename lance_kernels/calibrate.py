"""One HOSVD of every compressed layer's input over a few batches: `calibrate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lance_kernels._batches import run_model, to_device_of
from lance_kernels.config import LanceConfig
from lance_kernels.convert import compressed_layers
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops._checks import accumulation_dtype
from lance_kernels.plan import choose_ranks, plan


@dataclass
class Spectrum:
    """What calibration found out about one layer's input.

    Attributes:
        size: the input's shape in the first batch.
        eigenvalues: of every mode's Gram matrix, descending, `(size_n,)`; None for a mode that is kept.
        eigenvectors: as columns in the same order, `(size_n, size_n)`; None for a mode that is kept.
        varied: modes that are kept because their size changed from batch to batch.
    """

    size: tuple[int, ...]
    eigenvalues: list[torch.Tensor | None]
    eigenvectors: list[torch.Tensor | None]
    varied: tuple[int, ...] = ()


@dataclass
class Calibration:
    """What `calibrate` found: enough to choose other ranks without the data.

    Attributes:
        layers: spectra by layer name.
        uncalled: layers that no batch reached; they are left uncalibrated, that is, plain.
        batches: number of batches seen.
    """

    layers: dict[str, Spectrum] = field(default_factory=dict)
    uncalled: list[str] = field(default_factory=list)
    batches: int = 0

    def apply(self, model: nn.Module, config: LanceConfig | None = None) -> dict[str, list[int | None]]:
        """Gives the model's layers factors of ranks chosen from these spectra.

        Args:
            model: a compressed model with these layers.
            config: how ranks are chosen; None takes each layer's own, from `compress_`.

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
        budget = next((rule.budget_bytes for rule in rules.values()), None)
        if budget is not None:
            bits = (None,) if next(iter(rules.values())).core_bits is None else (8, 4, 2)
            planned = plan(model, self, budget, bits=bits, config=config)
            planned.apply(model, self)
            return {name: layer.ranks for name, layer in planned.layers.items()}
        chosen: dict[str, list[int | None]] = {}
        for name, spectrum in self.layers.items():
            chosen[name] = choose_ranks(name, spectrum.eigenvalues, rules[name])
        for name, ranks in chosen.items():
            pairs = zip(self.layers[name].eigenvectors, ranks)
            layers[name].set_factors(
                [None if vectors is None or rank is None else vectors[:, :rank] for vectors, rank in pairs]
            )
        return chosen

    def save(self, path: str | Path) -> None:
        """Writes the spectra to a file that `Calibration.load` reads."""
        torch.save(
            {
                "layers": {k: vars(v) for k, v in self.layers.items()},
                "uncalled": self.uncalled,
                "batches": self.batches,
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote, without running code from the file.

        Raises:
            ValueError: the file is no calibration.
        """
        content = torch.load(path, weights_only=True)
        try:
            layers = {name: Spectrum(**spectrum) for name, spectrum in content["layers"].items()}
            return cls(layers, content["uncalled"], content["batches"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Calibration.load: {path} holds no calibration ({error})") from error


class _Grams:
    """Running Gram matrices of one layer's input."""

    def __init__(self, layer: CompressedLayer) -> None:
        self.fixed_batch = layer.lance_config.batch_mode == "fixed"
        self.expected_dim = getattr(layer, "batched_dim", None)
        self.size: tuple[int, ...] | None = None
        self.grams: list[torch.Tensor | None] = []
        self.varied: set[int] = set()

    def update(self, x: torch.Tensor) -> None:
        if self.expected_dim is not None and x.dim() == self.expected_dim - 1:
            x = x.unsqueeze(0)
        if self.size is None:
            self.size = tuple(x.shape)
            dtype = accumulation_dtype(x.dtype)
            first = 0 if self.fixed_batch or x.dim() == 1 else 1
            self.grams = [
                x.new_zeros(size, size, dtype=dtype) if mode >= first else None for mode, size in enumerate(self.size)
            ]
        if x.dim() != len(self.size):
            # Only the last mode is the same one.
            self.varied |= set(range(len(self.size) - 1))
            self._add(x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0), {1: len(self.size) - 1})
            return
        batch_differs = self.fixed_batch and x.shape[0] != self.size[0]
        for mode in range(1, x.dim()):
            if x.shape[mode] != self.size[mode]:
                self.varied.add(mode)
        skipped = {0} if batch_differs else set()
        self._add(x, {mode: mode for mode in range(x.dim()) if mode not in skipped})

    def _add(self, x: torch.Tensor, modes: dict[int, int]) -> None:
        for index in self.varied:
            self.grams[index] = None
        grams = {mode: self.grams[index] for mode, index in modes.items()}
        wanted = {mode: gram for mode, gram in grams.items() if gram is not None}
        torch.ops.lance.mode_grams_(list(wanted.values()), x, list(wanted))

    def decompose(self, name: str) -> Spectrum:
        assert self.size is not None
        eigenvalues: list[torch.Tensor | None] = []
        eigenvectors: list[torch.Tensor | None] = []
        for mode, gram in enumerate(self.grams):
            if gram is None:
                eigenvalues.append(None)
                eigenvectors.append(None)
                continue
            try:
                values, vectors = torch.ops.lance.gram_eigh(gram)
            except RuntimeError as error:
                raise RuntimeError(f"calibrate: layer {name!r}, mode {mode} of its input: {error}") from error
            eigenvalues.append(values)
            eigenvectors.append(vectors)
            self.grams[mode] = None
        return Spectrum(self.size, eigenvalues, eigenvectors, tuple(sorted(self.varied)))


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None = 100,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> Calibration:
    """Runs a few batches forward and gives every compressed layer the factors of its input's HOSVD.

    The model runs in eval mode without gradients; every module's mode is restored, also when the loader raises. Every
    sample weighs the same. One Gram matrix a mode is held, never an activation. Should anything raise, the layers keep
    the factors they had.

    Args:
        model: a model that `compress_` changed.
        loader: batches; a tensor is the model's input, of a tuple or list the first entry is, a dict gives keyword
            arguments. Tensors are moved to the device of the model's first parameter.
        max_batches: number of batches to use; None for all.
        forward_fn: `forward_fn(model, batch)` runs the model on a batch of any other form.
        progress: show a progress bar.

    Returns:
        The eigenvalues and eigenvectors by layer and mode.

    Raises:
        ValueError: the model has no compressed layer, or the loader gave no batch.
        RuntimeError: an input holds NaN or infinity; the message names the layer.
    """
    layers = dict(compressed_layers(model))
    if not layers:
        raise ValueError("calibrate: model has no compressed layers; call compress_ first")
    running = {name: _Grams(layer) for name, layer in layers.items()}
    handles = [
        layer.register_forward_pre_hook(_collect(running[name]), with_kwargs=True) for name, layer in layers.items()
    ]
    run = forward_fn or run_model
    batches = 0
    try:
        with _eval_mode(model), torch.no_grad():
            total = max_batches if max_batches is not None else getattr(loader, "__len__", lambda: None)()
            with tqdm(total=total, desc="calibrating", unit="batch", disable=not progress, leave=False) as bar:
                for batch in loader:
                    run(model, batch if forward_fn is not None else to_device_of(model, batch))
                    batches += 1
                    bar.update()
                    if batches == max_batches:
                        break
    finally:
        for handle in handles:
            handle.remove()
    if not batches:
        raise ValueError("calibrate: loader gave no batch; expected at least one")
    calibration = Calibration(batches=batches)
    for name, grams in running.items():
        if grams.size is None:
            calibration.uncalled.append(name)
        else:
            calibration.layers[name] = grams.decompose(name)
    calibration.apply(model)
    if calibration.uncalled:
        warnings.warn(
            f"calibrate: no batch reached {', '.join(calibration.uncalled)}; these layers stay plain", stacklevel=2
        )
    return calibration


def _collect(grams: _Grams) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grams.update(args[0] if args else next(iter(kwargs.values())))

    return hook


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
