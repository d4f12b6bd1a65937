"""How well fixed factors still fit the data: `track_drift`, `drift`, and recalibration under a threshold.

Off by default. A tracked layer looks at every `every`-th input only, so the extra passes over it cost next to nothing;
what it measures is exact for those inputs. Tracking is for eager training: under `torch.compile` a hook that counts
calls would recompile, so there the tracker does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lance_kernels._batches import tensors_in
from lance_kernels.calibrate import Calibration, calibrate
from lance_kernels.convert import compressed_layers
from lance_kernels.nn._compressed import CompressedLayer

OPENING_INPUTS = 4


@dataclass
class Drift:
    """How much of one layer's input its factors keep.

    Attributes:
        kept: share of the input's energy (sum of squares) in the core, over the inputs looked at; None before any.
        first: the same for the first few inputs after calibration or the start of tracking.
        modes: share that each mode's factor keeps alone; None where the mode is kept. For cores of patches the second
            is of the patches, the others are of output positions.
        inputs: number of inputs looked at; none that hold NaN or infinity, and none of a `report`.
    """

    kept: float | None
    first: float | None
    modes: tuple[float | None, ...]
    inputs: int

    @property
    def ratio(self) -> float | None:
        """`kept` over `first`: 1 without drift."""
        return None if self.kept is None or not self.first else self.kept / self.first


class _Tracker:
    """Sums of one layer's energies: of its input, in its core, and in the projection of each mode alone."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.suspended = False
        self.handle: RemovableHandle | None = None
        self.factors: list[torch.Tensor | None] = []
        self.begin()

    def begin(self) -> None:
        """Forgets everything."""
        self.calls = 0
        self.opening = [0.0, 0.0]
        self.openings = 0
        self.forget()

    def forget(self) -> None:
        """Forgets the sums, but not the first inputs'."""
        self.inputs = 0
        self.total = self.core = 0.0
        self.modes: list[float | None] = []

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(layer, CompressedLayer):
            # Reverted to its plain type since.
            if self.handle is not None:
                self.handle.remove()
            return
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not layer.is_calibrated or self.suspended:
            return
        patch = getattr(layer, "lance_patch", None)
        factors = layer.factors if patch is None else [patch.factor, *patch.spatial]
        if len(factors) != len(self.factors) or any(new is not old for new, old in zip(factors, self.factors)):
            self.begin()
            self.factors = factors
        self.calls += 1
        if (self.calls - 1) % self.every == 0:
            with torch.no_grad():
                self.look(layer, next(tensors_in((args, kwargs))))

    def look(self, layer: CompressedLayer, x: torch.Tensor) -> None:
        if x.dim() + 1 == getattr(layer, "batched_dim", None):
            x = x.unsqueeze(0)
        patch = getattr(layer, "lance_patch", None)
        found = _energies(layer, x) if patch is None else _patch_energies(layer, patch, x)
        if found is None:
            return
        total, core, alone = found
        if not (total and math.isfinite(total)):
            return
        if self.openings < OPENING_INPUTS:
            self.opening = [self.opening[0] + core, self.opening[1] + total]
            self.openings += 1
        pairs = zip(alone, self.modes or [0.0] * len(alone))
        self.modes = [None if new is None or old is None else old + new for new, old in pairs]
        self.total, self.core, self.inputs = self.total + total, self.core + core, self.inputs + 1

    def result(self) -> Drift:
        first = self.opening[0] / self.opening[1] if self.opening[1] else None
        if not self.total:
            return Drift(None, first, (), 0)
        modes = tuple(None if energy is None else energy / self.total for energy in self.modes)
        return Drift(self.core / self.total, first, modes, self.inputs)


def _energies(layer: CompressedLayer, x: torch.Tensor) -> tuple[float, float, list[float | None]] | None:
    """Energies of an input, of its core, and of its projection in each mode alone."""
    factors = layer.lance_factors_for(x.shape)
    if factors is None:
        return None
    lengths, _ = layer.lance_lengths_for(factors)
    core = torch.ops.lance.tucker_project(x, factors)
    if lengths is not None:
        core = core * (torch.arange(core.shape[-1], device=core.device) < lengths[..., None])
    return _energy(x), _energy(core), _alone(x, factors)


def _patch_energies(layer: CompressedLayer, patch: Any, x: torch.Tensor) -> tuple[float, float, list[float | None]]:
    """The same of a convolution's patches, whose core is of patches and output positions."""
    convolution: Any = layer
    numbers = convolution.kernel_size, *convolution.lance_geometry()
    # The sum of every patch's squares.
    squares = torch.ops.lance.patch_project(x.float().square(), torch.ones_like(patch.factor[..., :1]), *numbers)
    total = float(squares.double().sum())
    projected = torch.ops.lance.patch_project(x, patch.factor, *numbers)
    pairs = zip(patch.spatial, projected.shape[2:])
    spatial = [factor if factor is not None and len(factor) == extent else None for factor, extent in pairs]
    factors = [None, None, *spatial]
    core = torch.ops.lance.tucker_project(projected, factors)
    feature = _energy(projected)
    # A mode of positions alone: what it keeps of the projected patches.
    share = total / feature if feature else 0.0
    alone = [None if energy is None else energy * share for energy in _alone(projected, factors)]
    return total, _energy(core), [None, feature, *alone[2:]]


def _alone(x: torch.Tensor, factors: Sequence[torch.Tensor | None]) -> list[float | None]:
    none: list[torch.Tensor | None] = [None] * x.dim()
    return [
        None
        if factor is None
        else _energy(torch.ops.lance.tucker_project(x, [*none[:mode], factor, *none[mode + 1 :]]))
        for mode, factor in enumerate(factors)
    ]


def _energy(x: torch.Tensor) -> float:
    return float(x.float().square().sum())


@contextmanager
def tracking_suspended(model: nn.Module) -> Iterator[None]:
    """Within this context no tracked layer looks at its input."""
    trackers = [vars(layer)["lance_tracker"] for _, layer in compressed_layers(model) if _tracked(layer)]
    for tracker in trackers:
        tracker.suspended = True
    try:
        yield
    finally:
        for tracker in trackers:
            tracker.suspended = False


def track_drift(model: nn.Module, every: int = 16) -> None:
    """Starts to look at the compressed layers' inputs during training, anew if it was on.

    Args:
        model: a model that `compress_` changed.
        every: look at one input in this many.

    Raises:
        ValueError: `every` is less than 1, or the model has no compressed layer.
    """
    if every < 1:
        raise ValueError(f"track_drift: every is {every}; expected at least 1")
    layers = [layer for _, layer in compressed_layers(model)]
    if not layers:
        raise ValueError("track_drift: model has no compressed layers; call compress_ first")
    stop_tracking(model)
    for layer in layers:
        tracker = _Tracker(every)
        tracker.handle = layer.register_forward_pre_hook(tracker.hook, with_kwargs=True)
        vars(layer)["lance_tracker"] = tracker


def stop_tracking(model: nn.Module) -> None:
    """Ends what `track_drift` started."""
    for _, layer in compressed_layers(model):
        tracker = vars(layer).pop("lance_tracker", None)
        if tracker is not None and tracker.handle is not None:
            tracker.handle.remove()


def drift(model: nn.Module, *, reset: bool = False) -> dict[str, Drift]:
    """What the tracked layers saw since tracking or the last reset began; new factors begin anew by themselves.

    Args:
        model: a model under `track_drift`.
        reset: forget the sums afterwards, but not those of the first inputs.

    Returns:
        One entry a tracked layer, by name.

    Raises:
        ValueError: nothing is tracked.
    """
    trackers = {name: vars(layer)["lance_tracker"] for name, layer in compressed_layers(model) if _tracked(layer)}
    if not trackers:
        raise ValueError("drift: no layer is tracked; call track_drift first")
    result = {name: tracker.result() for name, tracker in trackers.items()}
    if reset:
        for tracker in trackers.values():
            tracker.forget()
    return result


def _tracked(layer: nn.Module) -> bool:
    return "lance_tracker" in vars(layer)


class RecalibrateOnDrift:
    """Recalibrates a model in place when its factors keep too little: call it now and then, after an epoch say.

    Args:
        model: a model that `compress_` and `calibrate` prepared; tracking is started.
        loader: calibration batches, as for `calibrate`; iterated anew each time.
        threshold: recalibrate when a layer's kept energy falls under this fraction of what it was at first.
        every: look at one input in this many.
        **arguments: further arguments of `calibrate`.

    Raises:
        ValueError: `threshold` is not in (0, 1].
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], threshold: float = 0.9, every: int = 16, **arguments: Any
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"RecalibrateOnDrift: threshold is {threshold}; expected a number in (0, 1]")
        self.model, self.loader, self.threshold, self.arguments = model, loader, threshold, arguments
        self.calibrate: Callable[..., Calibration] = calibrate
        track_drift(model, every)

    def __call__(self) -> Calibration | None:
        """Looks at what was tracked since the last call, and recalibrates if need be.

        Returns:
            The new calibration, or None where none was needed.
        """
        ratios = [entry.ratio for entry in drift(self.model, reset=True).values()]
        if all(ratio is None or ratio >= self.threshold for ratio in ratios):
            return None
        return self.calibrate(self.model, self.loader, **self.arguments)
