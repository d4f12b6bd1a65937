"""Confidence intervals of paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """Mean of paired differences and its confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.high == float("inf"):
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def paired_interval(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of `first - second` over pairs, and its two-sided confidence interval by Student's t.

    Args:
        first: one value a pair.
        second: the other value of each pair.
        confidence: of the interval.

    Returns:
        Mean, lower and upper bound; the bounds are infinite for a single pair.

    Raises:
        ValueError: there are no pairs, or the lengths differ.
    """
    from scipy.stats import t

    if not first or len(first) != len(second):
        raise ValueError(f"expected as many first values as second ones, at least one; got {len(first)}, {len(second)}")
    differences = np.subtract(first, second)
    mean, count = float(differences.mean()), len(differences)
    if count == 1:
        return Interval(mean, -np.inf, np.inf)
    half = float(t.ppf((1 + confidence) / 2, count - 1) * differences.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - half, mean + half)
