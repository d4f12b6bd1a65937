"""Cases of the suite `memory`: the bytes at which whole models keep a mean gradient cosine of 0.9."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch

import lance_kernels as lance
from benchmarks.finetune import loss_of
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.memory import BATCH, PLAIN, SUITE, images_for, prepared
from benchmarks.suites.memory_curve import dense_bytes

COSINE = 0.9
SHARES = (1e-3, 1.0)  # of the inputs' bytes
HALVINGS = 7
PLANNED = "lance, least byte budget found"


def least_budget(name: str, context: Context) -> list[Row]:
    """Bytes held at the least budget that bisection finds to give a mean gradient cosine of `COSINE`.

    The search halves the logarithm of the budget between `SHARES` of the inputs' bytes. Where the largest share falls
    short, so does the row, and says so by its cosine.
    """
    count = 2 if context.quick else BATCH
    everything = images_for(context, 3 * count)
    images, loss = everything[:count], loss_of(torch.arange(count) % 10)
    start = prepared(name, images, "frozen")
    model = copy.deepcopy(start)
    lance.compress_(model, lance.LanceConfig(rounding_weight=1.0))
    calibration = lance.calibrate(model, [everything[count : 2 * count], everything[2 * count :]], progress=False)
    dense = dense_bytes(calibration)

    def measure(share: float) -> lance.Report | None:
        """What the plan of a share gives; None where no plan fits into it."""
        try:
            planned = lance.plan(model, calibration, int(share * dense))
        except ValueError:
            return None
        planned.apply(model, calibration)
        return lance.report(model, images, loss)

    low, high = map(math.log, SHARES)
    best = measure(math.exp(high))
    for _ in range(2 if context.quick else HALVINGS):
        middle = (low + high) / 2
        found = measure(math.exp(middle))
        if found is not None and (found.gradient_cosine or 0.0) >= COSINE:
            high, best = middle, found
        else:
            low = middle
    if best is None:
        raise RuntimeError(f"{name}: no plan fits into the bytes of its own inputs")
    held = {PLAIN: [float(lance.held_bytes(start, images, loss))], PLANNED: [float(best.held_bytes)]}
    details = {PLANNED: {"share": math.exp(high), "counted_bytes": best.counted_bytes}}
    rows = context.rows(held, quantity="held bytes", unit="B", baseline=PLAIN, details=details)
    return rows + context.rows({PLANNED: [float(best.gradient_cosine or 1.0)]}, quantity="gradient cosine", unit="")


for _name in ("ResNet-18", "MobileNetV2", "ResNet-50"):
    SUITE.case(f"held: {_name}, frozen batch norm, budget for gradient cosine {COSINE:g}")(partial(least_budget, _name))
