"""Interleaved timing: every round measures every method once, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Method = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: time after which no further round starts.
        least_rounds: rounds measured however long they take.
        most_rounds: rounds after which measuring stops.
        shortest: calls of a method are repeated within a round until they last this many seconds.
    """

    seconds: float = 8.0
    least_rounds: int = 7
    most_rounds: int = 60
    shortest: float = 0.01


QUICK = Effort(seconds=0.2, least_rounds=2, most_rounds=3, shortest=0.0)


def interleave(
    methods: Mapping[str, Method], effort: Effort, *, synchronize: Callable[[], None] | None = None, seed: int = 0
) -> dict[str, list[float]]:
    """Times `methods` side by side.

    Args:
        methods: functions of no arguments by name; each must do its whole work on every call.
        effort: how long to measure.
        synchronize: waits for the device's queue; called before the clock is read.
        seed: seed of the order within the rounds.

    Returns:
        Seconds a call, one value a round, by name. Values at the same index belong to the same round.
    """
    wait = synchronize or (lambda: None)
    repeats: dict[str, int] = {}
    for name, method in methods.items():
        method()  # allocations, kernel choice and caches are not part of any round
        repeats[name] = max(1, round(effort.shortest / max(_time(method, 1, wait), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in methods}
    order, shuffle = list(methods), random.Random(seed).shuffle
    start = time.perf_counter()
    for count in range(effort.most_rounds):
        if count >= effort.least_rounds and time.perf_counter() - start > effort.seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(_time(methods[name], repeats[name], wait))
    return samples


def _time(method: Method, repeats: int, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        method()
    wait()
    return (time.perf_counter() - start) / repeats
