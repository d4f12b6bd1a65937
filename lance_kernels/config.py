"""What to compress and how far: `LanceConfig`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal, TypeGuard

from lance_kernels.ops.pack_core import BITS

RankRule = float | int | Sequence[int | None]


@dataclass(frozen=True)
class LanceConfig:
    """How `compress_` and `calibrate` treat a model.

    A module pattern is a module's full name, its last parts (`"conv1"` matches `"layer1.0.conv1"`), or a regular
    expression that matches the full name.

    Attributes:
        energy: fraction of a mode's energy (sum of squares) that its factor keeps, in (0, 1].
        core_bits: 8, 4, 2 or 1 bits a value of the core; None keeps the dtype of the input. With 1 bit only signs and
            mean magnitudes are left: the weight gradient is no longer nearly the true one (cosine about 0.6).
        batch_mode: "keep" stores every sample's core; "fixed" compresses the batch mode too, as published.
        companions: which neighbours of the compressed layers are swapped for forms that hold less: "none", "exact"
            (those whose gradient is exact), "quantized" (all, in 8 bits) or "smallest" (all, derivatives of
            activations in 4 bits).
        target_modules: patterns of the modules to compress; None for all.
        exclude_modules: patterns of the modules to leave alone, companions included.
        rank_pattern: by module pattern, an energy (float), a largest rank (int) or one rank or None a mode; the first
            pattern that matches counts.
        max_rank: largest rank of any mode, or None.
        rank_multiple: ranks of modes of size 64 or more are rounded up to a multiple of this.
        budget_bytes: most bytes the cores of a batch of the calibration's size may take together; ranks and bits are
            then chosen by `plan`, `energy` is not used, and `core_bits` only where it is None (no rounding) or 1.
        rounding_weight: what `plan` counts an error of rounding beside one of lost directions, in (0, 1]. Rounding errs
            differently in every step and averages out, a direction that no factor has is lost in all of them: 0.2 gives
            the best accuracy found, 1 the highest gradient cosine of a single step.
        max_work: with `budget_bytes`, most operations that projections and weight gradients may take together, over
            those of the dense weight gradients, above 0; None for as many as the bytes ask for. A plan whose every rank
            is one may still take more.

    Raises:
        ValueError: a value is out of its range.
    """

    energy: float = 0.85
    core_bits: Literal[8, 4, 2, 1] | None = 4
    batch_mode: Literal["keep", "fixed"] = "keep"
    companions: Literal["none", "exact", "quantized", "smallest"] = "exact"
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    rank_pattern: Mapping[str, RankRule] = field(default_factory=dict)
    max_rank: int | None = None
    rank_multiple: int = 1
    budget_bytes: int | None = None
    rounding_weight: float = 0.2
    max_work: float | None = None

    def __post_init__(self) -> None:
        _require(is_fraction(self.energy), "energy", self.energy, "a number in (0, 1]")
        bits = self.core_bits is None or (is_count(self.core_bits) and self.core_bits in BITS)
        _require(bits, "core_bits", self.core_bits, "8, 4, 2, 1 or None")
        _require(self.batch_mode in ("keep", "fixed"), "batch_mode", self.batch_mode, '"keep" or "fixed"')
        _require(
            self.companions in ("none", "exact", "quantized", "smallest"),
            "companions",
            self.companions,
            '"none", "exact", "quantized" or "smallest"',
        )
        _require(self.max_rank is None or is_count(self.max_rank), "max_rank", self.max_rank, "at least 1, or None")
        _require(is_count(self.rank_multiple), "rank_multiple", self.rank_multiple, "at least 1")
        budget = self.budget_bytes is None or is_count(self.budget_bytes)
        _require(budget, "budget_bytes", self.budget_bytes, "at least 1, or None")
        _require(is_fraction(self.rounding_weight), "rounding_weight", self.rounding_weight, "a number in (0, 1]")
        work = self.max_work is None or (_is_number(self.max_work) and self.max_work > 0)
        _require(work, "max_work", self.max_work, "a number above 0, or None")
        targets = () if self.target_modules is None else self.target_modules
        for name, patterns in (("target_modules", targets), ("exclude_modules", self.exclude_modules)):
            many = isinstance(patterns, Collection) and not isinstance(patterns, str)
            _require(many, name, patterns, "a sequence of patterns, not one string")
            for pattern in patterns:
                _require(is_pattern(pattern), name, pattern, "module names or regular expressions")
        rules = self.rank_pattern
        _require(isinstance(rules, Mapping), "rank_pattern", rules, "a dictionary of rules by pattern")
        for pattern, rule in rules.items():
            _require(is_pattern(pattern), "rank_pattern", pattern, "module names or regular expressions as keys")
            _require(_is_rank_rule(rule), f"rank_pattern[{pattern!r}]", rule, "an energy, a rank, or one rank a mode")

    @classmethod
    def published(cls, energy: float = 0.7) -> LanceConfig:
        """The form of arXiv 2509.21617: batch mode compressed, cores in full precision, no companions."""
        return cls(energy=energy, core_bits=None, batch_mode="fixed", companions="none")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a module's full name matches any of the patterns, as `LanceConfig` defines them."""
    return any(
        name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None
        for pattern in patterns
    )


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"LanceConfig: {name} is {value!r}; expected {expected}")


def is_pattern(pattern: object) -> bool:
    """Whether a value is a module name or a regular expression."""
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError):
        return False
    return True


def is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1, of an integer type."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_fraction(value: object) -> bool:
    """Whether a value is a number in (0, 1]."""
    return _is_number(value) and 0 < value <= 1


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_rank_rule(rule: object) -> bool:
    if isinstance(rule, Sequence):
        return all(rank is None or is_count(rank) for rank in rule)
    return is_count(rule) if isinstance(rule, int) else isinstance(rule, float) and is_fraction(rule)
