"""Measures suites of cases; every result is a row of JSON from which the tables and plots are made."""

from benchmarks.suites import (
    continual,
    cpu,
    cpu_models,
    finetune,
    layers,
    memory,
    memory_budget,
    memory_curve,
    memory_peak,
    memory_training,
    models,
    ops,
)

__all__ = [
    "continual",
    "cpu",
    "cpu_models",
    "finetune",
    "layers",
    "memory",
    "memory_budget",
    "memory_curve",
    "memory_peak",
    "memory_training",
    "models",
    "ops",
]
