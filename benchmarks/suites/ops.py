"""Suite `ops`: every operator beside its naive form and its counted floor, on inputs of 1 to 64 times a size.

The naive form is what plain PyTorch offers: the namesake where there is one, else the dense computation that the
operator saves. The floor is the larger of the bytes that have to be read and written over the speed of a copy, and the
counted operations over the speed of a matrix product; both speeds are measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.layers import CONV_64, CONV_512, LINEAR_192, Convolution, Linear, orthonormal
from benchmarks.methods.measure import DECOMPOSITIONS
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.suites.ops_tables import plot, tables
from benchmarks.timing import Effort, Method, interleave
from lance_kernels import ops

MULTIPLES = (1, 4, 16, 64)
OURS, NAIVE, FLOOR = "lance", "naive", "floor"
COPY, PRODUCT = "copy", "product"
SLOPE = 1.05

SUITE = register(
    Suite(
        "ops",
        "Operators beside their naive forms",
        "python -m benchmarks --suite ops --threads 1",
        tables=tables,
        plot=plot,
    )
)


@dataclass(frozen=True)
class Call:
    """One operator on one size of input.

    Attributes:
        ours: the operator.
        naive: the same by plain PyTorch.
        touched: bytes that have to be read or written.
        elements: of the input.
    """

    ours: Method
    naive: Method
    touched: int
    elements: int


def call(ours: Method, naive: Method, *inputs: torch.Tensor) -> Call:
    """A call whose result is read off once for its size; `inputs` are what has to be read, the largest first."""
    result = ours()
    outputs = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, torch.Tensor)]
    touched = sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
    return Call(ours, naive, touched, inputs[0].numel())


def mode_products(x: torch.Tensor, factors: list[torch.Tensor | None], transpose: bool) -> torch.Tensor:
    """One `tensordot` a mode."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            x = torch.tensordot(x, factor, dims=([mode], [0 if transpose else 1])).movedim(-1, mode)
    return x.contiguous()


def unfolded_gram(x: torch.Tensor, mode: int) -> torch.Tensor:
    """Product of a copied unfolding with itself."""
    unfolded = x.movedim(mode, 0).flatten(1).contiguous()
    return unfolded @ unfolded.mT


def of_convolution(name: str, layer: Convolution, multiple: int, seed: int) -> Call:
    """An operator of the convolution on a batch of `multiple`."""
    tensors = layer.with_batch(multiple).tensors(seed)
    x, factors, core = tensors.x, tensors.factors, tensors.project()
    stride, padding, dilation, groups = layer.geometry
    frozen = torch.rand(x.shape[1]), torch.rand(x.shape[1]) + 0.5
    patches = orthonormal(layer.in_channels * layer.kernel**2, 32, torch.Generator().manual_seed(seed))
    patch = [layer.kernel] * 2, stride, padding, dilation
    unfold = {"kernel_size": layer.kernel, "stride": layer.stride, "padding": layer.padding}
    patch_core = ops.patch_project(x, patches[None], *patch, groups)
    spatial = [None, None]
    size = list(tensors.weight.shape)

    def dense(x_hat: torch.Tensor) -> torch.Tensor:
        return torch.nn.grad.conv2d_weight(x_hat, tensors.weight.shape, tensors.grad, stride, padding)

    def naive_patch_gram() -> torch.Tensor:
        unfolded = functional.unfold(x, **unfold).transpose(0, 1).flatten(1)
        return unfolded @ unfolded.mT

    grams = [torch.zeros(extent, extent) for extent in x.shape[1:]]
    patch_gram = torch.zeros(1, *[patches.shape[0]] * 2)
    codes, window = ops.pack_core(x, 4), ([2, 2], [2, 2], [0, 0])
    rows = None, len(x), x.shape[1], [0, 1, 2, 3]
    table: dict[str, Callable[[], Call]] = {
        "tucker_project": lambda: call(
            lambda: ops.tucker_project(x, factors), lambda: mode_products(x, factors, True), x
        ),
        "tucker_reconstruct": lambda: call(
            lambda: ops.tucker_reconstruct(core, factors), lambda: mode_products(core, factors, False), core
        ),
        "mode_gram": lambda: call(lambda: ops.mode_gram(x, 1), lambda: unfolded_gram(x, 1), x),
        "mode_grams_": lambda: call(
            lambda: ops.mode_grams_(grams, x, [1, 2, 3]), lambda: [unfolded_gram(x, mode) for mode in (1, 2, 3)], x
        ),
        "pack_core": lambda: call(lambda: ops.pack_core(x, 4), lambda: _reference("pack_core", x, 4), x),
        "unpack_core": lambda: call(
            lambda: ops.unpack_core(codes, x.shape, 4, x.dtype),
            lambda: _reference("unpack_core", codes, x.shape, 4, x.dtype),
            codes,
        ),
        "convolution": lambda: call(
            lambda: ops.convolution(x, tensors.weight, None, stride, padding, dilation, groups, factors),
            lambda: (layer.plain_forward(tensors), mode_products(x, factors, True)),
            x,
            tensors.weight,
        ),
        "convolution_weight_grad": lambda: call(
            lambda: layer.weight_grad(tensors, core),
            lambda: dense(mode_products(core, factors, False)),
            tensors.grad,
            core,
        ),
        "patch_project": lambda: call(
            lambda: ops.patch_project(x, patches[None], *patch, groups),
            lambda: patches.mT @ functional.unfold(x, **unfold),
            x,
        ),
        "patch_gram_": lambda: call(lambda: ops.patch_gram_(patch_gram, x, *patch, groups), naive_patch_gram, x),
        "patch_weight_grad": lambda: call(
            lambda: ops.patch_weight_grad(tensors.grad, patch_core, patches[None], spatial, size, groups),
            lambda: torch.einsum("bon,bpn->op", tensors.grad.flatten(2), patches @ patch_core.flatten(2)),
            tensors.grad,
            patch_core,
        ),
        "relu": lambda: call(lambda: ops.relu(x), lambda: functional.relu(x), x),
        "hardtanh": lambda: call(lambda: ops.hardtanh(x), lambda: functional.hardtanh(x), x),
        "leaky_relu": lambda: call(lambda: ops.leaky_relu(x), lambda: functional.leaky_relu(x), x),
        "activation, gelu": lambda: call(lambda: ops.activation(x, "gelu"), lambda: functional.gelu(x), x),
        "dropout": lambda: call(lambda: ops.dropout(x, 0.5), lambda: functional.dropout(x, 0.5), x),
        "max_pool": lambda: call(lambda: ops.max_pool(x, *window, [1, 1]), lambda: functional.max_pool2d(x, 2), x),
        "avg_pool": lambda: call(lambda: ops.avg_pool(x, *window), lambda: functional.avg_pool2d(x, 2), x),
        "adaptive_avg_pool": lambda: call(
            lambda: ops.adaptive_avg_pool(x, [7, 7]), lambda: functional.adaptive_avg_pool2d(x, 7), x
        ),
        "batch_norm_frozen": lambda: call(
            lambda: ops.batch_norm_frozen(x, None, None, *frozen, 1e-5), lambda: functional.batch_norm(x, *frozen), x
        ),
        "quantize_rows": lambda: call(
            lambda: ops.quantize_rows(x, *rows), lambda: _reference("quantize_rows", x, *rows), x
        ),
    }  # fmt: skip
    return table[name]()


def of_linear(name: str, layer: Linear, multiple: int, seed: int) -> Call:
    """An operator of the linear layer on a batch of `multiple`."""
    tensors = layer.with_batch(multiple).tensors(seed)
    x, factors, core = tensors.x, tensors.factors, tensors.project()
    heads = x.unflatten(2, (3, -1)).transpose(1, 2).contiguous()
    table: dict[str, Callable[[], Call]] = {
        "linear": lambda: call(
            lambda: ops.linear(x, tensors.weight, None, factors),
            lambda: (layer.plain_forward(tensors), mode_products(x, factors, True)),
            x,
            tensors.weight,
        ),
        "linear_weight_grad": lambda: call(
            lambda: layer.weight_grad(tensors, core),
            lambda: tensors.grad.flatten(0, 1).mT @ mode_products(core, factors, False).flatten(0, 1),
            tensors.grad,
            core,
        ),
        "layer_norm": lambda: call(
            lambda: ops.layer_norm(x, [x.shape[2]]), lambda: functional.layer_norm(x, [x.shape[2]]), x
        ),
        "rms_norm": lambda: call(
            lambda: ops.rms_norm(x, [x.shape[2]]), lambda: functional.rms_norm(x, [x.shape[2]]), x
        ),
        "attention": lambda: call(
            lambda: ops.attention(heads, heads, heads),
            lambda: functional.scaled_dot_product_attention(heads, heads, heads),
            *[heads] * 3,
        ),
    }
    return table[name]()


def of_gram(multiple: int, seed: int) -> Call:
    """Eigenvectors of a Gram matrix of 32 rows at `multiple` 1, 256 at 64."""
    size = 32 * int(multiple**0.5)
    matrix = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed))
    gram = matrix @ matrix.mT
    return call(lambda: ops.gram_eigh(gram), lambda: torch.linalg.eigh(gram.double()), gram)


def _reference(name: str, *arguments: object) -> torch.Tensor:
    """The package's reference in plain PyTorch, which the compiled kernel replaces."""
    operator = getattr(torch.ops.lance, name).default
    return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd), *arguments)


def case(make: Callable[[int, int], Call], slope: bool, context: Context) -> list[Row]:
    """Time by size, its slope, and at the largest size the ratios to the naive form and to the floor."""
    multiples = MULTIPLES[:2] if context.quick else MULTIPLES
    calls = {multiple: make(multiple, context.seed) for multiple in multiples}
    largest = calls[multiples[-1]]
    source = torch.ones(min(max(largest.touched // 8, 2**10), 2**24))  # a copy that touches as much
    target, matrix = torch.empty_like(source), torch.ones(512, 512)
    timed: dict[str, Method] = {str(multiple): one.ours for multiple, one in calls.items()}
    timed |= {NAIVE: largest.naive, COPY: lambda: target.copy_(source), PRODUCT: lambda: matrix @ matrix}
    effort = context.effort if context.quick else Effort(seconds=4.0, least_rounds=5, most_rounds=30)
    samples = interleave(timed, effort, seed=context.seed)
    operations = _operations(largest.ours)
    copied, multiplied = 2 * source.numel() * 4, 2 * 512**3
    floors = [
        max(largest.touched / copied * copy, operations / multiplied * product)
        for copy, product in zip(samples[COPY], samples[PRODUCT])
    ]
    ours = samples[str(multiples[-1])]
    rows = context.rows({NAIVE: samples[NAIVE], OURS: ours}, baseline=NAIVE)
    rows += context.rows(
        {FLOOR: floors, OURS: ours},
        quantity="time over floor",
        baseline=FLOOR,
        details={FLOOR: {"bytes": largest.touched, "operations": operations}},
    )
    elements = [calls[multiple].elements for multiple in multiples]
    seconds = np.array([samples[str(multiple)] for multiple in multiples])
    found = np.polyfit(np.log(elements), np.log(seconds), 1)[0].tolist()
    detail = {"elements": elements, "seconds": np.median(seconds, axis=1).tolist()}
    return rows + context.rows(
        {OURS: found}, quantity="slope", unit="", targets={OURS: SLOPE if slope else None}, details={OURS: detail}
    )


def _operations(method: Method) -> int:
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS) as counter:
        method()
    return int(counter.get_total_flops())


def _register() -> None:
    small = ("convolution", "convolution_weight_grad", "patch_project", "patch_gram_", "patch_weight_grad")
    elementwise = (
        "tucker_project", "tucker_reconstruct", "mode_gram", "mode_grams_", "pack_core", "unpack_core", "relu",
        "hardtanh", "leaky_relu", "activation, gelu", "dropout", "max_pool", "avg_pool", "adaptive_avg_pool",
        "batch_norm_frozen", "quantize_rows",
    )  # fmt: skip
    for name in elementwise:
        SUITE.case(name)(partial(case, partial(of_convolution, name, CONV_64), True))
    for name in small:
        SUITE.case(name)(partial(case, partial(of_convolution, name, CONV_512), True))
    for name in ("linear", "linear_weight_grad", "layer_norm", "rms_norm", "attention"):
        SUITE.case(name)(partial(case, partial(of_linear, name, LINEAR_192), True))
    SUITE.case("gram_eigh")(partial(case, of_gram, False))


_register()
