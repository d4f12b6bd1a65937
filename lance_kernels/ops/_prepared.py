"""What is made of a layer's factors for a device's kernels: once, and again when they change."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch


class _Entry(NamedTuple):
    sources: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[tuple[int, int], ...]
    result: torch.Tensor
    captured: list[torch.Tensor]  # what CUDA graphs read; it lives as long as the sources do


_PLAIN = (torch.Tensor, torch.nn.Parameter)  # not what stands for a tensor while a model is traced
_PREPARED: dict[tuple[object, ...], _Entry] = {}


def prepared(
    sources: Sequence[torch.Tensor], form: tuple[object, ...], make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What `make` makes of some tensors, kept for as long as they live and do not change; nothing when traced.

    A CUDA graph reads what was made before its capture, also when the tensors change afterwards. Values that are
    written in place through `.data` or `.numpy()` are not seen.

    Args:
        sources: the tensors.
        form: tells apart what is made of the same tensors.
        make: makes it.
    """
    if any(type(source) not in _PLAIN or source.is_inference() for source in sources):
        return make()
    key = (*map(id, sources), *form)
    # Assigning to `.data` leaves the version as it is.
    versions = tuple((source._version, source.data_ptr()) for source in sources)
    entry = _PREPARED.get(key)
    if entry is not None and any(known() is not source for known, source in zip(entry.sources, sources)):
        entry = None
    fresh = entry is not None and entry.versions == versions
    if _capturing(sources[0]):
        # What is made in a capture lives in the graph's memory and holds nothing before its replay.
        if entry is None or not fresh:
            return make()
        if not any(entry.result is tensor for tensor in entry.captured):
            entry.captured.append(entry.result)
    elif entry is None or not fresh:
        references = tuple(weakref.ref(source, lambda _: _PREPARED.pop(key, None)) for source in sources)
        captured = [] if entry is None else entry.captured
        result = outside_pools(make, sources[0].device)
        if type(result) is not torch.Tensor:
            return result
        entry = _PREPARED[key] = _Entry(references, versions, result, captured)
    return entry.result


def outside_pools(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """What `make` makes, in memory that outlives the caller's pool, and there for every stream.

    Compiled models that run as CUDA graphs warm up with all allocations of their thread in a pool that must be empty
    afterwards: another thread's allocations are not in it.
    """
    if device.type != "cuda":
        return make()
    stream = torch.cuda.current_stream(device)

    def run() -> torch.Tensor:
        with torch.no_grad(), torch.cuda.stream(stream):
            made = make()
        stream.synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def _capturing(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
