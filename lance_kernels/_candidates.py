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
from lance_kernels._work import Work
from lance_kernels.config import LanceConfig
from lance_kernels.ops.pack_core import core_bytes

if TYPE_CHECKING:
    from lance_kernels.calibrate import Spectrum

# Share by which the energy that a selection loses may grow for fewer operations.
NARROWING = 0.02
# Counts of values that a selection is tried with, evenly spaced in their logarithm.
GRID = 400
# Boxes that a selection is tried within: each has at most this share of the operations of the one before.
FEWER = 0.9


@dataclass
class LayerPlan:
    """What a plan gives one layer.

    Attributes:
        name: the layer's name.
        size: its input's shape, with the batch that the bytes are for.
        ranks: one rank a mode; None keeps the mode.
        count: values of a sample's core that are kept, those of the largest expected energy; None for all.
        core_bits: 8, 4, 2 or 1 bits a value of the core, None the dtype of the input.
        bytes: what all calls of the layer will hold, scales included; 0 where another layer of the same input holds it.
        dense_bytes: what a plain layer holds.
        flops: floating point operations of the projection and of the weight gradient from the core.
        dense_flops: those of a plain layer's weight gradient.
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
    dense_flops: int
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
        work: operations of the layers that share the core, and its error.
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
        work: Work,
        config: LanceConfig,
    ) -> None:
        self.name, self.size, self.itemsize, self.bits = name, list(size), itemsize, tuple(bits)
        self.work, self.weight, self.config = work, len(work.layers), config
        share = config.rounding_weight
        self.counted_rounding = {width: share * self.rounding[width] for width in self.bits}

    @abstractmethod
    def core_bytes(self, choice: Choice) -> int:
        """Bytes that a choice takes."""

    def _bytes(self, core: Sequence[int], width: int | None) -> int:
        """Bytes of the cores of all calls."""
        return self.work.calls * core_bytes(core, width, self.itemsize)

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
    def operations(self, choice: Choice) -> int:
        """Operations that a choice takes: of the projection, and of the weight gradients from the core."""

    @abstractmethod
    def best_at(self, price: float, work_price: float) -> Choice:
        """The choice with the least loss plus `price` times bytes and `work_price` times operations."""

    @abstractmethod
    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The choices one step up."""

    @abstractmethod
    def describe(self, choice: Choice) -> LayerPlan:
        """A choice as the plan says it."""

    def _plan(self, ranks: list[int | None], count: int | None, choice: Choice, flops: int) -> LayerPlan:
        return LayerPlan(
            self.name,
            tuple(self.size),
            ranks,
            count,
            choice[1],
            self.core_bytes(choice),
            self.work.calls * math.prod(self.size) * self.itemsize,
            flops,
            self.work.dense,
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
        pairs = zip(self.size, spectrum.eigenvalues)
        # Sizes that the ranks are of: the calibration's, whatever batch the bytes are for.
        self.full = [extent if values is None else len(values) for extent, values in pairs]
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
        return self._bytes(self._core(choice[0]), choice[1])

    def cosine_kept(self, choice: Choice) -> float:
        """What the modes leave together."""
        return math.prod(float(kept[rank]) for kept, rank in zip(self.kept, choice[0]))

    def least(self) -> Choice:
        """The least ranks in the fewest bits."""
        ranks = tuple(int(allowed[0]) for allowed in self.allowed)
        return min(((ranks, width) for width in self.bits), key=self.core_bytes)

    def operations(self, choice: Choice) -> int:
        """Operations for a core of these ranks."""
        pairs = zip(self._modes(choice), self._core(choice[0]))
        return self.work.from_core([None if rank is None else extent for rank, extent in pairs])

    def _modes(self, choice: Choice) -> list[int | None]:
        return [None if rank == full else rank for rank, full in zip(choice[0], self.full)]

    def _core(self, ranks: Sequence[int]) -> list[int]:
        """The core's shape: a batch mode with a factor has a copy of it for every batch of the calibration's size."""
        copies = -(-self.size[0] // max(self.full[0], 1))
        return [self.size[0] if ranks[0] == self.full[0] else copies * ranks[0], *ranks[1:]]

    def best_at(self, price: float, work_price: float) -> Choice:
        """By descent over one mode at a time, from the least ranks and from the largest."""
        found: list[tuple[float, Choice]] = []
        for width in self.bits:
            for end in (0, -1):
                ranks = [int(allowed[end]) for allowed in self.allowed]
                for _ in range(20):
                    before = list(ranks)
                    for mode in range(len(ranks)):
                        ranks[mode] = self._best_rank(ranks, mode, width, price, work_price)
                    if ranks == before:
                        break
                choice = (tuple(ranks), width)
                cost = price * self.core_bytes(choice)
                if work_price:
                    cost += work_price * self.operations(choice)
                found.append((self.weight * self.loss(choice) + cost, choice))
        return min(found, key=lambda entry: entry[0])[1]

    def _best_rank(self, ranks: Sequence[int], mode: int, width: int | None, price: float, work_price: float) -> int:
        allowed, most = self.allowed[mode], list(ranks)
        if len(allowed) == 1:
            return int(allowed[0])
        most[mode] = int(allowed[-1])
        # Bytes and operations are all but linear in one rank.
        each = price * self._bytes(self._core(most), width) / most[mode]
        if work_price:
            least = [*ranks[:mode], int(allowed[0]), *ranks[mode + 1 :]]
            more = self.operations((most, width)) - self.operations((least, width))
            each += work_price * more / (most[mode] - least[mode])
        others = self.weight * math.prod(
            float(self.kept[other][rank]) for other, rank in enumerate(ranks) if other != mode
        )
        gain = others * (1 - self.counted_rounding[width]) * self.kept[mode][allowed] - each * allowed
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
        return self._plan(self._modes(choice), None, choice, self.operations(choice))


class SelectionCandidate(Candidate):
    """The values of the core that are expected to be largest, whatever their modes, within a box of ranks.

    The first half of a choice is the number of values and the box's place in `boxes`.

    Attributes:
        boxes: ranks to choose from, of falling operations; the first are the largest allowed.
        counts: numbers of values to choose from.
        kept: gradient cosine by box and count, minus infinity where the box has fewer values.
    """

    rounding = ROUNDING_SELECTED

    def __init__(self, *common: Any, spectrum: Spectrum) -> None:
        super().__init__(*common)
        self.spectrum = spectrum
        most = [size if self.config.max_rank is None else min(size, self.config.max_rank) for size in self.size[1:]]
        energies = expected_energies(spectrum, [None, *most])
        self.boxes = [most] if self.config.max_work is None else self._fewer_operations(most)
        order = energies.flatten().argsort(descending=True)
        fractions, places = energies.flatten()[order], np.unravel_index(order.numpy(), energies.shape)
        self.counts = np.unique(np.geomspace(1, len(order), GRID).round().astype(np.int64))
        self.kept = np.stack([self._kept(box, fractions.numpy(), places) for box in self.boxes])
        self.work_of = np.array([self.work.from_core(self._ranks(box)) for box in self.boxes], dtype=np.float64)
        widths = [self._bytes((self.size[0], int(self.counts[-1])), width) for width in self.bits]
        # Bytes are all but linear in the count: (width, count)
        self.bytes_of = np.outer(widths, self.counts / self.counts[-1])
        self._gains: tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None

    def _ranks(self, box: Sequence[int]) -> list[int | None]:
        return [None, *(limited(rank, size, self.config) for rank, size in zip(box, self.size[1:]))]

    def _fewer_operations(self, most: list[int]) -> list[list[int]]:
        """Boxes of ever fewer operations, each giving up the least energy for those that it saves."""
        shares = [self.spectrum.shares(mode).numpy().cumsum() for mode in range(1, len(self.size))]
        box, found = most, [most]
        work = recorded = self.work.from_core(self._ranks(most))
        while True:
            tries: list[tuple[float, int, list[int]]] = []
            for mode, rank in enumerate(box):
                if rank > 1:
                    narrower = [*box[:mode], rank - max(1, rank // 16), *box[mode + 1 :]]
                    left = self.work.from_core(self._ranks(narrower))
                    lost = 1 - shares[mode][narrower[mode] - 1] / shares[mode][rank - 1]
                    # Where no mode alone saves operations, the one that loses least.
                    tries.append((lost / (work - left) if left < work else 1e9 + lost, left, narrower))
            if not tries:
                return found
            _, work, box = min(tries)
            if work <= FEWER * recorded:
                found.append(box)
                recorded = work

    def _kept(
        self, box: Sequence[int], fractions: np.ndarray[Any, Any], places: Sequence[np.ndarray[Any, Any]]
    ) -> np.ndarray[Any, Any]:
        inside = np.logical_and.reduce([place < rank for place, rank in zip(places, box)])
        kept = fractions[inside].cumsum()
        cosine = cosine_selected(1 - np.clip(kept[np.minimum(self.counts, len(kept)) - 1], 0.0, 1.0))
        return np.where(self.counts <= len(kept), cosine, -np.inf)

    def _at(self, choice: Choice) -> tuple[int, int]:
        count, box = choice[0]
        return box, int(np.searchsorted(self.counts, count))

    def core_bytes(self, choice: Choice) -> int:
        """Bytes of that many values a sample."""
        return self._bytes((self.size[0], choice[0][0]), choice[1])

    def operations(self, choice: Choice) -> int:
        """Operations for the whole box."""
        return int(self.work_of[choice[0][1]])

    def cosine_kept(self, choice: Choice) -> float:
        """What the lost energy leaves."""
        return float(self.kept[self._at(choice)])

    def least(self) -> Choice:
        """One value in the fewest bits."""
        return min((((1, len(self.boxes) - 1), width) for width in self.bits), key=self.core_bytes)

    def best_at(self, price: float, work_price: float) -> Choice:
        """By trying every box and every count of the grid."""
        if self._gains is None or self._gains[0] != work_price:
            bought = self.weight * np.array([1 - self.counted_rounding[width] for width in self.bits])
            # (width, box, count)
            gains = bought[:, None, None] * self.kept - work_price * self.work_of[:, None]
            self._gains = work_price, gains.argmax(1), gains.max(1)
        _, boxes, gains = self._gains
        at = np.unravel_index(int((gains - price * self.bytes_of).argmax()), gains.shape)
        return (int(self.counts[at[1]]), int(boxes[at])), self.bits[at[0]]

    def larger(self, choice: Choice) -> Iterable[Choice]:
        """The next count of the box, or more bits."""
        (count, box), width = choice
        at = int(np.searchsorted(self.counts, count)) + 1
        if at < len(self.counts) and self.kept[box, at] > 0:
            yield (int(self.counts[at]), box), width
        for other in self.bits:
            if self.rounding[other] < self.rounding[width]:
                yield (count, box), other

    def describe(self, choice: Choice) -> LayerPlan:
        """The count, and ranks of few operations that hold it."""
        count, box = choice[0]
        ranks = self._ranks(self._narrowed(count, self.boxes[box]))
        return self._plan(ranks, count, choice, self.work.from_core(ranks))

    def _narrowed(self, count: int, box: Sequence[int]) -> list[int]:
        """Ranks of `count` values of large expected energy: of the largest ones, narrowed while little is lost.

        The outermost rows of a staircase hold few values, and cost as many operations as others.
        """
        ranks = _box(selection(self.spectrum, [None, *box], count))
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
                    tries.append((self.work.from_core(self._ranks(narrower)), narrower))
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
    for mode, rank in enumerate(ranks[1:], 1):
        energies = energies[..., None] * spectrum.shares(mode)[:rank]
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


def total_operations(candidates: Sequence[Candidate], choices: Sequence[Choice]) -> int:
    return sum(candidate.operations(choice) for candidate, choice in zip(candidates, choices))


def cheapest_within(candidates: Sequence[Candidate], budget: int, max_work: float | None = None) -> list[Choice]:
    """The choices at the lowest prices of a byte and an operation at which they fit.

    Args:
        candidates: the layers.
        budget: most bytes.
        max_work: most operations over those of the dense weight gradients; where no choice has as few, the fewest.
    """
    best = _within_bytes(candidates, budget, 0.0)
    dense = max(sum(candidate.work.dense for candidate in candidates), 1)
    if max_work is None or total_operations(candidates, best) <= max_work * dense:
        return best
    low, high = -12.0, 8.0
    best = _within_bytes(candidates, budget, math.exp(high) / dense)
    for _ in range(24):
        price = (low + high) / 2
        choices = _within_bytes(candidates, budget, math.exp(price) / dense)
        if total_operations(candidates, choices) <= max_work * dense:
            best, high = choices, price
        else:
            low = price
    return best


def _within_bytes(candidates: Sequence[Candidate], budget: int, work_price: float) -> list[Choice]:
    low, high = -60.0, 10.0
    best = [candidate.least() for candidate in candidates]
    for _ in range(50):
        price = (low + high) / 2
        choices = [candidate.best_at(math.exp(price), work_price) for candidate in candidates]
        if total_bytes(candidates, choices) <= budget:
            best, high = choices, price
        else:
            low = price
    return best


def spend_rest(
    candidates: Sequence[Candidate], choices: list[Choice], budget: int, max_work: float | None = None
) -> None:
    """Takes the steps that gain most for their bytes until none fits."""
    left = budget - total_bytes(candidates, choices)
    spare = math.inf
    if max_work is not None:
        spare = max_work * sum(c.work.dense for c in candidates) - total_operations(candidates, choices)
    while True:
        steps: list[tuple[float, int, Choice, int, float]] = []
        for index, candidate in enumerate(candidates):
            here, cost = candidate.loss(choices[index]), candidate.core_bytes(choices[index])
            work: float = 0 if max_work is None else candidate.operations(choices[index])
            for choice in candidate.larger(choices[index]):
                extra, gain = candidate.core_bytes(choice) - cost, candidate.weight * (here - candidate.loss(choice))
                more: float = 0 if max_work is None else candidate.operations(choice) - work
                if extra <= left and gain > 0 and (more <= 0 or more <= spare):
                    steps.append((gain / max(extra, 1e-9), index, choice, extra, more))
        if not steps:
            return
        _, index, choice, extra, more = max(steps, key=lambda step: step[0])
        choices[index] = choice
        left -= extra
        spare -= more
