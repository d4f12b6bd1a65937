"""Ranks from eigenvalues, and what lost energy and rounding cost in gradient cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lance_kernels.config import LanceConfig, RankRule, matches

# Gradient cosine lost to rounding, by bits; None is the input's dtype. See docs/decisions.md for these figures.
ROUNDING: Mapping[int | None, float] = {None: 0.0, 8: 2e-5, 4: 2e-3, 2: 0.025, 1: 0.4}
# The same where single values of the core are chosen.
ROUNDING_SELECTED: Mapping[int | None, float] = {None: 0.0, 8: 2e-5, 4: 1.7e-3, 2: 0.02, 1: 0.38}
# What a mode's lost energy costs: a lost feature is a lost column of the weight gradient, positions average out.
FEATURE_COST, POSITION_COST = 0.35, 0.19
# The same where single values of the core are chosen over all modes: of the lost energy and of its third power.
LINEAR_COST, CUBIC_COST = 0.116, 0.34


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


def cosine_selected(lost: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Gradient cosine that a selection of core values leaves when it loses fractions of the energy."""
    return np.asarray(np.exp(-(LINEAR_COST * lost + CUBIC_COST * lost**3)))


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
    rule = rule_for(name, len(spectra), config)
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
        ranks.append(None if rank is None or limited(rank, size, config) >= size else limited(rank, size, config))
    return ranks


def rule_for(name: str, modes: int, config: LanceConfig) -> RankRule | None:
    for pattern, rule in config.rank_pattern.items():
        if matches(name, [pattern]):
            if not isinstance(rule, float | int) and len(rule) != modes:
                raise ValueError(
                    f"rank_pattern gives {len(rule)} ranks for layer {name!r}; expected {modes}, one a mode of its "
                    "input"
                )
            return rule
    return None


def limited(rank: int, size: int, config: LanceConfig) -> int:
    if size >= 64:
        rank = -(-rank // config.rank_multiple) * config.rank_multiple
    if config.max_rank is not None:
        rank = min(rank, config.max_rank)
    return min(rank, size)
