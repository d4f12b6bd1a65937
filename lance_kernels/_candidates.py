"""What `plan` chooses between for one layer, and the search over all layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lance_kernels._ranks import (
    ROUNDING,
    ROUNDING_SELECTED,
    choose_ranks,
    cosine_kept,
    cosine_selected,
    limited,
    rule_for,
)
from lance_kernels.config import LanceConfig
from lance_kernels.ops.pack_core import core_bytes
from lance_kernels.ops.tucker import mode_product_flops

if TYPE_CHECKING:
    from lance_kernels.calibrate import Spectrum

# Share by which the energy that a selection loses may grow for fewer operations.
NARROWING = 0.02
# Counts of values that a selection is tried with, evenly spaced in their logarithm.
GRID = 400


@dataclass
class LayerPlan:
    """What a plan gives one layer.

    Attributes:
        name: the layer's name.
        size: its input's shape, with the batch that the bytes are for.
        ranks: one rank a mode; None keeps the mode.
        count: values of a sample's core that are kept, those of the largest expected energy; None for all.
        core_bits: 8, 4 or 2 bits a value of the core, None the dtype of the input.
        bytes: what the layer will hold, scales included; 0 where another layer of the same input holds it.
        dense_bytes: what a plain layer holds.
        flops: floating point operations of the projection.
        predicted_error: 1 minus the expected cosine between compressed and true weight gradient.
    """

    name: str
    size: tuple[int, ...]
    ranks: list[int | None]
    count: int | None
    core_bits: int | None
    bytes: int
    dense_bytes: int
    flops: int
    predicted_error: float


# Ranks or a count of values, and bits.
Choice = tuple[Any, int | None]


class Candidate(ABC):
    """One layer: what its choices would cost and lose.

    Attributes:
        name: the layer's.
        size: its input's shape, with the batch that the bytes are for.
        itemsize: bytes of a value of its dtype.
        bits: bits a value to choose from.
        weight: how many layers share the core, and its error.
        config: limits on ranks, and what rounding counts.
        rounding: gradient cosine lost to rounding, by bits.
    """

    rounding: Mapping[int | None, float] = ROUNDING

    def __init__(
        self,
        name: str,
        size: Sequence[int],
        itemsize: int,
        bits: Sequence[int | None],
        weight: int,
        config: LanceConfig,
    ) -> None:
        self.name, self.size, self.itemsize, self.bits, self.weight = name, list(size), itemsize, tuple(bits), weight
        self.config = config
        share = config.rounding_weight
        self.counted_rounding = {width: share * self.rounding[width] for width in self.bits}

    @abstractmethod
    def core_bytes(self, choice: Choice) -> int:
        """Bytes that a choice takes."""

    @abstractmethod
    def cosine_kept(self, choice: Choice) -> float:
        """Predicted gradient cosine of a choice before rounding."""

    def error(self, choice: Choice) -> float:
        """Predicted gradient error of a choice: what lost energy and rounding lose together."""
        return 1 - self.cosine_kept(choice) * (1 - self.rounding[choice[1]])

    def loss(self, choice: Choice) -> float:
        """What the plan makes small: the error, in which rounding counts by `config.rounding_weight`."""
        return 1 - self.cosine_kept(choice) * (1 - self.counted_rounding[choice[1]])

    @abstractmethod
    def least(self) -> Choice:
        """The choice that takes the fewest bytes."""

    @abstractmethod
    def best_at(self, price: float) -> Choice:
        """The choice with the least loss plus `price` times bytes."""

    @abstractmethod
    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The choices one step up."""

    @abstractmethod
    def describe(self, choice: Choice) -> LayerPlan:
        """A choice as the plan says it."""

    def _plan(self, ranks: list[int | None], count: int | None, choice: Choice) -> LayerPlan:
        return LayerPlan(
            self.name,
            tuple(self.size),
            ranks,
            count,
            choice[1],
            self.core_bytes(choice),
            math.prod(self.size) * self.itemsize,
            mode_product_flops(self.size, ranks),
            self.error(choice),
        )


class RankCandidate(Candidate):
    """A rank for every mode: the core is a box."""

    def __init__(self, *common: Any, spectrum: Spectrum, feature: int) -> None:
        super().__init__(*common)
        config = self.config
        fixed = None
        if rule_for(self.name, len(self.size), config) is not None:
            fixed = choose_ranks(self.name, spectrum.eigenvalues, config)
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
            ranks = {limited(rank, len(values), config) for rank in range(1, len(values) + 1)}
            if fixed is not None:
                ranks = {fixed[mode] or len(values)}
            self.allowed.append(np.array(sorted(ranks)))

    def core_bytes(self, choice: Choice) -> int:
        """Bytes of a core of these ranks."""
        return core_bytes(*choice, self.itemsize)

    def cosine_kept(self, choice: Choice) -> float:
        """What the modes leave together."""
        return math.prod(float(kept[rank]) for kept, rank in zip(self.kept, choice[0]))

    def least(self) -> Choice:
        """The least ranks in the fewest bits."""
        ranks = tuple(int(allowed[0]) for allowed in self.allowed)
        return min(((ranks, width) for width in self.bits), key=self.core_bytes)

    def best_at(self, price: float) -> Choice:
        """By descent over one mode at a time, from the least ranks and from the largest."""
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
                found.append((self.weight * self.loss(choice) + price * self.core_bytes(choice), choice))
        return min(found, key=lambda entry: entry[0])[1]

    def _best_rank(self, ranks: Sequence[int], mode: int, width: int | None, price: float) -> int:
        allowed, most = self.allowed[mode], list(ranks)
        most[mode] = int(allowed[-1])
        # Bytes are all but linear in one rank.
        each = core_bytes(most, width, self.itemsize) / most[mode]
        others = self.weight * math.prod(
            float(self.kept[other][rank]) for other, rank in enumerate(ranks) if other != mode
        )
        gain = others * (1 - self.counted_rounding[width]) * self.kept[mode][allowed] - price * each * allowed
        return int(allowed[int(gain.argmax())])

    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The next rank of one mode, or more bits."""
        ranks, width = choice
        for mode, allowed in enumerate(self.allowed):
            following = allowed[allowed > ranks[mode]]
            if len(following):
                yield (*ranks[:mode], int(following[0]), *ranks[mode + 1 :]), width
        for other in self.bits:
            if self.rounding[other] < self.rounding[width]:
                yield ranks, other

    def describe(self, choice: Choice) -> LayerPlan:
        """Ranks, None where a mode is kept."""
        ranks: list[int | None] = [None if rank == size else rank for rank, size in zip(choice[0], self.size)]
        return self._plan(ranks, None, choice)


class SelectionCandidate(Candidate):
    """The values of the core that are expected to be largest, whatever their modes."""

    rounding = ROUNDING_SELECTED

    def __init__(self, *common: Any, spectrum: Spectrum) -> None:
        super().__init__(*common)
        self.spectrum = spectrum
        energies = expected_energies(spectrum, self._most_ranks())
        fractions = energies.flatten().sort(descending=True).values.cumsum(0)
        counts = np.unique(np.geomspace(1, len(fractions), GRID).round().astype(np.int64))
        self.counts = counts
        # Beyond the largest ranks allowed energy is lost whatever the count.
        self.kept = cosine_selected(1 - np.clip(fractions[torch.from_numpy(counts - 1)].numpy(), 0.0, 1.0))

    def _most_ranks(self) -> list[int | None]:
        most = self.config.max_rank
        return [None, *(size if most is None else min(size, most) for size in self.size[1:])]

    def core_bytes(self, choice: Choice) -> int:
        """Bytes of that many values a sample."""
        return core_bytes((self.size[0], choice[0]), choice[1], self.itemsize)

    def cosine_kept(self, choice: Choice) -> float:
        """What the lost energy leaves."""
        return float(self.kept[int(np.searchsorted(self.counts, choice[0]))])

    def least(self) -> Choice:
        """One value in the fewest bits."""
        return min(((1, width) for width in self.bits), key=self.core_bytes)

    def best_at(self, price: float) -> Choice:
        """By trying every count of the grid."""
        found: list[tuple[float, Choice]] = []
        for width in self.bits:
            # Bytes are all but linear in the count.
            each = core_bytes((self.size[0], int(self.counts[-1])), width, self.itemsize) / self.counts[-1]
            cost = self.weight * (1 - self.kept * (1 - self.counted_rounding[width])) + price * each * self.counts
            at = int(cost.argmin())
            found.append((float(cost[at]), (int(self.counts[at]), width)))
        return min(found, key=lambda entry: entry[0])[1]

    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The next count, or more bits."""
        count, width = choice
        at = int(np.searchsorted(self.counts, count)) + 1
        if at < len(self.counts):
            yield int(self.counts[at]), width
        for other in self.bits:
            if self.rounding[other] < self.rounding[width]:
                yield count, other

    def describe(self, choice: Choice) -> LayerPlan:
        """The count, and ranks of few operations that hold it."""
        ranks = self._narrowed(choice[0])
        return self._plan(
            [None, *(limited(rank, size, self.config) for rank, size in zip(ranks, self.size[1:]))], choice[0], choice
        )

    def _narrowed(self, count: int) -> list[int]:
        """Ranks of `count` values of large expected energy: of the largest ones, narrowed while little is lost.

        The outermost rows of a staircase hold few values, and cost as many operations as others.
        """
        ranks = _box(selection(self.spectrum, self._most_ranks(), count))
        energies = expected_energies(self.spectrum, [None, *ranks])
        lost = 1 - float(energies.flatten().topk(count).values.sum())
        most = (1 + NARROWING) * lost
        while True:
            tries: list[tuple[int, list[int]]] = []
            for mode, rank in enumerate(ranks):
                narrower = [*ranks[:mode], rank - max(1, rank // 16), *ranks[mode + 1 :]]
                if narrower[mode] < 1 or math.prod(narrower) < count:
                    continue
                within = energies[tuple(slice(0, r) for r in narrower)]
                if 1 - float(within.flatten().topk(count).values.sum()) <= most:
                    tries.append((mode_product_flops(self.size, [None, *narrower]), narrower))
            if not tries:
                return ranks
            ranks = min(tries)[1]


def _box(lengths: torch.Tensor) -> list[int]:
    """The least ranks that hold a staircase."""
    used = lengths.nonzero()
    return [*(used.max(0).values + 1).tolist(), int(lengths.max())] if lengths.dim() else [int(lengths)]


def selectable(spectrum: Spectrum) -> bool:
    """Whether single values can be chosen: the first mode alone is kept, and there are two others or more."""
    first, *others = spectrum.eigenvalues
    return first is None and len(others) > 1 and all(v is not None and bool(v.sum() > 0) for v in others)


def expected_energies(spectrum: Spectrum, ranks: Sequence[int | None]) -> torch.Tensor:
    """Expected share of the energy of every value of a sample's core: the product of its modes' eigenvalue shares.

    Args:
        spectrum: a `selectable` one.
        ranks: one a mode, None first.

    Returns:
        `(rank_1, ..., rank_{N-1})`, float64, on the CPU; sums to 1 at full ranks.
    """
    energies = torch.ones((), dtype=torch.float64)
    for values, rank in zip(spectrum.eigenvalues[1:], ranks[1:]):
        assert values is not None
        shares = values.double().cpu().clamp_min(0)
        energies = energies[..., None] * (shares / shares.sum())[:rank]
    return energies


def selection(spectrum: Spectrum, ranks: Sequence[int | None], count: int) -> torch.Tensor:
    """Which values of a core of these ranks are the `count` of the largest expected energy.

    Eigenvalues fall along every mode, so the values form a staircase, described by its rows' lengths.

    Args:
        spectrum: a `selectable` one.
        ranks: one a mode, None first.
        count: number of values a sample.

    Returns:
        How many leading values of the last mode are kept, `(rank_1, ..., rank_{N-2})`, int32.
    """
    energies = expected_energies(spectrum, ranks)
    last = energies.shape[-1]
    places = energies.flatten().topk(count).indices
    lengths = torch.bincount(places // last, minlength=energies.numel() // last)
    return lengths.view(energies.shape[:-1]).to(torch.int32)


def total_bytes(candidates: Sequence[Candidate], choices: Sequence[Choice]) -> int:
    return sum(candidate.core_bytes(choice) for candidate, choice in zip(candidates, choices))


def cheapest_within(candidates: Sequence[Candidate], budget: int) -> list[Choice]:
    """The choices at the lowest price of a byte at which they fit into the budget."""
    low, high = -60.0, 10.0
    best = [candidate.least() for candidate in candidates]
    for _ in range(50):
        price = (low + high) / 2
        choices = [candidate.best_at(math.exp(price)) for candidate in candidates]
        if total_bytes(candidates, choices) <= budget:
            best, high = choices, price
        else:
            low = price
    return best


def spend_rest(candidates: Sequence[Candidate], choices: list[Choice], budget: int) -> None:
    """Takes the steps that gain most for their bytes until none fits."""
    left = budget - total_bytes(candidates, choices)
    while True:
        steps: list[tuple[float, int, Choice, int]] = []
        for index, candidate in enumerate(candidates):
            here, cost = candidate.loss(choices[index]), candidate.core_bytes(choices[index])
            for choice in candidate.larger(choices[index]):
                extra, gain = candidate.core_bytes(choice) - cost, candidate.weight * (here - candidate.loss(choice))
                if extra <= left and gain > 0:
                    steps.append((gain / max(extra, 1e-9), index, choice, extra))
        if not steps:
            return
        _, index, choice, extra = max(steps, key=lambda step: step[0])
        choices[index] = choice
        left -= extra
