"""Cases of the suite `memory` that measure a whole process: two training steps in a fresh one, nothing else in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import lance_kernels as lance
from benchmarks import environment
from benchmarks.models import natural_images
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.memory import PLAIN, SIZE, SUITE, checkpoint_blocks, prepared

BATCH = 64
LEAST = {"ResNet-18": 2.5, "MobileNetV2": 4.0}
# By default glibc keeps freed blocks of up to 32 MiB in its heap, between others that live. Both settings are its own:
# blocks of 1 MiB and more get pages of their own, which go back when freed, and huge ones where the system has them.
ALLOCATORS = {
    "": {},
    ", freed memory given back": {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576:glibc.malloc.hugetlb=1"},
}
CONFIGS: dict[str, lance.LanceConfig | None] = {
    PLAIN: None,
    "checkpointed by block": None,
    "lance, default": lance.LanceConfig(),
}

Made = tuple[torch.nn.Module, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]


def training(name: str, method: str, batch: str, size: str, threads: str) -> Made:
    """What `python -m lance_kernels.report` runs: a model, a batch and a loss; every argument a string."""
    torch.set_num_threads(int(threads))
    images = natural_images(int(batch), int(size), 0)
    few = natural_images(4, int(size), 1)
    model = prepared(name, few, "frozen")
    config = CONFIGS[method]
    if config is not None:
        lance.compress_(model, config)
        lance.calibrate(model, [few], progress=False)
    if method == "checkpointed by block":
        checkpoint_blocks(model)
    labels = torch.arange(int(batch)) % 10
    return model, images, lambda output: cross_entropy(output, labels)


def peak_case(name: str, settings: dict[str, str], context: Context) -> list[Row]:
    """Peak resident memory of two steps above the process's own before the first, with settings of the allocator."""
    batch, size = (4, 64) if context.quick else (BATCH, SIZE)
    samples, variables = {}, {**_environment(), **settings}
    for method in CONFIGS:
        command = [sys.executable, "-m", "lance_kernels.report", f"{__name__}:training"]
        command += [name, method, str(batch), str(size), str(context.environment.threads)]
        answer = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=environment.ROOT, env=variables
        )
        samples[method] = [float(json.loads(answer.stdout.splitlines()[-1])["above"])]
    return context.rows(
        samples,
        quantity="peak bytes",
        unit="B",
        baseline=PLAIN,
        targets={"lance, default": 1 / LEAST[name]},
        details={method: {"allocator": settings} for method in samples},
        seed=None,
    )


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(Path(environment.ROOT)), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _register() -> None:
    for name in LEAST:
        for title, settings in ALLOCATORS.items():
            SUITE.case(f"peak: {name}, B={BATCH}{title}")(partial(peak_case, name, settings))


_register()
