"""Every way to hold less in training, behind one interface: `method.apply(model, names, loader)`."""

from benchmarks.methods.interface import Batch, Method
from benchmarks.methods.make import (
    asi,
    checkpointed,
    compiled,
    gradient_filtering,
    hosvd,
    lora,
    ours,
    plain,
    published,
)
from benchmarks.methods.measure import counted_bytes, dense_bytes, errors, flops, gradients, held_and_peak

__all__ = [
    "Batch",
    "Method",
    "asi",
    "checkpointed",
    "compiled",
    "counted_bytes",
    "dense_bytes",
    "errors",
    "flops",
    "gradient_filtering",
    "gradients",
    "held_and_peak",
    "hosvd",
    "lora",
    "ours",
    "plain",
    "published",
]
