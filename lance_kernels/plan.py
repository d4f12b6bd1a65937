"""Choosing ranks and bits from the eigenvalues that calibration found: by energy, or under a byte budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lance_kernels.config import LanceConfig, RankRule, matches
from lance_kernels.convert import compressed_layers
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops.pack_core import packed_bytes
from lance_kernels.ops.tucker import mode_product_flops
from lance_kernels.state import share_factors

if TYPE_CHECKING:
    from lance_kernels.calibrate import Calibration, Spectrum

# Gradient cosine lost to rounding, by bits; None is the input's dtype. See docs/decisions.md for these figures.
ROUNDING: Mapping[int | None, float] = {None: 0.0, 8: 2e-5, 4: 2e-3, 2: 0.05}
# What a mode's lost energy costs: a lost feature is a lost column of the weight gradient, positions average out.
FEATURE_COST, POSITION_COST = 0.35, 0.19


def energy_rank(eigenvalues: torch.Tensor, energy: float) -> int:
    """Smallest rank that keeps a fraction of the energy.

    Args:
        eigenvalues: of a mode's Gram matrix, descending, not negative, `(size,)`.
        energy: the fraction to keep, in (0, 1].

    Returns:
        The least `rank >= 1` with `sum(eigenvalues[:rank]) >= energy * sum(eigenvalues)`; 1 when all are zero.
    """
    kept = eigenvalues.double().cumsum(0)
    if kept.numel() == 0 or kept[-1] <= 0:
        return 1
    # The last entries of the sum can fall short of its end by rounding alone.
    threshold = energy * kept[-1] * (1 - 1e-12)
    return min(int((kept < threshold).sum()) + 1, kept.numel())


def cosine_kept(kept: np.ndarray[Any, Any], is_feature: bool) -> np.ndarray[Any, Any]:
    """Gradient cosine that a mode leaves when its factor keeps a fraction of the energy: `exp(-w (1 - kept)^1.5)`.

    Args:
        kept: fractions of the energy.
        is_feature: whether the mode is the channels or features, not positions.
    """
    lost = np.clip(1 - kept, 0.0, 1.0)
    return np.asarray(np.exp(-(FEATURE_COST if is_feature else POSITION_COST) * lost**1.5))


def choose_ranks(name: str, spectra: Sequence[torch.Tensor | None], config: LanceConfig) -> list[int | None]:
    """Ranks for one layer by energy.

    Args:
        name: the layer's name, for `config.rank_pattern`.
        spectra: eigenvalues, descending, of every mode's Gram matrix; None for a mode that is kept.
        config: energy, patterns and limits.

    Returns:
        One rank a mode; None keeps the mode, also where the rank came out as the mode's size.

    Raises:
        ValueError: a `rank_pattern` that matches has another number of modes.
    """
    rule = _rule(name, len(spectra), config)
    ranks: list[int | None] = []
    for mode, eigenvalues in enumerate(spectra):
        if eigenvalues is None:
            ranks.append(None)
            continue
        if rule is None:
            rank: int | None = energy_rank(eigenvalues, config.energy)
        elif isinstance(rule, float):
            rank = energy_rank(eigenvalues, rule)
        elif isinstance(rule, int):
            rank = min(energy_rank(eigenvalues, config.energy), rule)
        else:
            rank = rule[mode]
        size = eigenvalues.numel()
        ranks.append(None if rank is None or _limited(rank, size, config) >= size else _limited(rank, size, config))
    return ranks


def _rule(name: str, modes: int, config: LanceConfig) -> RankRule | None:
    for pattern, rule in config.rank_pattern.items():
        if matches(name, [pattern]):
            if not isinstance(rule, float | int) and len(rule) != modes:
                raise ValueError(
                    f"rank_pattern gives {len(rule)} ranks for layer {name!r}; expected {modes}, one a mode of its "
                    "input"
                )
            return rule
    return None


def _limited(rank: int, size: int, config: LanceConfig) -> int:
    if size >= 64:
        rank = -(-rank // config.rank_multiple) * config.rank_multiple
    if config.max_rank is not None:
        rank = min(rank, config.max_rank)
    return min(rank, size)


@dataclass
class LayerPlan:
    """What a plan gives one layer.

    Attributes:
        name: the layer's name.
        size: its input's shape, with the batch that the bytes are for.
        ranks: one rank a mode; None keeps the mode.
        core_bits: 8, 4 or 2 bits a value of the core, None the dtype of the input.
        bytes: what the layer will hold, scales included; 0 where another layer of the same input holds it.
        dense_bytes: what a plain layer holds.
        flops: floating point operations of the projection.
        predicted_error: 1 minus the expected cosine between compressed and true weight gradient.
    """

    name: str
    size: tuple[int, ...]
    ranks: list[int | None]
    core_bits: int | None
    bytes: int
    dense_bytes: int
    flops: int
    predicted_error: float


@dataclass
class Plan:
    """Ranks and bits for every layer of a model, before anything is changed.

    Attributes:
        layers: by layer name.
        budget_bytes: what the bytes had to stay within.
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    budget_bytes: int = 0

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
            layers[name].set_factors(calibration.layers[name].factors(planned.ranks))
        share_factors(model, calibration.shared)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {**asdict(self), "bytes": self.bytes, "predicted_error": self.predicted_error}

    def __str__(self) -> str:
        lines = [f"{self.bytes} of {self.budget_bytes} bytes, predicted gradient error {self.predicted_error:.4f}"]
        for layer in self.layers.values():
            ranks = ", ".join("keep" if rank is None else str(rank) for rank in layer.ranks)
            lines.append(
                f"  {layer.name or '(root)'}: ranks ({ranks}) in {layer.core_bits or 'all'} bits, {layer.bytes} of "
                f"{layer.dense_bytes} bytes, error {layer.predicted_error:.4f}"
            )
        return "\n".join(lines)


def plan(
    model: nn.Module,
    calibration: Calibration,
    budget_bytes: int,
    *,
    batch_size: int | None = None,
    bits: Iterable[int | None] = (8, 4, 2),
    config: LanceConfig | None = None,
) -> Plan:
    """Chooses ranks and bits over all layers and modes together, so that what they hold stays within a budget.

    The sum over the layers of the predicted gradient errors is minimised: a layer whose modes keep the energy fractions
    `k_n` has the error `1 - prod(exp(-w_n (1 - k_n)^1.5)) (1 - q)`, with a larger `w_n` for the feature mode than for
    positions, and `q` for the bits. For a price of a byte every layer has its own best ranks; the price is found by
    bisection, and what is left of the budget goes to the ranks that gain most for their bytes.

    Args:
        model: a compressed model.
        calibration: what `calibrate` returned for it.
        budget_bytes: most bytes the layers' cores may take together, scales included.
        batch_size: samples the bytes are for; by default those of the first calibration batch.
        bits: bits a value to choose from; None is the dtype of the weights.
        config: limits and patterns on ranks; by default the layers' own.

    Returns:
        The plan; its `apply` puts it into effect.

    Raises:
        ValueError: the budget is below the least possible, which the message gives; or the model lacks a layer.
    """
    layers = dict(compressed_layers(model))
    missing = [name for name in calibration.layers if name not in layers]
    if missing:
        raise ValueError(f"plan: model has no compressed layers {missing}; calibrated another model?")
    # Layers that share an input hold one core between them, and each has an error of its own.
    sharers = Counter(calibration.shared.values())
    candidates = [
        _Candidate(
            name,
            layers[name],
            spectrum,
            batch_size,
            tuple(bits),
            config or layers[name].lance_config,
            1 + sharers[name],
        )
        for name, spectrum in calibration.layers.items()
        if name not in calibration.shared
    ]
    least = sum(candidate.least_bytes() for candidate in candidates)
    if budget_bytes < least:
        raise ValueError(
            f"plan: budget_bytes is {budget_bytes}; the least that ranks of 1 in the fewest bits take is {least}"
        )
    choices = _cheapest_within(candidates, budget_bytes)
    _spend_rest(candidates, choices, budget_bytes)
    result = Plan(budget_bytes=budget_bytes)
    described = {
        candidate.name: candidate.describe(ranks, width) for candidate, (ranks, width) in zip(candidates, choices)
    }
    for name in calibration.layers:
        owner = calibration.shared.get(name)
        result.layers[name] = (
            described[name] if owner is None else replace(described[owner], name=name, bytes=0, flops=0)
        )
    return result


Choice = tuple[tuple[int, ...], int | None]


class _Candidate:
    """One layer: what its ranks and bits would cost and lose."""

    def __init__(
        self,
        name: str,
        layer: CompressedLayer,
        spectrum: Spectrum,
        batch_size: int | None,
        bits: tuple[int | None, ...],
        config: LanceConfig,
        weight: int,
    ) -> None:
        self.name, self.bits, self.weight = name, bits, weight
        self.itemsize = layer.weight.element_size()
        self.size = list(spectrum.size)
        if batch_size is not None and len(self.size) > 1:
            self.size[0] = batch_size
        fixed = choose_ranks(name, spectrum.eigenvalues, config) if _rule(name, len(self.size), config) else None
        feature = 1 if hasattr(layer, "batched_dim") else len(self.size) - 1
        self.kept: list[np.ndarray[Any, Any]] = []
        self.allowed: list[np.ndarray[Any, Any]] = []
        for mode, eigenvalues in enumerate(spectrum.eigenvalues):
            size = self.size[mode]
            if eigenvalues is None:
                self.kept.append(np.ones(size + 1))
                self.allowed.append(np.array([size]))
                continue
            values = eigenvalues.double().cpu().numpy()
            total = values.sum()
            fractions = np.cumsum(values) / total if total > 0 else np.ones(len(values))
            self.kept.append(cosine_kept(np.concatenate([[0.0], fractions]), mode == feature))
            ranks = {_limited(rank, len(values), config) for rank in range(1, len(values) + 1)}
            if fixed is not None:
                ranks = {fixed[mode] or len(values)}
            self.allowed.append(np.array(sorted(ranks)))

    def core_bytes(self, ranks: Sequence[int], width: int | None) -> int:
        return math.prod(ranks) * self.itemsize if width is None else packed_bytes(ranks, width)

    def least_bytes(self) -> int:
        ranks = [int(allowed[0]) for allowed in self.allowed]
        return min(self.core_bytes(ranks, width) for width in self.bits)

    def error(self, ranks: Sequence[int], width: int | None) -> float:
        return 1 - math.prod(float(kept[rank]) for kept, rank in zip(self.kept, ranks)) * (1 - ROUNDING[width])

    def best_at(self, price: float) -> Choice:
        """Ranks and bits with the least error plus `price` times bytes, by descent over one mode at a time."""
        found: list[tuple[float, Choice]] = []
        for width in self.bits:
            for end in (0, -1):
                ranks = [int(allowed[end]) for allowed in self.allowed]
                for _ in range(20):
                    before = list(ranks)
                    for mode in range(len(ranks)):
                        ranks[mode] = self._best_rank(ranks, mode, width, price)
                    if ranks == before:
                        break
                choice = (tuple(ranks), width)
                found.append((self.weight * self.error(*choice) + price * self.core_bytes(*choice), choice))
        return min(found, key=lambda entry: entry[0])[1]

    def _best_rank(self, ranks: Sequence[int], mode: int, width: int | None, price: float) -> int:
        allowed, most = self.allowed[mode], list(ranks)
        most[mode] = int(allowed[-1])
        # Bytes are all but linear in one rank.
        each = self.core_bytes(most, width) / most[mode]
        others = self.weight * math.prod(
            float(self.kept[other][rank]) for other, rank in enumerate(ranks) if other != mode
        )
        gain = others * (1 - ROUNDING[width]) * self.kept[mode][allowed] - price * each * allowed
        return int(allowed[int(gain.argmax())])

    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The choices one step up: the next rank of one mode, or more bits."""
        ranks, width = choice
        for mode, allowed in enumerate(self.allowed):
            following = allowed[allowed > ranks[mode]]
            if len(following):
                yield (*ranks[:mode], int(following[0]), *ranks[mode + 1 :]), width
        for other in self.bits:
            if ROUNDING[other] < ROUNDING[width]:
                yield ranks, other

    def describe(self, ranks: Sequence[int], width: int | None) -> LayerPlan:
        chosen = [None if rank == size else rank for rank, size in zip(ranks, self.size)]
        return LayerPlan(
            self.name,
            tuple(self.size),
            chosen,
            width,
            self.core_bytes(ranks, width),
            math.prod(self.size) * self.itemsize,
            mode_product_flops(self.size, chosen),
            self.error(ranks, width),
        )


def _total(candidates: Sequence[_Candidate], choices: Sequence[Choice]) -> int:
    return sum(candidate.core_bytes(*choice) for candidate, choice in zip(candidates, choices))


def _cheapest_within(candidates: Sequence[_Candidate], budget: int) -> list[Choice]:
    """The choices at the lowest price of a byte at which they fit into the budget."""
    low, high = -60.0, 10.0
    best: list[Choice] = [((*(int(a[0]) for a in c.allowed),), _narrowest(c)) for c in candidates]
    for _ in range(50):
        price = (low + high) / 2
        choices = [candidate.best_at(math.exp(price)) for candidate in candidates]
        if _total(candidates, choices) <= budget:
            best, high = choices, price
        else:
            low = price
    return best


def _narrowest(candidate: _Candidate) -> int | None:
    ranks = [int(allowed[0]) for allowed in candidate.allowed]
    return min(candidate.bits, key=lambda width: candidate.core_bytes(ranks, width))


def _spend_rest(candidates: Sequence[_Candidate], choices: list[Choice], budget: int) -> None:
    """Takes the steps that gain most for their bytes until none fits."""
    left = budget - _total(candidates, choices)
    while True:
        steps: list[tuple[float, int, Choice, int]] = []
        for index, candidate in enumerate(candidates):
            here, cost = candidate.error(*choices[index]), candidate.core_bytes(*choices[index])
            for choice in candidate.larger(choices[index]):
                extra, gain = candidate.core_bytes(*choice) - cost, candidate.weight * (here - candidate.error(*choice))
                if extra <= left and gain > 0:
                    steps.append((gain / max(extra, 1e-9), index, choice, extra))
        if not steps:
            return
        _, index, choice, extra = max(steps, key=lambda step: step[0])
        choices[index] = choice
        left -= extra
