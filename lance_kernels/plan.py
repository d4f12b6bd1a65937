"""Choosing ranks from the eigenvalues that calibration found."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lance_kernels.config import LanceConfig, RankRule, matches


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


def choose_ranks(name: str, spectra: Sequence[torch.Tensor | None], config: LanceConfig) -> list[int | None]:
    """Ranks for one layer.

    Args:
        name: the layer's name, for `config.rank_pattern`.
        spectra: eigenvalues, descending, of every mode's Gram matrix; None for a mode that is kept.
        config: energy, patterns and limits.

    Returns:
        One rank a mode; None keeps the mode, also where the rank came out as the mode's size.

    Raises:
        ValueError: a `rank_pattern` that matches has another number of modes.
    """
    rule: RankRule = config.energy
    for pattern, candidate in config.rank_pattern.items():
        if matches(name, [pattern]):
            rule = candidate
            break
    if not isinstance(rule, float | int) and len(rule) != len(spectra):
        raise ValueError(
            f"rank_pattern gives {len(rule)} ranks for layer {name!r}; expected {len(spectra)}, one a mode of its input"
        )
    ranks: list[int | None] = []
    for mode, eigenvalues in enumerate(spectra):
        if eigenvalues is None:
            ranks.append(None)
            continue
        size = eigenvalues.numel()
        if isinstance(rule, float):
            rank: int | None = energy_rank(eigenvalues, rule)
        elif isinstance(rule, int):
            rank = min(energy_rank(eigenvalues, config.energy), rule)
        else:
            rank = rule[mode]
        ranks.append(_limited(rank, size, config))
    return ranks


def _limited(rank: int | None, size: int, config: LanceConfig) -> int | None:
    if rank is None:
        return None
    if size >= 64:
        rank = -(-rank // config.rank_multiple) * config.rank_multiple
    if config.max_rank is not None:
        rank = min(rank, config.max_rank)
    return None if rank >= size else rank
