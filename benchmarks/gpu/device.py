"""Timing on a device: events, graphs for what is short, inputs in turn so that none is found in the cache."""

from __future__ import annotations

import cProfile
import math
import pstats
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

Inputs = TypeVar("Inputs")

CACHE_BYTES = 128 * 2**20  # more than twice the L2 cache of an H100
SHORT = 5e-3  # seconds under which launching would be timed too, but for a graph
MOST_KERNELS = 20  # of a method, that are listed
AHEAD = 4_000_000  # clock cycles that the device waits for launches to queue up

profiled = False  # whether what every method launches is printed


def copies_for(input_bytes: int) -> int:
    """How many copies of an input outgrow the cache."""
    return max(1, min(16, math.ceil(CACHE_BYTES / max(input_bytes, 1))))


def measure(
    methods: Mapping[str, Callable[[Inputs], object]],
    copies: Sequence[Inputs],
    device: str,
    *,
    rounds: int,
    seconds: float,
    seed: int = 0,
    short: float = SHORT,
) -> dict[str, list[float]]:
    """Times methods side by side.

    Args:
        methods: functions of one copy of the inputs, by name.
        copies: copies of the inputs, taken in turn.
        device: `cuda`, or `cpu` for a trial of the suite.
        rounds: most rounds.
        seconds: time after which no further round starts; three are always measured.
        seed: seed of the order within the rounds.
        short: seconds of a call under which a method counts as short. Where one is, all are captured in CUDA graphs;
            else they are launched while the device waits. At 0 none is, and launching is timed too.

    Returns:
        Seconds a call, one value a round, by name. Values at the same index belong to the same round.
    """
    if not copies:
        raise ValueError("copies is empty; expected at least one copy of the inputs")
    timers = _timers(methods, copies, device, short)
    if profiled and device == "cuda":
        print(*kernels(methods, copies[0]), sep="\n", flush=True)
    samples: dict[str, list[float]] = {name: [] for name in methods}
    order, shuffle = list(methods), random.Random(seed).shuffle
    start = time.perf_counter()
    for count in range(rounds):
        if count >= 3 and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(timers[name]())
    return samples


def host_times(
    methods: Mapping[str, Callable[[Inputs], object]], inputs: Inputs, device: str, *, rounds: int, calls: int = 50
) -> dict[str, list[float]]:
    """Seconds of the host's time a call, launches not waited for: what bounds a step of many small layers.

    Args:
        methods: functions of the inputs, by name; the device should be done with a call before the next.
        inputs: the inputs.
        device: `cuda`, or `cpu` for a trial of the suite.
        rounds: rounds, in each of which every method is called `calls` times.
        calls: calls a round.

    Returns:
        One value a round, by name.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def repeated(method: Callable[[Inputs], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                method(inputs)

        return run

    runs = {name: repeated(method) for name, method in methods.items()}
    samples: dict[str, list[float]] = {name: [] for name in methods}
    for name, run in runs.items():
        run()
        if profiled:
            profile = cProfile.Profile()
            profile.runcall(run)
            print(f"  {name}, {calls} calls:", flush=True)
            pstats.Stats(profile).sort_stats("tottime").print_stats(MOST_KERNELS)
    for _ in range(rounds):
        for name, run in runs.items():
            wait()
            samples[name].append(_clock(run) / calls)
    wait()
    return samples


def kernels(methods: Mapping[str, Callable[[Inputs], object]], inputs: Inputs) -> list[str]:
    """Lines that say what each method launches on a GPU and how long it takes, the longest first."""
    lines = []
    for name, method in methods.items():
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            method(inputs)
            torch.cuda.synchronize()
        launched = [entry for entry in found.key_averages() if entry.self_device_time_total > 0]
        launched.sort(key=lambda entry: -entry.self_device_time_total)
        total = sum(entry.self_device_time_total for entry in launched)
        lines.append(f"  {name}: {total:.0f} us in {sum(entry.count for entry in launched)} launches")
        for entry in launched[:MOST_KERNELS]:
            lines.append(f"    {entry.self_device_time_total:9.1f} us x{entry.count:<4} {entry.key[:90]}")
    return lines


def _timers(
    methods: Mapping[str, Callable[[Inputs], object]], copies: Sequence[Inputs], device: str, short: float
) -> dict[str, Callable[[], float]]:
    clock = _clock if device == "cpu" else partial(_events, ahead=short > 0)

    def over_copies(method: Callable[[Inputs], object]) -> Callable[[], None]:
        def run() -> None:
            for copy in copies:
                method(copy)

        return run

    def timer(run: Callable[[], None]) -> Callable[[], float]:
        return lambda: clock(run) / len(copies)

    runs = {name: over_copies(method) for name, method in methods.items()}
    once = {} if device == "cpu" else {name: _warm_time(run) / len(copies) for name, run in runs.items()}
    if once and min(once.values()) < short:
        return {name: _captured(run, len(copies), once[name]) for name, run in runs.items()}
    return {name: timer(run) for name, run in runs.items()}


def _warm_time(run: Callable[[], None]) -> float:
    """Seconds of a run when compilation, caches and the allocator are warm, on this stream and for a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    run()
    torch.cuda.synchronize()
    return _events(run)


def _captured(run: Callable[[], None], copies: int, once: float) -> Callable[[], float]:
    repeats = max(1, math.ceil(5e-4 / max(once * copies, 1e-7)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return lambda: _events(graph.replay) / (repeats * copies)


def _clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _events(run: Callable[[], object], ahead: bool = False) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(AHEAD)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
