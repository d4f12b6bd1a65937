"""The cases of the GPU suite: ceilings, kernels against their floors, steps against dense and published layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from benchmarks.gpu import layers, shapes
from benchmarks.gpu.device import copies_for, host_times, measure
from benchmarks.gpu.shapes import DeviceTensors
from benchmarks.layers import Convolution, Layer, Linear
from benchmarks.registry import Context, Suite
from benchmarks.results import Row
from lance_kernels import ops
from lance_kernels.kernels.convolution_weight_grad import convolution_weight_grads, costs_for
from lance_kernels.ops.convolution import Geometry

OURS, DENSE, PUBLISHED, COMPILED = "lance", "dense", "published", "published, compiled"
BF16 = torch.bfloat16

SUITE = Suite(
    "gpu", "Kernels and layers on a GPU", "make gpu GPU_ARGS=--models", devices=("cuda", "cpu")
)  # not registered: it writes a file a device


def _time(
    context: Context,
    methods: Mapping[str, layers.Step],
    copies: list[DeviceTensors],
    *,
    floor: float | None = None,
    share: float | None = None,
    baseline: str | None = None,
    targets: dict[str, float | None] | None = None,
) -> list[Row]:
    """Rows of times; `share` is the least part of a method's time that the floor may be."""
    rounds, seconds = (3, 0.0) if context.quick else (40, 3.0)
    samples = measure(methods, copies, context.device, rounds=rounds, seconds=seconds, seed=context.seed)
    rows = context.rows(
        samples,
        baseline=baseline,
        targets=targets,
        details={name: {"copies": len(copies)} for name in samples},
    )
    if floor is None or share is None:
        return rows
    over = {OURS: [value / floor for value in samples[OURS]]}
    return rows + context.rows(
        over,
        quantity="time over floor",
        unit="",
        targets={OURS: 1 / share},
        details={OURS: {"floor": floor}},
    )


def _copies(layer: Layer, context: Context, channels_last: bool = False) -> tuple[Layer, list[DeviceTensors]]:
    layer = shapes.small(layer) if context.quick else layer
    first = shapes.tensors(layer, context.device, BF16, context.seed, channels_last)
    streamed = min(first.x.nbytes, first.grad.nbytes)
    count = 1 if context.quick else copies_for(streamed)
    more = [
        shapes.tensors(layer, context.device, BF16, context.seed + index, channels_last) for index in range(1, count)
    ]
    return layer, [first, *more]


def bandwidth(context: Context) -> list[Row]:
    """Bytes read and written a second by a copy on the device."""
    count = 2**20 if context.quick else 2**31
    source = torch.ones(count, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    rounds = 3 if context.quick else 20
    # In a graph, copies do not run at full speed.
    methods = {"copy": lambda _: target.copy_(source)}
    samples = measure(methods, [None], context.device, rounds=rounds, seconds=2.0, short=0.0)
    values = {"copy": [2 * count / seconds for seconds in samples["copy"]]}
    return _rates(context, values, "bandwidth", "B/s")


def products(context: Context) -> list[Row]:
    """Operations a second of a large bfloat16 product."""
    size = 64 if context.quick else 8192
    left, right = (torch.randn(size, size, device=context.device, dtype=BF16) for _ in range(2))
    rounds = 3 if context.quick else 20
    samples = measure({"product": lambda _: left @ right}, [None], context.device, rounds=rounds, seconds=2.0)
    values = {"product": [2 * size**3 / seconds for seconds in samples["product"]]}
    return _rates(context, values, "rate", "FLOP/s")


def _rates(context: Context, values: dict[str, list[float]], quantity: str, unit: str) -> list[Row]:
    return context.rows(values, quantity=quantity, unit=unit, seed=None)


def projection(layer: Layer, share: float, channels_last: bool, context: Context) -> list[Row]:
    """The core of an input, and the published layer's way to it."""
    layer, copies = _copies(layer, context, channels_last)
    methods: dict[str, layers.Step] = {
        OURS: DeviceTensors.project,
        PUBLISHED: DeviceTensors.published_project,
    }
    return _time(context, methods, copies, floor=shapes.projection_floor(layer, 2), share=share)


def linear_weight_grad(layer: Layer, share: float, context: Context) -> list[Row]:
    """Weight and bias gradients from the core."""
    layer, copies = _copies(layer, context)
    cores = {id(tensors): tensors.project() for tensors in copies}

    def ours(tensors: DeviceTensors) -> object:
        return torch.ops.lance.linear_weight_bias_grad(tensors.grad, cores[id(tensors)], tensors.factors)

    return _time(context, {OURS: ours}, copies, floor=shapes.weight_grad_floor(layer, 2), share=share)


def convolution_weight_grad(
    layer: Convolution, share: float, over_dense: float, channels_last: bool, context: Context
) -> list[Row]:
    """The weight gradient from the core, over the library's."""
    small, copies = _copies(layer, context, channels_last)
    assert isinstance(small, Convolution)
    cores = {id(tensors): tensors.project() for tensors in copies}
    methods: dict[str, layers.Step] = {
        DENSE: layers.dense_weight_grad(small),
        OURS: lambda tensors: small.weight_grad(tensors, cores[id(tensors)]),
    }
    floor = shapes.weight_grad_floor(small, 2)
    return _time(context, methods, copies, floor=floor, share=share, baseline=DENSE, targets={OURS: over_dense})


def ways(layer: Convolution, channels_last: bool, context: Context) -> list[Row]:
    """Weight and bias gradient by each way there is for the shape, over the library's, to set the cost model by."""
    small, copies = _copies(layer, context, channels_last)
    assert isinstance(small, Convolution)
    cores = {id(tensors): tensors.project() for tensors in copies}
    weight, geometry = list(copies[0].weight.shape), Geometry.of(*small.geometry)
    cost = costs_for(copies[0].grad, cores[id(copies[0])], copies[0].factors, weight, geometry)

    def run(way: str, tensors: DeviceTensors) -> object:
        core = cores[id(tensors)]
        return convolution_weight_grads(tensors.grad, core, tensors.factors, weight, geometry, True, way)

    there = [way for way in cost._fields if getattr(cost, way) < math.inf and context.device == "cuda"]
    methods: dict[str, layers.Step] = {DENSE: layers.dense_weight_grad(small, with_bias=True)}
    rows = _time(context, methods | {way: partial(run, way) for way in there}, copies, baseline=DENSE)
    expected = {way: [getattr(cost, way)] for way in there}
    return rows + context.rows(expected, quantity="time that the model expects")


def step(layer: Layer, over_dense: float, channels_last: bool, context: Context) -> list[Row]:
    """Forward pass and the gradients of input, weight and bias, over dense."""
    layer, copies = _copies(layer, context, channels_last)
    methods = {DENSE: layers.with_gradients(layers.dense(layer)), OURS: layers.with_gradients(layers.ours(layer))}
    leaves = [layers.trainable(tensors) for tensors in copies]
    return _time(context, methods, leaves, baseline=DENSE, targets={OURS: over_dense})


def host(layer: Layer, context: Context) -> list[Row]:
    """The host's time of a small layer's step, which a GPU that is faster waits for, over dense."""
    layer = shapes.small(layer)
    leaves = layers.trainable(shapes.tensors(layer, context.device, BF16, context.seed))
    methods = {DENSE: layers.with_gradients(layers.dense(layer)), OURS: layers.with_gradients(layers.ours(layer))}
    samples = host_times(methods, leaves, context.device, rounds=3 if context.quick else 20)
    return context.rows(samples, quantity="host time", baseline=DENSE)


def over_published(layer: Linear, method: str, target: float, context: Context) -> list[Row]:
    """The same step over the published layer's, eager or compiled."""
    small, copies = _copies(layer, context)
    forward: layers.Step = layers.published_linear
    if method == COMPILED:
        forward = torch.compile(forward, backend="aot_eager" if context.quick else "inductor")
    methods = {method: layers.with_gradients(forward), OURS: layers.with_gradients(layers.ours(small))}
    leaves = [layers.trainable(tensors) for tensors in copies]
    return _time(context, methods, leaves, baseline=method, targets={OURS: target})


def riding(layer: Linear, context: Context) -> list[Row]:
    """Forward pass and core, the projection a kernel of its own or riding along the forward product."""
    _, copies = _copies(layer, context)
    methods: dict[str, layers.Step] = {
        OURS: lambda tensors: ops.linear(tensors.x, tensors.weight, tensors.bias, tensors.factors),
        "factor appended to the weight": layers.riding,
    }
    return _time(context, methods, copies, baseline=OURS)


def accuracy(layer: Layer, context: Context) -> list[Row]:
    """Error of a bfloat16 result against float64, over that of unfused PyTorch with float32 intermediates."""
    layer, copies = _copies(layer if context.quick else layer.with_batch(2), context)
    tensors = copies[0]
    core = tensors.project()
    wide = replace(
        tensors,
        grad=tensors.grad.double(),
        x=tensors.x.double(),
        factors=[None if factor is None else factor.double() for factor in tensors.factors],
    )
    single = replace(wide, grad=tensors.grad.float(), x=tensors.x.float(), factors=tensors.factors)
    allowed, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "ieee"
    unfused_core, unfused_grad = single.published_project(), layer.published_weight_grad(single, core.float())
    torch.backends.cuda.matmul.fp32_precision = allowed
    values = {}
    for name, ours, exact, unfused in (
        ("projection", core, wide.project(), unfused_core.to(BF16)),
        (
            "weight gradient",
            layer.weight_grad(tensors, core),
            layer.weight_grad(wide, core.double()),
            unfused_grad.to(BF16),
        ),
    ):
        error, other = ((result.double() - exact).norm() for result in (ours, unfused))
        values[name] = [float(error / other)]
    return context.rows(
        values, quantity="error over unfused PyTorch's", unit="", targets=dict.fromkeys(values, 1.5), seed=None
    )


def _register() -> None:
    def add(name: str, run: Callable[[Context], list[Row]]) -> None:
        SUITE.case(name)(run)

    add("ceiling: copy", bandwidth)
    add("ceiling: product", products)
    for layer, share in ((shapes.WIDE, 0.85), (shapes.IMAGE_56, 0.75), (shapes.IMAGE_14, 0.75)):
        add(f"projection: {layer.name}", partial(projection, layer, share, False))
        if isinstance(layer, Convolution):
            add(f"projection, channels last: {layer.name}", partial(projection, layer, share, True))
    add(f"linear weight gradient: {shapes.WIDE.name}", partial(linear_weight_grad, shapes.WIDE, 0.80))
    for layer, over_dense in ((shapes.CONV_28, 0.80), (shapes.CONV_7, 0.80)):
        for last, words in ((False, ""), (True, ", channels last")):
            grads = partial(convolution_weight_grad, layer, 0.6, 0.35, last)
            add(f"convolution weight gradient{words}: {layer.name}", grads)
            add(f"convolution step{words}: {layer.name}", partial(step, layer, over_dense, last))
    for layer in (shapes.CONV_28, shapes.CONV_7, shapes.CONV_14, shapes.POINT_14, shapes.CONV_56):
        add(f"ways: {layer.name}", partial(ways, layer, False))
        add(f"ways, channels last: {layer.name}", partial(ways, layer, True))
    for layer, over_dense in ((shapes.STEP_WIDE, 0.71), (shapes.STEP_MIDDLE, 0.80), (shapes.STEP_NARROW, 0.90)):
        add(f"linear step: {layer.name}", partial(step, layer, over_dense, False))
    for layer, words in ((shapes.STEP_NARROW, "linear"), (shapes.CONV_28, "convolution")):
        add(f"host time of a step: {words}", partial(host, layer))
    for method, target in ((PUBLISHED, 0.6), (COMPILED, 0.8)):
        run = partial(over_published, shapes.STEP_WIDE, method, target)
        add(f"linear step over {method}: {shapes.STEP_WIDE.name}", run)
    add(f"projection riding along: {shapes.STEP_WIDE.name}", partial(riding, shapes.STEP_WIDE))
    for layer in (shapes.WIDE, shapes.CONV_28, shapes.CONV_7):
        add(f"accuracy: {layer.name}", partial(accuracy, layer))


_register()
