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
from benchmarks.methods.interface import Batch, Method
from benchmarks.methods.kept import kept_layers
from benchmarks.methods.measure import counted_bytes, dense_bytes, factor_bytes, flops
from benchmarks.registry import Context
from benchmarks.results import Row, make_rows
from benchmarks.timing import interleave

PLAIN = "plain"
RECOMPUTING = ("checkpointed", "compiled")


def measure_steps(
    context: Context,
    model: nn.Module,
    names: Sequence[str],
    loader: Sequence[Batch],
    makers: Mapping[str, Callable[[], Method]],
    targets: Mapping[str, Mapping[str, float]] | None = None,
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

    Returns:
        Rows of counted, factor, held and peak bytes, operations, step time, and time of decompositions and calibration.
    """
    tables: dict[str, dict[str, list[float]]] = {
        name: {} for name in ("counted bytes", "factor bytes", "held bytes", "peak bytes", "operations", "calibration")
    }
    details: dict[str, dict[str, Any]] = {}
    prepared: dict[str, nn.Module] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            changed = make().apply(model, names, loader)
            found = flops(changed, loader[0])
        except TypeError:
            continue
        tables["calibration"][name] = [time.perf_counter() - start]
        report = lance.report(changed, loader[0][0], loss_of(loader[0][1]))
        tables["held bytes"][name], tables["peak bytes"][name] = [float(report.held_bytes)], [float(report.peak_bytes)]
        tables["operations"][name] = [float(sum(found.values()))]
        details[name] = dict(found)
        if not name.startswith((*RECOMPUTING, "LoRA")):
            counted = report.counted_bytes if report.layers else counted_bytes(changed, names, loader[0])
            tables["counted bytes"][name] = [float(counted)]
            tables["factor bytes"][name] = [float(factor_bytes(changed))]
        prepared[name] = changed
    for entry in details.values():
        entry["decomposition"] = max(0, entry["forward"] - details[PLAIN]["forward"])
        entry["dense_bytes"] = dense_bytes(model, names, loader[0])
    make = partial(
        make_rows, context.suite, context.case, environment=context.environment, quick=context.quick, seed=context.seed
    )
    units = {"operations": "FLOP", "calibration": "s"}
    rows: list[Row] = []
    for quantity, samples in tables.items():
        baseline = None if quantity in ("calibration", "factor bytes") else PLAIN
        rows += make(
            samples,
            quantity=quantity,
            unit=units.get(quantity, "B"),
            baseline=baseline,
            targets=(targets or {}).get(quantity),
            details=details if quantity == "operations" else None,
        )
    samples, apart = _times(context, prepared, loader[0])
    rows += make(samples, quantity="step time", baseline=PLAIN, targets=(targets or {}).get("step time"))
    return rows + make({name: [value] for name, value in apart.items()}, quantity="decomposition in a step")


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
