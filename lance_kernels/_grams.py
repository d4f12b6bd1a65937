"""Running Gram matrices of the compressed layers' inputs over one pass of the data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lance_kernels.distributed import Ranks
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops._checks import accumulation_dtype


@dataclass
class Seen:
    """What one rank saw of a layer: enough for the others to make room for its Grams.

    Attributes:
        size: the input's shape in the rank's first batch.
        first: the first mode that has a Gram.
        varied: modes whose size changed.
        dtype: of the Grams.
        bytes: of the Grams.
        calls: most calls in one batch.
        owner: the layer that has this one's Grams, having had the same inputs; None for a layer with its own.
        deferred: there was no room in this pass.
    """

    size: tuple[int, ...]
    first: int
    varied: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    calls: int
    owner: str | None = None
    deferred: bool = False


class Grams:
    """Running Gram matrices of one layer's input."""

    def __init__(self, layer: CompressedLayer) -> None:
        self.layer = layer
        self.fixed_batch = layer.lance_config.batch_mode == "fixed"
        self.batched_dim: int | None = getattr(layer, "batched_dim", None)
        self.size: tuple[int, ...] | None = None
        self.dtype = torch.float32
        self.first = 0
        self.grams: list[torch.Tensor | None] = []
        self.varied: set[int] = set()
        self.owner: str | None = None
        self.calls = self.calls_in_batch = self.most_calls = 0
        self.deferred = False

    def prepare(self, x: torch.Tensor) -> int:
        """Takes sizes from the first input; returns the bytes its Grams will have."""
        self.size, self.dtype = tuple(x.shape), accumulation_dtype(x.dtype)
        self.first = 0 if self.fixed_batch or x.dim() == 1 else 1
        return sum(extent * extent for extent in self.size[self.first :]) * self.dtype.itemsize

    def allocate(self, device: torch.device) -> None:
        """Makes room, zeros."""
        assert self.size is not None
        self.grams = [
            torch.zeros(size, size, dtype=self.dtype, device=device) if mode >= self.first else None
            for mode, size in enumerate(self.size)
        ]

    def update(self, x: torch.Tensor) -> None:
        """Adds the Grams of an input."""
        assert self.size is not None
        if x.dim() != len(self.size):
            # Only the last mode is the same one.
            self.varied |= set(range(len(self.size) - 1))
            self._add(x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0), {1: len(self.size) - 1})
            return
        batch_differs = self.fixed_batch and x.shape[0] != self.size[0]
        for mode in range(1, x.dim()):
            if x.shape[mode] != self.size[mode]:
                self.varied.add(mode)
        skipped = {0} if batch_differs else set()
        self._add(x, {mode: mode for mode in range(x.dim()) if mode not in skipped})

    def copy_from(self, other: Grams) -> None:
        """Goes on alone with what the owner has gathered."""
        self.owner = None
        self.size, self.dtype, self.first, self.varied = other.size, other.dtype, other.first, set(other.varied)
        self.grams = [None if gram is None else gram.clone() for gram in other.grams]

    def seen(self) -> Seen:
        """What other ranks need to know."""
        assert self.size is not None
        total = sum(extent * extent for extent in self.size[self.first :]) * self.dtype.itemsize
        varied = tuple(sorted(self.varied))
        return Seen(self.size, self.first, varied, self.dtype, total, self.most_calls, self.owner, self.deferred)

    def sum_over(self, ranks: Ranks, everyone: list[Seen]) -> None:
        """Replaces the Grams by the sum over ranks.

        Args:
            ranks: the ranks.
            everyone: what those that called the layer saw, in order of rank.
        """
        reference = everyone[0]
        modes = len(reference.size)
        varied = {mode for seen in everyone for mode in seen.varied if len(seen.size) == modes}
        varied |= {mode for seen in everyone for mode in _differing(seen.size, reference.size)}
        dtype = torch.float64 if any(seen.dtype == torch.float64 for seen in everyone) else torch.float32
        mine: list[torch.Tensor | None] = [None] * modes
        if self.size is not None:
            if len(self.size) == modes:
                mine = self.grams
            else:
                mine[-1] = self.grams[-1]
        device = self.layer.weight.device
        self.grams, self.size, self.varied = [], reference.size, varied
        self.most_calls = max(seen.calls for seen in everyone)
        for mode, extent in enumerate(reference.size):
            if mode < reference.first or mode in varied:
                self.grams.append(None)
                continue
            own = mine[mode]
            fits = own is not None and own.shape[0] == extent
            gram = (
                own.to(dtype) if own is not None and fits else torch.zeros(extent, extent, dtype=dtype, device=device)
            )
            ranks.sum_(gram)
            self.grams.append(gram)

    def _add(self, x: torch.Tensor, modes: dict[int, int]) -> None:
        for index in self.varied:
            self.grams[index] = None
        grams = {mode: self.grams[index] for mode, index in modes.items()}
        wanted = {mode: gram for mode, gram in grams.items() if gram is not None}
        torch.ops.lance.mode_grams_(list(wanted.values()), x, list(wanted))


def _differing(size: tuple[int, ...], reference: tuple[int, ...]) -> set[int]:
    if len(size) != len(reference):
        return set(range(len(reference) - 1))
    return {mode for mode in range(1, len(size)) if size[mode] != reference[mode]}


class Collector:
    """Takes the Grams of some layers' inputs while batches run through the model.

    A layer whose input is the very tensor that another layer just had gets no Grams of its own: the other owns them.
    Should their inputs differ later on, or one of them be called without the other, it is deferred to a pass of its
    own; where there cannot be one, it goes on with a copy, in which the owner's inputs of the present batch count
    beside its own.

    Args:
        layers: the layers to look at, by name.
        limit: most bytes of Grams; layers that find no room are deferred. The first layer always finds it.
        repeatable: whether there can be another pass.
    """

    def __init__(self, layers: Mapping[str, CompressedLayer], limit: int | None, repeatable: bool) -> None:
        self.repeatable = repeatable
        self.records = {name: Grams(layer) for name, layer in layers.items()}
        self.limit = limit
        self.bytes = 0
        # By identity of the tensor: a reference to it, its version, and the first layer that had it.
        self.inputs: dict[int, tuple[Any, int, str]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context the layers' inputs are looked at."""
        handles = [
            record.layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, record in self.records.items()
        ]
        try:
            yield
            self.begin_batch()
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.clear()

    def begin_batch(self) -> None:
        """Ends the batch before: forgets its inputs, and parts layers that it did not call equally often."""
        self.inputs.clear()
        for record in self.records.values():
            owner = self.records[record.owner] if record.owner is not None else record
            if not record.deferred and record.calls_in_batch != owner.calls_in_batch:
                self._part(record)
        for record in self.records.values():
            record.calls_in_batch = 0

    def deferred(self) -> bool:
        """Whether a layer found no room."""
        return any(record.deferred for record in self.records.values())

    def seen(self) -> dict[str, Seen]:
        """What was seen of every layer that was called."""
        return {name: record.seen() for name, record in self.records.items() if record.size is not None}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._look(name, args[0] if args else next(iter(kwargs.values())))

        return hook

    def _look(self, name: str, x: torch.Tensor) -> None:
        record, first = self.records[name], self._first_with(name, x)
        if record.batched_dim is not None and x.dim() == record.batched_dim - 1:
            x = x.unsqueeze(0)
        owner = None if first is None else self.records[first]
        shares = owner is not None and owner.batched_dim == record.batched_dim
        shares = shares and owner is not None and owner.fixed_batch == record.fixed_batch
        if record.deferred:
            return
        if record.size is None:
            size = record.prepare(x)
            if shares and owner is not None and (owner.deferred or (owner.calls == 1 and owner.owner is None)):
                record.deferred, record.owner = owner.deferred, first
            elif self.limit is not None and self.bytes and self.bytes + size > self.limit:
                record.deferred = True
            else:
                self.bytes += size
                record.allocate(x.device)
        elif record.owner is not None and (not shares or first != record.owner):
            self._part(record)
        if record.deferred:
            return
        record.calls += 1
        record.calls_in_batch += 1
        record.most_calls = max(record.most_calls, record.calls_in_batch)
        if record.owner is None:
            record.update(x)

    def _part(self, record: Grams) -> None:
        """Ends a layer's use of its owner's Grams."""
        assert record.owner is not None
        if self.repeatable:
            record.owner, record.deferred = None, True
        else:
            record.copy_from(self.records[record.owner])

    def _first_with(self, name: str, x: torch.Tensor) -> str | None:
        version = 0 if x.is_inference() else x._version
        reference, known, first = self.inputs.get(id(x), (None, -1, ""))
        if reference is not None and reference() is x and known == version and first != name:
            return first
        self.inputs[id(x)] = (weakref.ref(x), version, name)
        return None


def agree(collector: Collector, everyone: list[dict[str, Seen]]) -> tuple[dict[str, list[Seen]], dict[str, str]]:
    """What the ranks make of what they saw, the same on each of them.

    A layer that used another's Grams on some ranks only gets a copy of them there.

    Args:
        collector: this rank's.
        everyone: what the ranks saw, by rank.

    Returns:
        For every called layer that has Grams of its own, what the ranks saw of it; and the owners of the others.
    """
    views: dict[str, list[Seen]] = {}
    for one in everyone:
        for name, seen in one.items():
            views.setdefault(name, []).append(seen)
    deferred = {name for name, view in views.items() if any(seen.deferred for seen in view)}
    owners: dict[str, str] = {}
    for name, view in views.items():
        owner = view[0].owner
        # A rank that called the owner alone has data of the owner's in their Grams.
        if (
            owner is not None
            and all(seen.owner == owner for seen in view)
            and len(view) == len(views[owner])
            and (owner in deferred) == (name in deferred)
        ):
            owners[name] = owner
    for name, record in collector.records.items():
        if record.owner is not None and name not in owners and name not in deferred:
            record.copy_from(collector.records[record.owner])
    return {name: view for name, view in views.items() if name not in owners}, owners


def groups_within(sizes: Mapping[str, int], limit: int | None, owners: Mapping[str, str]) -> Iterator[Collection[str]]:
    """Splits layers into groups whose Grams stay within a limit, owners and those that use theirs together."""
    members: dict[str, list[str]] = {}
    for name, owner in owners.items():
        members.setdefault(owner, []).append(name)
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        if group and limit is not None and used + size > limit:
            yield group
            group, used = [], 0
        group += [name, *members.get(name, [])]
        used += size
    if group:
        yield group
