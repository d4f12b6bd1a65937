"""Suite `cpu`: single layers on the processor, float32, the batch mode kept; every row has a target for its ratio."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from benchmarks.layers import CONV_64, CONV_256, CONV_512, LAYERS, LINEAR_192, LINEAR_768, Layer, Linear, Tensors
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.suites import cpu_tables
from benchmarks.timing import Effort, Method, interleave
from lance_kernels import ops

DENSE, OURS, PUBLISHED, PLAIN = "dense", "lance", "published", "plain"
WEIGHT_GRAD_TARGETS = {layer.name: 0.15 if layer in (CONV_512, CONV_256, LINEAR_768) else 0.20 for layer in LAYERS}
STEP_TARGETS = {
    layer.name: 0.60 if layer is CONV_512 else 0.73 if layer in (CONV_256, LINEAR_768) else 0.78 for layer in LAYERS
}
PROJECTION_TARGET, PUBLISHED_TARGET, GROWTH_TARGET = 0.35, 0.5, 1.05
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
FILL = "fill of a new tensor"
LayerMeasure = Callable[[Layer, Context], list[Row]]

SUITE = register(
    Suite(
        name="cpu",
        title="Weight gradients through the core on the processor",
        command="python -m benchmarks --suite cpu",
        tables=cpu_tables.tables,
        plot=cpu_tables.plot,
    )
)


def weight_grad(layer: Layer, context: Context) -> list[Row]:
    """Projection plus weight gradient, and each alone, against the dense weight gradient."""
    tensors = layer.tensors(context.seed)
    core = tensors.project()
    methods = {
        DENSE: lambda: layer.dense_weight_grad(tensors),
        OURS: lambda: layer.weight_grad(tensors, tensors.project()),
        "lance, projection alone": tensors.project,
        "lance, weight gradient alone": lambda: layer.weight_grad(tensors, core),
    }
    return _compare(context, methods, DENSE, {OURS: WEIGHT_GRAD_TARGETS.get(context.case.split(": ", 1)[1])})


def whole_step(layer: Layer, context: Context) -> list[Row]:
    """Forward pass and the gradients of input and weight, plain and with the core kept."""
    tensors = layer.tensors(context.seed)
    methods = {PLAIN: tensors.step(layer.plain_forward), OURS: tensors.step(layer.forward)}
    return _compare(context, methods, PLAIN, {OURS: STEP_TARGETS.get(context.case.split(": ", 1)[1])})


def projection(layer: Layer, context: Context) -> list[Row]:
    """The core by the operator and by the published layer's way, a clone and one `tensordot` a mode."""
    tensors = layer.tensors(context.seed)
    methods = {PUBLISHED: tensors.published_project, OURS: tensors.project}
    return _compare(context, methods, PUBLISHED, {OURS: PROJECTION_TARGET})


def against_published(layer: Layer, context: Context) -> list[Row]:
    """Projection plus weight gradient by the operators and by the published layer's contractions.

    For a linear layer the published order forms the whole input again once the batch mode is kept; the same
    contractions with the feature factor last are measured beside it.
    """
    tensors = layer.tensors(context.seed)
    methods = {
        PUBLISHED: lambda: layer.published_weight_grad(tensors, tensors.published_project()),
        OURS: lambda: layer.weight_grad(tensors, tensors.project()),
    }
    if isinstance(layer, Linear):
        methods["published, features last"] = lambda: layer.published_weight_grad(
            tensors, tensors.published_project(), features_last=True
        )
    return _compare(context, methods, PUBLISHED, {OURS: PUBLISHED_TARGET})


def _compare(
    context: Context, methods: Mapping[str, Method], baseline: str, targets: dict[str, float | None]
) -> list[Row]:
    return context.rows(
        interleave(methods, context.effort, seed=context.seed),
        baseline=baseline,
        targets=targets,
    )


def growth(kernel: str, layer: Layer, context: Context) -> list[Row]:
    """Log-log slope of an operator's time over the elements of its input, by the batch from 1 to 64 times.

    The slope is fitted within each round, so its spread tells how far it can be trusted. Filling a new tensor of the
    input's size is measured too: it is the floor of what returns one, and above 32 MiB, where glibc stops reusing
    memory, it pays for fresh pages at every call.
    """
    multiples = MULTIPLES[:3] if context.quick else MULTIPLES
    elements, methods = [], {}
    for multiple in multiples:
        tensors = layer.with_batch(multiple).tensors(context.seed)
        elements.append(tensors.x.numel())
        methods[str(multiple)] = _kernel(kernel, layer, tensors)
    effort = context.effort if context.quick else Effort(seconds=10.0, least_rounds=5, shortest=0.02)
    samples = interleave(methods, effort, seed=context.seed)
    seconds = np.array([samples[str(multiple)] for multiple in multiples])  # (sizes, rounds)
    slopes = np.polyfit(np.log(elements), np.log(seconds), 1)[0]
    return context.rows(
        {OURS: slopes.tolist()},
        quantity="slope",
        unit="",
        targets={OURS: None if kernel == FILL else GROWTH_TARGET},
        details={OURS: {"elements": elements, "seconds": np.median(seconds, axis=1).tolist()}},
    )


def _kernel(name: str, layer: Layer, tensors: Tensors) -> Method:
    """A call of one operator."""
    x, factors, core = tensors.x, tensors.factors, tensors.project()
    modes = list(range(1, x.dim()))
    grams = [torch.zeros(x.shape[mode], x.shape[mode]) for mode in modes]
    return {
        FILL: lambda: torch.empty_like(x).fill_(1.0),
        "tucker_project": lambda: ops.tucker_project(x, factors),
        "tucker_reconstruct": lambda: ops.tucker_reconstruct(core, factors),
        "mode_gram": lambda: ops.mode_gram(x, 1),
        "mode_grams_": lambda: ops.mode_grams_(grams, x, modes),
        "pack_core": lambda: ops.pack_core(x, 4),
        "linear_weight_grad": lambda: layer.weight_grad(tensors, core),
        "convolution_weight_grad": lambda: layer.weight_grad(tensors, core),
        "linear": lambda: layer.forward(tensors),
        "convolution": lambda: layer.forward(tensors),
    }[name]


def _register_layers() -> None:
    for question, measure in (
        ("weight gradient", weight_grad),
        ("whole step", whole_step),
        ("projection", projection),
        ("over published", against_published),
    ):
        for layer in LAYERS:

            def run(context: Context, layer: Layer = layer, measure: LayerMeasure = measure) -> list[Row]:
                return measure(layer.with_batch(2) if context.quick else layer, context)

            SUITE.case(f"{question}: {layer.name}")(run)


def _register_growth() -> None:
    kernels: dict[Layer, tuple[str, ...]] = {
        CONV_64: ("tucker_project", "tucker_reconstruct", FILL, "mode_gram", "mode_grams_", "pack_core"),
        CONV_512: ("convolution_weight_grad", "convolution"),
        LINEAR_192: ("tucker_project", "mode_grams_", "linear_weight_grad", "linear"),
    }
    for layer, names in kernels.items():
        for name in names:

            def run(context: Context, name: str = name, layer: Layer = layer) -> list[Row]:
                return growth(name, layer, context)

            SUITE.case(f"growth: {name}, {layer.name.split(', ')[0]}")(run)


_register_layers()
_register_growth()
