"""One training step of every method: bytes, operations and time, methods in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import lance_kernels as lance
from benchmarks.finetune import loss_of, step
from benchmarks.methods.interface import Batch, Method, UnfitLayerError
from benchmarks.methods.kept import kept_layers
from benchmarks.methods.measure import counted_bytes, dense_bytes, factor_bytes, flops
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.timing import interleave

PLAIN = "plain"
RECOMPUTING = ("checkpointed", "compiled")
UNITS = {
    "counted bytes": "B",
    "factor bytes": "B",
    "held bytes": "B",
    "peak bytes": "B",
    "operations": "FLOP",
    "calibration": "s",
}


Makers = Mapping[str, Callable[[], Method]]
Targets = Mapping[str, Mapping[str, float]]


def measure_steps(
    context: Context,
    model: nn.Module,
    names: Sequence[str],
    loader: Sequence[Batch],
    makers: Makers,
    targets: Targets | None = None,
    *,
    timed: bool = True,
) -> list[Row]:
    """Measures one step of every method on the same model and batch.

    A method that the model's layers are not made for is left out of the rows.

    Args:
        context: of the case.
        model: the plain model in its mode for training.
        names: layers to compress.
        loader: batches to calibrate on; the first is the measured step's.
        makers: methods by name, plain among them.
        targets: by quantity and method, what the ratio to plain should be at most.
        timed: measure bytes held and times too, not only what can be counted.

    Returns:
        Rows of counted and factor bytes and operations; with `timed` also of held and peak bytes, step time, and time
        of decompositions and calibration.
    """
    tables: dict[str, dict[str, list[float]]] = {quantity: {} for quantity in UNITS}
    details: dict[str, dict[str, Any]] = {}
    prepared: dict[str, nn.Module] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            changed = make().apply(model, names, loader)
            seconds = time.perf_counter() - start
            found = flops(changed, loader[0])
        except UnfitLayerError:
            continue
        tables["operations"][name] = [float(sum(found.values()))]
        details[name] = dict(found)
        counted = None
        if timed:
            report = lance.report(changed, loader[0][0], loss_of(loader[0][1]))
            tables["calibration"][name] = [seconds]
            tables["held bytes"][name] = [float(report.held_bytes)]
            tables["peak bytes"][name] = [float(report.peak_bytes)]
            counted = report.counted_bytes if report.layers else None
            prepared[name] = changed
        if not name.startswith((*RECOMPUTING, "LoRA")):
            tables["counted bytes"][name] = [float(counted or counted_bytes(changed, names, loader[0]))]
            tables["factor bytes"][name] = [float(factor_bytes(changed))]
    for entry in details.values():
        entry["decomposition"] = max(0, entry["forward"] - details[PLAIN]["forward"])
        entry["dense_bytes"] = dense_bytes(model, names, loader[0])
    rows: list[Row] = []
    for quantity, samples in tables.items():
        rows += context.rows(
            samples,
            quantity=quantity,
            unit=UNITS[quantity],
            baseline=None if quantity in ("calibration", "factor bytes") else PLAIN,
            targets=(targets or {}).get(quantity),
            details=details if quantity == "operations" else None,
        )
    if not timed:
        return rows
    times, apart = _times(context, prepared, loader[0])
    rows += context.rows(times, quantity="step time", baseline=PLAIN, targets=(targets or {}).get("step time"))
    return rows + context.rows({name: [value] for name, value in apart.items()}, quantity="decomposition in a step")


def _times(
    context: Context, prepared: Mapping[str, nn.Module], batch: Batch
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step by method, in turns, and what of it decompositions and packing of the rivals took."""
    calls = dict.fromkeys(prepared, 0)

    def one(name: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        calls[name] += 1
        step(model, optimizer, *batch)

    functions: dict[str, Callable[[], None]] = {}
    for name, model in prepared.items():
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        functions[name] = partial(one, name, model, optimizer)
        for layer in kept_layers(model).values():
            layer.seconds = 0.0
    gc.collect()
    wait = torch.cuda.synchronize if context.device == "cuda" else None
    samples = interleave(functions, context.effort, synchronize=wait, seed=context.seed)
    apart = {}
    for name, model in prepared.items():
        layers = kept_layers(model)
        if layers:
            apart[name] = sum(layer.seconds for layer in layers.values()) / calls[name]
    return samples, apart
