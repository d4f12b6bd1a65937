"""Choosing ranks and bits from the eigenvalues that calibration found: by energy, or under a byte budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from lance_kernels._candidates import (
    Candidate,
    LayerPlan,
    RankCandidate,
    SelectionCandidate,
    cheapest_within,
    selectable,
    selection,
    spend_rest,
)
from lance_kernels._ranks import rule_for
from lance_kernels._work import Work
from lance_kernels.config import LanceConfig, is_count
from lance_kernels.convert import compressed_layers
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops.pack_core import BITS
from lance_kernels.state import share_factors

if TYPE_CHECKING:
    from lance_kernels.calibrate import Calibration, Spectrum

# Signs alone are another thing than a gradient that is nearly true, and chosen only when asked for.
PLANNED_BITS = (8, 4, 2)


@dataclass
class Plan:
    """Ranks and bits for every layer of a model, before anything is changed.

    Attributes:
        layers: by layer name.
        budget_bytes: what the bytes had to stay within.
        max_work: what the operations had to stay within, over those of the dense weight gradients; None for no limit.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    budget_bytes: int = 0
    max_work: float | None = None

    @property
    def work(self) -> float:
        """Operations of projections and weight gradients over those of the dense weight gradients."""
        layers = self.layers.values()
        return sum(layer.flops for layer in layers) / max(sum(layer.dense_flops for layer in layers), 1)

    @property
    def bytes(self) -> int:
        """What the layers will hold together."""
        return sum(layer.bytes for layer in self.layers.values())

    @property
    def predicted_error(self) -> float:
        """Mean of the layers' predicted errors."""
        return sum(layer.predicted_error for layer in self.layers.values()) / max(len(self.layers), 1)

    def apply(self, model: nn.Module, calibration: Calibration) -> None:
        """Gives the model's layers the factors and bits of this plan.

        Args:
            model: the compressed model that was planned for.
            calibration: the calibration that was planned from.

        Raises:
            ValueError: the model lacks a layer of the plan; it is left as it was.
        """
        layers = dict(compressed_layers(model))
        missing = [name for name in self.layers if name not in layers or name not in calibration.layers]
        if missing:
            raise ValueError(f"Plan.apply: model or calibration has no layers {missing}; planned for another model?")
        for name, planned in self.layers.items():
            layers[name].lance_core_bits = planned.core_bits or 0
            spectrum = calibration.layers[name]
            lengths = None if planned.count is None else selection(spectrum, planned.ranks, planned.count)
            layers[name].set_factors(spectrum.factors(planned.ranks), lengths)
        share_factors(model, calibration.shared)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "bytes": self.bytes, "work": self.work, "predicted_error": self.predicted_error}

    def __str__(self) -> str:
        lines = [
            f"{self.bytes} of {self.budget_bytes} bytes, {self.work:.2f} of the dense weight gradients' operations, "
            f"predicted gradient error {self.predicted_error:.4f}"
        ]
        for layer in self.layers.values():
            ranks = ", ".join("keep" if rank is None else str(rank) for rank in layer.ranks)
            values = "" if layer.count is None else f", {layer.count} values a sample"
            lines.append(
                f"  {layer.name or '(root)'}: ranks ({ranks}){values} in {layer.core_bits or 'all'} bits, "
                f"{layer.bytes} of {layer.dense_bytes} bytes, error {layer.predicted_error:.4f}"
            )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    calibration: Calibration,
    budget_bytes: int,
    *,
    batch_size: int | None = None,
    bits: Iterable[int | None] = PLANNED_BITS,
    config: LanceConfig | None = None,
) -> Plan:
    """Chooses what every layer's core keeps, and its bits, so that all of it together stays within a budget.

    A layer whose batch mode alone is kept gets the single values of its core that are expected to be largest: the
    energy of one is the product of its modes' eigenvalues. Losing the fraction `t` of the energy, it has the error
    `1 - exp(-(a t + b t^3)) (1 - q)`, `q` for the bits. Other layers, and those that a rank pattern names, get ranks:
    modes that keep the fractions `k_n` give `1 - prod(exp(-w_n (1 - k_n)^1.5)) (1 - q)`, with a larger `w_n` for the
    feature mode than for positions. The sum of the errors is minimised, with `q` counted `config.rounding_weight`
    times: for a price of a byte every layer has its own best choice; the price is found by bisection, and what is left
    of the budget goes where it gains most.

    With `config.max_work` the operations of projections and weight gradients have a price as well, found the same way:
    single values are then chosen within boxes of fewer ranks, which lose the directions that no factor has.

    Args:
        model: a compressed model.
        calibration: what `calibrate` returned for it.
        budget_bytes: most bytes the layers' cores may take together, scales included.
        batch_size: samples the bytes are for; by default those of the first calibration batch.
        bits: bits a value to choose from; None is the dtype of the weights.
        config: limits and patterns on ranks, `rounding_weight` and `max_work`; by default the layers' own.

    Returns:
        The plan; its `apply` puts it into effect.

    Raises:
        ValueError: the budget is below the least possible, which the message gives; the model lacks a layer; or an
            argument is out of its range.
    """
    if batch_size is not None and not is_count(batch_size):
        raise ValueError(f"plan: batch_size is {batch_size!r}; expected at least 1, or None")
    bits = tuple(bits)
    if not bits or any(isinstance(width, bool) or width not in (*BITS, None) for width in bits):
        raise ValueError(f"plan: bits is {bits}; expected one or more of 8, 4, 2, 1 and None")
    layers = dict(compressed_layers(model))
    missing = [name for name in calibration.layers if name not in layers]
    if missing:
        raise ValueError(f"plan: model has no compressed layers {missing}; calibrated another model?")
    # Layers that share an input hold one core between them, and each has an error of its own.
    sharers: dict[str, list[CompressedLayer]] = {}
    for sharer, of in calibration.shared.items():
        sharers.setdefault(of, []).append(layers[sharer])
    candidates = [
        _candidate(
            name,
            [layers[name], *sharers.get(name, [])],
            spectrum,
            batch_size,
            bits,
            config or layers[name].lance_config,
        )
        for name, spectrum in calibration.layers.items()
        if name not in calibration.shared
    ]
    least = sum(candidate.core_bytes(candidate.least()) for candidate in candidates)
    if budget_bytes < least:
        raise ValueError(
            f"plan: budget_bytes is {budget_bytes}; the least that ranks of 1 in the fewest bits take is {least}"
        )
    max_work = min((c.config.max_work for c in candidates if c.config.max_work is not None), default=None)
    choices = cheapest_within(candidates, budget_bytes, max_work)
    spend_rest(candidates, choices, budget_bytes, max_work)
    result = Plan(budget_bytes=budget_bytes, max_work=max_work)
    described = {candidate.name: candidate.describe(choice) for candidate, choice in zip(candidates, choices)}
    for name in calibration.layers:
        owner = calibration.shared.get(name)
        result.layers[name] = (
            described[name] if owner is None else replace(described[owner], name=name, bytes=0, flops=0, dense_flops=0)
        )
    return result


def _candidate(
    name: str,
    layers: list[CompressedLayer],
    spectrum: Spectrum,
    batch_size: int | None,
    bits: tuple[int | None, ...],
    config: LanceConfig,
) -> Candidate:
    """What the layers of one core could get: single values of it, or ranks."""
    size = list(spectrum.size)
    if batch_size is not None and len(size) > 1:
        size[0] = batch_size
    layer = layers[0]
    common = (name, size, layer.weight.element_size(), bits, Work(layers, size, spectrum.calls), config)
    if selectable(spectrum) and rule_for(name, len(size), config) is None:
        return SelectionCandidate(*common, spectrum=spectrum)
    feature = 1 if hasattr(layer, "batched_dim") else len(size) - 1
    return RankCandidate(*common, spectrum=spectrum, feature=feature)
