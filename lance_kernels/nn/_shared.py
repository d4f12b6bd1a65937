"""Layers that read one input: the core that one of them made serves the others.

Only eager code needs this. A compiler sees the same projection of the same input by the same factors several times and
makes it once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class SharedCore:
    """The core made last within a group of layers that share factors, for as long as its input lives."""

    _input: Callable[[], torch.Tensor | None]
    _state: tuple[Any, ...]
    _factors: list[torch.Tensor | None]
    _core: torch.Tensor | None
    _layers: set[int]

    def __init__(self) -> None:
        self._forget()

    def __reduce__(self) -> Any:
        # Copies and pickles start empty.
        return SharedCore, ()

    def find(
        self, layer: nn.Module, x: torch.Tensor, factors: Sequence[torch.Tensor | None], bits: int
    ) -> torch.Tensor | None:
        """The core of `x`, if it was the last one made with these factors and bits and `x` was not written since.

        A layer that comes a second time gets none: memory that PyTorch does not watch may hold other values by then.
        """
        if self._input() is not x or self._state != _state_of(x, bits) or len(factors) != len(self._factors):
            return None
        same = all(mine is theirs for mine, theirs in zip(factors, self._factors))
        if not same or id(layer) in self._layers:
            return None
        self._layers.add(id(layer))
        return self._core

    def store(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        factors: Sequence[torch.Tensor | None],
        bits: int,
        core: torch.Tensor,
    ) -> None:
        """Remembers the core of `x`; forgotten when `x` is freed, or when another is stored."""
        self._input = weakref.ref(x, self._forget)
        self._state, self._factors, self._core = _state_of(x, bits), list(factors), core
        self._layers = {id(layer)}

    def _forget(self, freed: Any = None) -> None:
        if freed is None or freed is self._input:
            self._input, self._state, self._factors, self._core = (lambda: None), (), [], None
            self._layers = set()


def _state_of(x: torch.Tensor, bits: int) -> tuple[Any, ...]:
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x._version, bits, cast
