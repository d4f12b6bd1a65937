"""Suite `memory`: what a training step of a model really holds, plain PyTorch beside every way of holding less."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import lance_kernels as lance
from benchmarks.data import load
from benchmarks.methods.recompute import checkpoint_blocks, compile_with_budget
from benchmarks.models import MODELS, Classifier, frozen_norms, natural_images
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.suites.memory_tables import plot, tables

PLAIN = "plain"
BATCH, SIZE = 16, 224
SUITE = register(
    Suite(
        "memory",
        "Memory: what a training step holds",
        "python -m benchmarks --suite memory --data PATH",
        tables=tables,
        plot=plot,
    )
)


@dataclass(frozen=True)
class Form:
    """One way to hold less.

    Attributes:
        config: how to compress; None leaves the layers plain.
        least: what plain over this form should be at least, or None.
        prepare: a change to the model, by which it holds less without being compressed.
    """

    config: lance.LanceConfig | None = None
    least: float | None = None
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model


OURS = "lance, exact companions, energy 0.7, 32 bits"
DEFAULT = "lance, default"


def frozen_forms(at_32_bits: float, by_default: float, at_4_bits: float) -> dict[str, Form]:
    """The forms of a convolution network whose batch norms are frozen."""
    return {
        "checkpointed by block": Form(prepare=checkpoint_blocks),
        "published, no companions": Form(lance.LanceConfig.published(0.7)),
        OURS: Form(lance.LanceConfig(energy=0.7, core_bits=None), at_32_bits),
        DEFAULT: Form(lance.LanceConfig(), by_default),
        "lance, energy 0.7, 4 bits": Form(lance.LanceConfig(energy=0.7), at_4_bits),
    }


def transformer_forms(exact: float | None, in_8_bits: float, smallest: float | None) -> dict[str, Form]:
    """The forms of a transformer."""
    forms = {
        "checkpointed by block": Form(prepare=checkpoint_blocks),
        "lance, exact companions": Form(lance.LanceConfig(), exact),
        "lance, 8-bit companions": Form(lance.LanceConfig(companions="quantized"), in_8_bits),
    }
    if smallest is not None:
        config = lance.LanceConfig(companions="smallest")
        forms["lance, 4-bit derivatives"] = Form(config, smallest)
    return forms


def images_for(context: Context, count: int) -> torch.Tensor:
    """Images enlarged to 224x224 from the data file, or images with the spectrum of photographs without one."""
    size = 64 if context.quick else SIZE
    if context.data is None:
        return natural_images(count, size, context.seed)
    images = load(context.data).train.images[:count]
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    return interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def prepared(name: str, images: torch.Tensor, norms: str) -> Classifier:
    """A model that does not fade: variance-keeping start, batch norm's statistics from the images, no dropout.

    Args:
        name: of the model.
        images: for the statistics.
        norms: "frozen" or "train".
    """
    model = MODELS[name]()
    convolutional = not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and convolutional:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        model(images)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return frozen_norms(model) if norms == "frozen" else model


def implied_bytes(model: nn.Module, images: torch.Tensor, counted: int) -> int:
    """Cores, and what section 4's table implies for the rest of a network with frozen batch norms.

    One bit an element for ReLU and ReLU6, one byte an output element for max pooling. A batch norm's two vectors are
    its own parameters and buffers, which no count here includes.
    """
    total = counted

    def add(module: nn.Module, args: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ReLU | nn.ReLU6):
            total += math.ceil(output.numel() / 8)
        elif isinstance(module, nn.MaxPool2d):
            total += output.numel()

    handles = [module.register_forward_hook(add) for module in model.modules()]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return total


def held_case(name: str, norms: str, forms: dict[str, Form], context: Context) -> list[Row]:
    """Bytes held by autograd, and the gradient cosine, for every form of a model."""
    count = 2 if context.quick else BATCH
    everything = images_for(context, 3 * count)
    images, labels = everything[:count], torch.arange(count) % 10
    start = prepared(name, everything[:count], norms)

    def loss(output: torch.Tensor) -> torch.Tensor:
        return cross_entropy(output, labels)

    held = {PLAIN: float(lance.held_bytes(start, images, loss))}
    cosines, details, above = {}, {}, {}
    for method, form in forms.items():
        model = copy.deepcopy(start)
        if form.config is not None:
            lance.compress_(model, form.config)
            lance.calibrate(model, [everything[count : 2 * count], everything[2 * count :]], progress=False)
        model = form.prepare(model)
        held[method] = float(lance.held_bytes(model, images, loss))
        details[method] = {}
        if form.config is not None:
            cosines[method], counted = _compare(model, images, loss)
            details[method]["counted_bytes"] = counted
            if method == OURS and norms == "frozen":
                above[method] = held[method] / implied_bytes(model, images, counted)
    make = partial(context.rows, seed=None)
    rows = make(
        {method: [value] for method, value in held.items()},
        quantity="held bytes",
        unit="B",
        seed=context.seed,
        baseline=PLAIN,
        targets={method: 1 / form.least for method, form in forms.items() if form.least is not None},
        details=details,
    )
    rows += make(
        {method: [value] for method, value in cosines.items()}, quantity="gradient cosine", unit="", seed=context.seed
    )
    return rows + make(
        {method: [value] for method, value in above.items()},
        quantity="held over implied",
        unit="",
        seed=context.seed,
        targets=dict.fromkeys(above, 1.1),
    )


def _compare(model: nn.Module, images: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, int]:
    """Mean gradient cosine over the compressed layers, and their counted bytes."""
    result = lance.report(model, images, loss)
    return float(result.gradient_cosine or 1.0), result.counted_bytes


def _register() -> None:
    def add(name: str, norms: str, title: str, forms: dict[str, Form]) -> None:
        SUITE.case(f"held: {name}{title}")(lambda context: held_case(name, norms, forms, context))

    budget = {"compiled, activation budget 0.5": Form(prepare=compile_with_budget)}
    add("ResNet-18", "frozen", ", frozen batch norm", {**frozen_forms(35, 36, 40), **budget})
    add("MobileNetV2", "frozen", ", frozen batch norm", frozen_forms(60, 60, 75))
    add("ResNet-50", "frozen", ", frozen batch norm", frozen_forms(45, 46, 54))
    trained = {
        "lance, exact companions": Form(lance.LanceConfig(), 1.9),
        "lance, 8-bit companions": Form(lance.LanceConfig(companions="quantized"), 5.5),
    }
    add("ResNet-18", "train", ", batch norm in train mode", trained)
    add("DeiT-Tiny", "train", "", transformer_forms(1.5, 5.5, 8.0))
    add("Swin-Tiny", "train", "", transformer_forms(None, 6.0, None))


_register()
