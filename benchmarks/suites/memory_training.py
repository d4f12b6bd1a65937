"""Cases of the suite `memory` that train: accuracy with quantized companions, and the time of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import lance_kernels as lance
from benchmarks.data import Images, Split, load
from benchmarks.finetune import Recipe, train
from benchmarks.intervals import paired_interval
from benchmarks.models import Classifier, frozen_norms
from benchmarks.network import ResidualNetwork
from benchmarks.registry import Context
from benchmarks.results import Row
from benchmarks.suites.cpu_models import training_step
from benchmarks.suites.memory import BATCH, DEFAULT, PLAIN, SIZE, SUITE, images_for, prepared
from benchmarks.timing import Effort, interleave

SEEDS = 5
LEAST_POINTS = -0.5
QUANTIZED, SMALLEST = "8-bit companions", "smallest companions"
FLOATS = "lance, 32-bit cores"


def scaled(images: Images) -> Images:
    """All classes, scaled by mean and deviation of the training images."""
    mean = images.train.images.mean((0, 2, 3), keepdim=True)
    deviation = images.train.images.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    train_split, test_split = (
        Split((part.images - mean) / deviation, part.labels) for part in (images.train, images.test)
    )
    return Images(images.name, train_split, test_split, images.classes)


def residual_network(images: Images) -> nn.Module:
    """Batch norm in train mode, ReLU and convolutions."""
    return ResidualNetwork(images.train.images.shape[1], images.classes, (16, 32, 64), (1, 1, 1))


def transformer(images: Images) -> nn.Module:
    """Layer norm, GELU and attention."""
    from transformers import ViTConfig, ViTForImageClassification

    _, channels, size, _ = images.train.images.shape
    config = ViTConfig(
        image_size=size,
        patch_size=4,
        num_channels=channels,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        num_labels=images.classes,
    )
    return Classifier(ViTForImageClassification(config))


NETWORKS: dict[str, tuple[Callable[[Images], nn.Module], Recipe]] = {
    "residual network": (residual_network, Recipe(3, 64, 0.05)),
    "vision transformer": (transformer, Recipe(3, 64, 0.02)),
}


def accuracy(name: str, context: Context) -> list[Row]:
    """Test accuracy from scratch with every companion quantized and no layer compressed, over paired seeds.

    A pair has the same start and the same batches in the same order.
    """
    images = scaled(load(context.data))
    make_network, recipe = NETWORKS[name]
    configs = {QUANTIZED: lance.LanceConfig(companions="quantized", target_modules=())}
    if name == "vision transformer":  # the two differ in activations' derivatives, of which the other network has none
        configs[SMALLEST] = lance.LanceConfig(companions="smallest", target_modules=())
    if context.quick:
        recipe = Recipe(1, 64, recipe.learning_rate)
        images = Images(images.name, Split(images.train.images[:256], images.train.labels[:256]), images.test, 10)
    found: dict[str, list[float]] = {PLAIN: [], **{method: [] for method in configs}}
    for seed in range(context.seed, context.seed + (2 if context.quick else SEEDS)):
        torch.manual_seed(seed)
        start = make_network(images)
        for method in found:
            model = copy.deepcopy(start)
            if method in configs:
                lance.compress_(model, configs[method])
            title = f"{name}, seed {seed}: {method}"
            found[method].append(train(model, images, recipe, seed, title, frozen_norms=False)[-1])
    details = {}
    for method in configs:
        mean, low, high = paired_interval(found[method], found[PLAIN])
        details[method] = {"difference": mean, "low": low, "high": high, "least": LEAST_POINTS}
    for method in found:
        details.setdefault(method, {})["by_seed"] = found[method]
    return context.rows(
        found,
        quantity="test accuracy",
        unit="%",
        details=details,
    )


def step(name: str, context: Context) -> list[Row]:
    """Time of a step with exact companions and cores of 4 and 32 bits, over plain and over each other."""
    count = 2 if context.quick else BATCH
    images, labels = images_for(context, count), torch.arange(count) % 10
    plain = prepared(name, images, "frozen")
    methods = {PLAIN: training_step(plain, images, labels)}
    for method, config in {DEFAULT: lance.LanceConfig(), FLOATS: lance.LanceConfig(core_bits=None)}.items():
        model = copy.deepcopy(plain)
        lance.compress_(model, config)
        lance.calibrate(model, [images], progress=False)
        methods[method] = training_step(frozen_norms(model), images, labels)
    effort = context.effort if context.quick else Effort(seconds=120.0, least_rounds=9, most_rounds=21, shortest=0.0)
    samples = interleave(methods, effort, seed=context.seed)
    rows = context.rows(samples, baseline=PLAIN, targets={DEFAULT: 0.9, FLOATS: 0.9})
    packing = context.rows(
        {method: samples[method] for method in (FLOATS, DEFAULT)},
        quantity="time over 32-bit cores",
        baseline=FLOATS,
        targets={DEFAULT: 1.03},
    )
    return rows + [row for row in packing if row.baseline is not None]


for _name in NETWORKS:
    SUITE.case(f"accuracy: {_name}, quantized companions")(partial(accuracy, _name))
for _name in ("ResNet-18", "MobileNetV2"):
    SUITE.case(f"step: {_name}, {SIZE}x{SIZE}, B={BATCH}")(partial(step, _name))
