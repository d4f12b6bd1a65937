"""Cases of the suite `cpu` on whole models: a training step over plain PyTorch, and calibration over a forward pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lance_kernels as lance
from benchmarks.models import MODELS, frozen_norms, natural_images
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.cpu import OURS, PLAIN, SUITE
from benchmarks.timing import Effort, interleave

STEP_TARGETS = {"ResNet-18": 0.8, "MobileNetV2": 0.9}
CALIBRATION_TARGET = 2.5
FORWARD = "forward pass"
BATCH, SIZE = 16, 224
NOTE = (
    "All layers trainable, batch norm frozen, random weights; random images with the spectrum of photographs; factors "
    "from calibration."
)


def model_step(name: str, context: Context) -> list[Row]:
    """Forward pass, loss and backward pass of a model, plain and compressed by `LanceConfig()`."""
    images = natural_images(*_shape(context), context.seed)
    labels = torch.arange(len(images)) % 100
    plain = frozen_norms(MODELS[name]())
    methods, details = {PLAIN: training_step(plain, images, labels)}, {}
    for method, config in {
        OURS: lance.LanceConfig(),
        "lance, companions none, 32-bit core": lance.LanceConfig(companions="none", core_bits=None),
    }.items():
        model = copy.deepcopy(plain)
        lance.compress_(model, config)
        lance.calibrate(
            model, [images, natural_images(*_shape(context), context.seed + 1)], max_batches=2, progress=False
        )
        methods[method] = training_step(frozen_norms(model), images, labels)
        report = lance.report(model, images, lambda output: cross_entropy(output, labels))
        details[method] = {
            "note": NOTE,
            "energy": config.energy,
            "counted_bytes": report.counted_bytes,
            "dense_bytes": report.dense_bytes,
            "held_bytes": report.held_bytes,
        }
    effort = context.effort if context.quick else Effort(seconds=90.0, least_rounds=7, most_rounds=15, shortest=0.0)
    return context.rows(
        interleave(methods, effort, seed=context.seed),
        baseline=PLAIN,
        targets={OURS: STEP_TARGETS[name]},
        details=details,
    )


def calibration(name: str, context: Context) -> list[Row]:
    """Time `calibrate` spends on a batch, over a forward pass of the plain model without gradients.

    The loader times a plain forward pass before it hands out each batch, so both are measured in turn and the
    eigenvectors, which are found once at the end, stay apart.
    """
    images = natural_images(*_shape(context), context.seed)
    plain = frozen_norms(MODELS[name]()).eval()
    model = copy.deepcopy(plain)
    lance.compress_(model, lance.LanceConfig())
    rounds = 3 if context.quick else 12
    samples: dict[str, list[float]] = {FORWARD: [], OURS: []}
    end = 0.0

    def loader() -> Iterator[torch.Tensor]:
        nonlocal end
        for _ in range(rounds):
            start = time.perf_counter()
            with torch.no_grad():
                plain(images)
            middle = time.perf_counter()
            yield images
            end = time.perf_counter()
            samples[FORWARD].append(middle - start)
            samples[OURS].append(end - middle)

    lance.calibrate(model, loader(), max_batches=None, progress=False)
    decomposition = time.perf_counter() - end
    return context.rows(
        {method: values[1:] for method, values in samples.items()},  # the first round warms up
        baseline=FORWARD,
        targets={OURS: CALIBRATION_TARGET},
    ) + context.rows(
        {"lance, eigenvectors, once": [decomposition]},
    )


def _shape(context: Context) -> tuple[int, int]:
    return (2, 64) if context.quick else (BATCH, SIZE)


def training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Forward pass, loss and backward pass of `model`, as a function of no arguments."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()

    return run


def _register() -> None:
    def add(case: str, measure: Callable[[str, Context], list[Row]], name: str) -> None:
        SUITE.case(f"{case}: {name}, {SIZE}x{SIZE}, B={BATCH}")(lambda context: measure(name, context))

    add("calibration", calibration, "ResNet-18")
    for name in STEP_TARGETS:
        add("model step", model_step, name)


_register()
