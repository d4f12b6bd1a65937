"""`LanceConfig` refuses what it cannot mean, and its patterns match what they say."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

import lance_kernels as lance
from lance_kernels.config import matches


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("energy", 0.0),
        ("energy", 1.5),
        ("core_bits", 3),
        ("batch_mode", "drop"),
        ("companions", "some"),
        ("max_rank", 0),
        ("rank_multiple", 0),
        ("target_modules", "conv"),
        ("target_modules", ["("]),
        ("exclude_modules", [3]),
        ("rank_pattern", {"conv": 0.0}),
        ("rank_pattern", {"conv": True}),
        ("rank_pattern", {"conv": [0, 2]}),
        ("rank_pattern", {"(": 0.5}),
        ("rank_pattern", None),
        ("rank_pattern", [("conv", 3)]),
        ("energy", True),
        ("energy", "0.5"),
        ("energy", None),
        ("core_bits", True),
        ("core_bits", 4.0),
        ("max_rank", 2.5),
        ("max_rank", True),
        ("max_rank", "3"),
        ("rank_multiple", 1.5),
        ("budget_bytes", "1"),
        ("rounding_weight", None),
        ("max_work", "half"),
        ("target_modules", 3),
        ("exclude_modules", None),
    ],
)
def test_refuses_and_names_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"LanceConfig: {name}.* is .*; expected"):
        lance.LanceConfig(**{name: value})


def test_published_form():
    config = lance.LanceConfig.published()
    assert (config.energy, config.core_bits, config.batch_mode, config.companions) == (0.7, None, "fixed", "none")


def test_config_is_a_value():
    config = lance.LanceConfig(rank_pattern={"fc": 4})
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, energy=0.5).energy == 0.5


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("layer1.0.conv1", True),
        ("conv1", True),
        ("0.conv1", True),
        ("onv1", False),
        (r"layer\d\..*", True),
        (r"layer[2-4]\..*", False),
        ("layer1", False),
    ],
)
def test_patterns(pattern, expected):
    assert matches("layer1.0.conv1", [pattern]) is expected
