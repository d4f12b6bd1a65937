"""Whole models of the GPU suite: calibration, and, behind a flag, training steps, eager and compiled."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import lance_kernels as lance
from benchmarks.gpu.cases import BF16, OURS, SUITE
from benchmarks.gpu.device import measure
from benchmarks.models import Classifier, frozen_norms, natural_images, resnet50
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.cpu_models import training_step

PLAIN, FORWARD = "plain", "forward pass"
MODEL_CASES = "model step"  # how the names of the cases behind the flag begin
# Launched from Python, launching counted; the same in a CUDA graph; compiled, in a CUDA graph.
EAGER, CAPTURED, COMPILED = "eager", "captured", "compiled and captured"


def vit_base(classes: int = 100) -> Classifier:
    """ViT-B/16."""
    from transformers import ViTConfig, ViTForImageClassification

    return Classifier(ViTForImageClassification(ViTConfig(num_labels=classes)))


def _images(context: Context, batch: int, seed: int = 0) -> torch.Tensor:
    batch, size = (2, 224) if context.quick else (batch, 224)
    return natural_images(batch, size, context.seed + seed).to(context.device)


def calibration(batch: int, target: float, context: Context) -> list[Row]:
    """Time `calibrate` spends on a batch, its forward pass included, over the forward pass alone; bfloat16 autocast."""
    images = _images(context, batch)
    plain = frozen_norms(resnet50()).eval().to(context.device)
    model = copy.deepcopy(plain)
    lance.compress_(model)
    samples: dict[str, list[float]] = {FORWARD: [], OURS: []}

    def clock() -> float:
        if context.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def loader() -> Iterator[torch.Tensor]:
        for _ in range(3 if context.quick else 12):
            start = clock()
            with torch.no_grad():
                plain(images)
            middle = clock()
            yield images
            samples[FORWARD].append(middle - start)
            samples[OURS].append(clock() - middle)

    with torch.autocast(context.device, BF16):
        lance.calibrate(model, loader(), max_batches=None, progress=False)
    return context.rows(
        {name: values[1:] for name, values in samples.items()}, baseline=FORWARD, targets={OURS: target}
    )


def model_step(
    make: Callable[[], nn.Module], batch: int, way: str, target: float, companion_target: float, context: Context
) -> list[Row]:
    """Forward pass, loss and backward pass under bfloat16 autocast, all convolutions and linear layers compressed."""
    images, labels = _images(context, batch), torch.arange(2 if context.quick else batch, device=context.device) % 100
    plain = frozen_norms(make()).to(context.device)
    models = {PLAIN: plain}
    for name, companions in ((OURS, "none"), (f"{OURS}, companions exact", "exact")):
        models[name] = copy.deepcopy(plain)
        lance.compress_(models[name], lance.LanceConfig(companions=companions))
        lance.calibrate(models[name], [images, _images(context, batch, 1)], progress=False)
        frozen_norms(models[name])
    runs = {}
    for name, model in models.items():
        called = torch.compile(model, fullgraph=True) if way == COMPILED and not context.quick else model
        runs[name] = partial(_autocast_step, context.device, training_step(called, images, labels))
    rounds, short = 3 if context.quick else 15, 0.0 if way == EAGER else math.inf
    samples = measure(runs, [None], context.device, rounds=rounds, seconds=10.0, short=short)
    targets = {OURS: target, f"{OURS}, companions exact": companion_target}
    return context.rows(samples, baseline=PLAIN, targets=targets)


def _autocast_step(device: str, run: Callable[[], None], _: None) -> None:
    with torch.autocast(device, BF16):
        run()


def _register() -> None:
    SUITE.case("calibration: ResNet-50, B=64")(partial(calibration, 64, 2.6))
    for way in (EAGER, CAPTURED, COMPILED):
        resnet = partial(model_step, resnet50, 128, way, 0.97, 0.85)
        SUITE.case(f"{MODEL_CASES}: ResNet-50, B=128, {way}")(resnet)
        SUITE.case(f"{MODEL_CASES}: ViT-B/16, B=64, {way}")(partial(model_step, vit_base, 64, way, 0.88, 0.85))


_register()
