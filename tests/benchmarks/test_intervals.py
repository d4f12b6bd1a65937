"""Confidence intervals of paired differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import paired_interval


def test_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, and t of 97.5 % with two degrees of freedom 4.302653.
    mean, low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert mean == pytest.approx(2)
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert mean - low == pytest.approx(high - mean)


def test_interval_agrees_with_the_paired_test():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=7).tolist(), generator.normal(size=7).tolist()
    expected = stats.ttest_rel(first, second).confidence_interval(0.9)
    assert paired_interval(first, second, 0.9)[1:] == pytest.approx((expected.low, expected.high))


def test_single_pair_says_nothing_of_spread():
    assert paired_interval([1.5], [1.0]) == (0.5, -math.inf, math.inf)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="got 1, 2"):
        paired_interval([1.0], [1.0, 2.0])
