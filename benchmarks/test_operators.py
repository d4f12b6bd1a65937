"""pytest-benchmark cases of the single operators, run by `make bench`: `pytest benchmarks --benchmark-enable`.

They time what the suite `ops` times, for a person who wants pytest-benchmark's statistics and comparisons.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.suites.ops import NAIVE, OURS, SUITE


@pytest.mark.parametrize("form", [OURS, NAIVE])
@pytest.mark.parametrize("name", list(SUITE.cases))
def test_operator(benchmark: Any, name: str, form: str) -> None:
    """One operator or its naive form on a batch of 4."""
    benchmark.group = name
    call = SUITE.cases[name].args[0](4, 0)
    result = benchmark(call.ours if form == OURS else call.naive)
    assert result is not None or name.endswith("_")  # those write into their argument
