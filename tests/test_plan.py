"""Ranks from eigenvalues."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lance_kernels as lance
from lance_kernels.plan import choose_ranks, energy_rank


@given(values=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=20), energy=st.floats(0.01, 1.0))
def test_energy_rank_is_the_smallest_that_suffices(values, energy):
    eigenvalues = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = energy_rank(eigenvalues, energy)
    total = eigenvalues.sum()
    assert 1 <= rank <= len(values)
    assert eigenvalues[:rank].sum() >= energy * total * (1 - 1e-9)
    if rank > 1:
        assert eigenvalues[: rank - 1].sum() < energy * total


def test_zero_spectrum_has_rank_one():
    assert energy_rank(torch.zeros(5), 0.9) == 1


def spectra(*sizes):
    return [None, *(torch.arange(size, 0, -1.0) for size in sizes)]


def test_a_mode_at_full_rank_is_kept():
    assert choose_ranks("fc", spectra(4), lance.LanceConfig(energy=1.0)) == [None, None]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.5, [None, 4, 19]),
        (3, [None, 3, 3]),
        ((None, 2, None), [None, 2, None]),
    ],
)
def test_rank_pattern(rule, expected):
    config = lance.LanceConfig(energy=0.9, rank_pattern={"other": 1, "fc": rule})
    assert choose_ranks("block.fc", spectra(12, 64), config) == expected


def test_rank_pattern_of_another_length_is_refused():
    config = lance.LanceConfig(rank_pattern={"fc": (None, 2)})
    with pytest.raises(ValueError, match=r"gives 2 ranks for layer 'fc'; expected 3"):
        choose_ranks("fc", spectra(4, 5), config)


def test_limits():
    config = lance.LanceConfig(energy=0.5, rank_multiple=8, max_rank=20)
    assert choose_ranks("fc", spectra(12, 64, 128), config) == [None, 4, 20, 20]
    assert choose_ranks("fc", spectra(12, 64), lance.LanceConfig(energy=0.5, rank_multiple=8)) == [None, 4, 24]
