"""The operators around cores: Tucker products, Gram matrices, layers, weight gradients, packing, patches."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from lance_kernels.ops._checks import accumulation_dtype
from lance_kernels.ops.convolution import Geometry as OperatorGeometry
from lance_kernels.ops.linear import kept_factors
from lance_kernels.ops.pack_core import packed_bytes
from lance_kernels.ops.patch import patches_of
from lance_kernels.ops.patch_convolution import kept_patch_factors
from tests.fuzz.drawing import Draw, assert_close, floating, fuzzes, maybe, shape, values
from tests.ops.cases import Geometry, cast, dense, factored, geometries

ops = torch.ops.lance
BITS = st.sampled_from((0, 8, 4, 2, 1))


def factors_for(draw: Draw, size: list[int], dtype: torch.dtype) -> list[torch.Tensor | None]:
    return cast(draw(factored(tuple(size))), dtype)


def check_core(core: torch.Tensor, x: torch.Tensor, factors: list[Any], bits: int) -> None:
    kept = kept_factors(factors, x.dtype)
    if bits:
        assert torch.equal(core, ops.pack_core(ops.tucker_project(x, kept), bits))
    else:
        assert core.dtype == x.dtype
        assert_close(core, dense(x, kept))


def check_product(reconstruct: bool) -> Any:
    def check(result: torch.Tensor, x: torch.Tensor, factors: list[Any]) -> None:
        assert result.dtype == x.dtype
        assert result.is_contiguous()
        assert_close(result, dense(x, factors, transpose=not reconstruct))

    return check


@fuzzes("tucker_project", check_product(False))
def _(draw: Draw) -> list[Any]:
    x = values(draw, shape(draw), floating(draw))
    return [x, factors_for(draw, x.shape, floating(draw))]


@fuzzes("tucker_reconstruct", check_product(True))
def _(draw: Draw) -> list[Any]:
    size = shape(draw)
    factors = factors_for(draw, size, floating(draw))
    return [values(draw, [s if f is None else f.shape[1] for s, f in zip(size, factors)], floating(draw)), factors]


def unfolded_gram(x: torch.Tensor, mode: int) -> torch.Tensor:
    unfolded = x.double().movedim(mode, 0).reshape(x.shape[mode], x.numel() // max(x.shape[mode], 1))
    return unfolded @ unfolded.mT


@fuzzes("mode_gram", lambda result, x, mode: assert_close(result, unfolded_gram(x, mode)))
def _(draw: Draw) -> list[Any]:
    x = values(draw, shape(draw, 1), floating(draw))
    return [x, draw(st.integers(-x.dim(), x.dim() - 1))]


def check_grams(result: Any, grams: list[torch.Tensor], x: torch.Tensor, modes: list[int]) -> None:
    for after, gram, mode in zip(result[1], grams, modes, strict=True):
        # Sums are kept in the dtype of `x`, but at least in float32, whatever the running ones are.
        assert_close(after.to(accumulation_dtype(x.dtype)), gram.double() + unfolded_gram(x, mode))


@fuzzes("mode_grams_", check_grams, mutates=0)
def _(draw: Draw) -> list[Any]:
    x = values(draw, shape(draw, 1), floating(draw))
    modes = draw(st.lists(st.integers(0, x.dim() - 1), unique=True, max_size=x.dim()))
    wide = torch.float64 if x.dtype == torch.float64 else draw(st.sampled_from((torch.float32, torch.float64)))
    return [[torch.randn(x.shape[mode], x.shape[mode], dtype=wide) for mode in modes], x, modes]


def check_eigh(result: Any, gram: torch.Tensor) -> None:
    eigenvalues, vectors = (part.double() for part in result)
    symmetric = (gram.double() + gram.double().mT) / 2
    assert (eigenvalues >= 0).all()
    assert (eigenvalues.diff() <= 0).all()
    positive = torch.linalg.eigvalsh(symmetric).flip(0).clamp_min(0)
    assert_close(result[0], positive, factor=10)
    identity = torch.eye(gram.shape[0], dtype=torch.float64)
    assert_close(vectors.mT.to(gram.dtype) @ vectors.to(gram.dtype), identity)
    rayleigh = torch.einsum("ij,ik,kj->j", vectors, symmetric, vectors).clamp_min(0)
    assert_close(rayleigh.to(gram.dtype), positive, factor=10)


@fuzzes("gram_eigh", check_eigh, by_value=True)
def _(draw: Draw) -> list[Any]:
    size = draw(st.integers(0, 6))
    root = torch.randn(size, draw(st.integers(1, 6)), dtype=draw(st.sampled_from((torch.float32, torch.float64))))
    return [root @ root.mT]


def layer(draw: Draw) -> tuple[list[Any], list[torch.Tensor | None]]:
    x = values(draw, shape(draw, 1), floating(draw))
    outputs = draw(st.integers(1, 4))
    weight = values(draw, (outputs, x.shape[-1]), x.dtype)
    bias = maybe(draw, lambda: values(draw, (outputs,), x.dtype))
    return [x, weight, bias], factors_for(draw, x.shape, floating(draw))


def check_linear(result: Any, x: torch.Tensor, weight: Any, bias: Any, factors: list[Any], bits: int) -> None:
    assert torch.equal(result[0], torch.nn.functional.linear(x, weight, bias))
    check_core(result[1], x, factors, bits)


@fuzzes("linear", check_linear)
def _(draw: Draw) -> list[Any]:
    tensors, factors = layer(draw)
    return [*tensors, factors, draw(BITS)]


def check_linear_given_core(y: torch.Tensor, x: torch.Tensor, weight: Any, bias: Any, *rest: Any) -> None:
    core, factors, bits = rest
    made = ops.linear(x, weight, bias, factors, bits)
    assert torch.equal(y, made[0])
    assert core.shape == made[1].shape
    assert core.dtype == made[1].dtype


@fuzzes("linear_given_core", check_linear_given_core)
def _(draw: Draw) -> list[Any]:
    tensors, factors = layer(draw)
    bits = draw(BITS)
    return [*tensors, ops.linear(*tensors, factors, bits)[1], factors, bits]


def check_linear_weight_grad(result: torch.Tensor, grad: torch.Tensor, core: torch.Tensor, factors: list[Any]) -> None:
    x_hat = dense(core, factors, transpose=False)
    rows = grad.shape[:-1].numel()
    assert x_hat.shape[:-1] == grad.shape[:-1]
    product = grad.double().reshape(rows, grad.shape[-1]).mT @ x_hat.reshape(rows, x_hat.shape[-1])
    assert_close(result, product, factor=5)


def linear_weight_grad(draw: Draw) -> list[Any]:
    (x, weight, _), factors = layer(draw)
    grad = values(draw, (*x.shape[:-1], weight.shape[0]), x.dtype)
    return [grad, ops.tucker_project(x, factors), factors]


fuzzes("linear_weight_grad", check_linear_weight_grad)(linear_weight_grad)


def check_linear_weight_bias_grad(result: Any, grad: torch.Tensor, core: torch.Tensor, factors: list[Any]) -> None:
    check_linear_weight_grad(result[0], grad, core, factors)
    rows = grad.shape[:-1].numel()
    assert_close(result[1], grad.double().reshape(rows, grad.shape[-1]).sum(0), factor=5)


fuzzes("linear_weight_bias_grad", check_linear_weight_bias_grad)(linear_weight_grad)


@fuzzes("pack_core", lambda result, core, bits: check_packed(result, core, bits))
def _(draw: Draw) -> list[Any]:
    return [values(draw, shape(draw), floating(draw)), draw(st.sampled_from((8, 4, 2, 1)))]


def check_packed(packed: torch.Tensor, core: torch.Tensor, bits: int) -> None:
    back = ops.unpack_core(packed, list(core.shape), bits, torch.float32).reshape(-1)
    flat = core.float().reshape(-1)
    if not flat.numel() or not flat.isfinite().all():
        return
    # Half a step: that of the group's largest magnitude, rounded up by at most an eighth of an octave.
    for group, restored in zip(flat.split(16), back.split(16)):
        step = 2 ** (1 / 8) * group.abs().max() / (2 ** (bits - 1) - 1)
        assert (group - restored).abs().max() <= 0.501 * step + flat.abs().max() * 2.0**-31


def check_unpacked(result: torch.Tensor, packed: torch.Tensor, size: list[int], bits: int, dtype: Any) -> None:
    assert result.dtype == dtype
    assert list(result.shape) == list(size)
    assert packed.numel() == packed_bytes(size, bits)
    wide = ops.unpack_core(packed, size, bits, torch.float64)
    torch.testing.assert_close(result, wide.to(dtype), rtol=0.02, atol=1e-6, equal_nan=True)


@fuzzes("unpack_core", check_unpacked)
def _(draw: Draw) -> list[Any]:
    size, bits = shape(draw), draw(st.sampled_from((8, 4, 2, 1)))
    packed = ops.pack_core(torch.randn(size), bits)
    return [packed, size, bits, floating(draw)]


def drawn_convolution(draw: Draw) -> tuple[Geometry, list[Any]]:
    geometry = draw(geometries())
    dtype = floating(draw)
    bias = maybe(draw, lambda: values(draw, (geometry.outputs,), dtype))
    return geometry, [values(draw, geometry.input_size, dtype), values(draw, geometry.weight_size, dtype), bias]


def plain_convolution(x: Any, weight: Any, bias: Any, *numbers: Any) -> torch.Tensor:
    stride, padding, dilation, groups, mode = numbers
    spatial = tuple(x.shape[2:])
    geometry = Geometry(
        x.shape[0],
        x.shape[1],
        spatial,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride,
        padding,
        dilation,
        groups,
        mode,
    )
    return geometry.convolve(x, weight, bias)


def check_convolution(result: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> None:
    *numbers, factors, bits, mode = rest
    assert_close(result[0], plain_convolution(x, weight, bias, *numbers, mode))
    check_core(result[1], x, factors, bits)


@fuzzes("convolution", check_convolution)
def _(draw: Draw) -> list[Any]:
    geometry, tensors = drawn_convolution(draw)
    factors = factors_for(draw, geometry.input_size, floating(draw))
    return [*tensors, *geometry.arguments, factors, draw(BITS), geometry.mode]


def check_convolution_given_core(y: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> None:
    *numbers, core, factors, bits, mode = rest
    made = ops.convolution(x, weight, bias, *numbers, factors, bits, mode)
    assert torch.equal(y, made[0])
    assert core.shape == made[1].shape
    assert core.dtype == made[1].dtype


@fuzzes("convolution_given_core", check_convolution_given_core)
def _(draw: Draw) -> list[Any]:
    geometry, tensors = drawn_convolution(draw)
    factors, bits = factors_for(draw, geometry.input_size, floating(draw)), draw(BITS)
    core = ops.convolution(*tensors, *geometry.arguments, factors, bits, geometry.mode)[1]
    return [*tensors, *geometry.arguments, core, factors, bits, geometry.mode]


def check_convolution_weight_grad(
    result: Any, grad: Any, core: Any, factors: Any, weight_size: Any, *rest: Any
) -> None:
    weight = torch.zeros(weight_size, dtype=torch.float64, requires_grad=True)
    y = plain_convolution(dense(core, factors, transpose=False), weight, None, *rest)
    assert_close(result, torch.autograd.grad(y, weight, grad.double())[0], factor=5)


@fuzzes("convolution_weight_grad", check_convolution_weight_grad)
def convolution_weight_grad(draw: Draw) -> list[Any]:
    geometry, (x, weight, _) = drawn_convolution(draw)
    factors = factors_for(draw, geometry.input_size, floating(draw))
    y = geometry.convolve(x, weight, None)
    core = ops.tucker_project(x, factors)
    return [
        values(draw, y.shape, x.dtype),
        core,
        factors,
        list(geometry.weight_size),
        *geometry.arguments,
        geometry.mode,
    ]


def check_convolution_weight_bias_grad(result: Any, grad: Any, *arguments: Any) -> None:
    check_convolution_weight_grad(result[0], grad, *arguments)
    assert_close(result[1], grad.double().sum([0, *range(2, grad.dim())]), factor=5)


fuzzes("convolution_weight_bias_grad", check_convolution_weight_bias_grad)(convolution_weight_grad)


def patch_numbers(geometry: Geometry) -> list[Any]:
    return [list(geometry.kernel), *geometry.arguments, geometry.mode]


def patch_factor(draw: Draw, geometry: Geometry) -> torch.Tensor:
    size = geometry.channels // geometry.groups
    for taps in geometry.kernel:
        size *= taps
    rank = draw(st.integers(1, size))
    return values(draw, (geometry.groups, size, rank), floating(draw))


def projected_patches(x: Any, factor: Any, kernel: Any, *numbers: Any) -> torch.Tensor:
    filters = factor.double().mT.reshape(-1, x.shape[1] // numbers[3], *kernel)
    assert list(factor.shape[:2]) == [numbers[3], filters[0].numel()]
    return plain_convolution(x.double(), filters, None, *numbers)


@fuzzes("patch_project", lambda result, *args: assert_close(result, projected_patches(*args), factor=5))
def _(draw: Draw) -> list[Any]:
    geometry, (x, _, _) = drawn_convolution(draw)
    return [x, patch_factor(draw, geometry), *patch_numbers(geometry)]


def check_patch_gram(result: Any, gram: Any, x: Any, kernel: Any, *numbers: Any) -> None:
    patches = patches_of(x.double(), kernel, OperatorGeometry.of(*numbers))
    assert_close(result[1].to(accumulation_dtype(x.dtype)), gram.double() + patches @ patches.mT)


@fuzzes("patch_gram_", check_patch_gram, mutates=0)
def _(draw: Draw) -> list[Any]:
    geometry, (x, _, _) = drawn_convolution(draw)
    size = patch_factor(draw, geometry).shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else draw(st.sampled_from((torch.float32, torch.float64)))
    return [torch.randn(geometry.groups, size, size, dtype=wide), x, *patch_numbers(geometry)]


def spatial_factors(draw: Draw, size: Any) -> list[torch.Tensor | None]:
    return factors_for(draw, list(size), floating(draw))


def check_patch_weight_grad(
    result: Any, grad: Any, core: Any, factor: Any, spatial: Any, size: Any, groups: int
) -> None:
    whole = dense(core, [None, None, *spatial], transpose=False)
    samples, rank = whole.shape[0], factor.shape[2]
    grouped = whole.reshape(samples, groups, rank, -1)
    split = grad.double().reshape(samples, groups, size[0] // groups, -1)
    assert grad.shape[2:] == whole.shape[2:]
    product = torch.einsum("gir,bgrs,bgos->goi", factor.double(), grouped, split)
    assert_close(result, product.reshape(size), factor=10)


@fuzzes("patch_weight_grad", check_patch_weight_grad)
def _(draw: Draw) -> list[Any]:
    geometry, (x, weight, _) = drawn_convolution(draw)
    factor = patch_factor(draw, geometry)
    y = geometry.convolve(x, weight, None)
    spatial = spatial_factors(draw, y.shape[2:])
    core = ops.patch_project(x, factor, *patch_numbers(geometry))
    core = ops.tucker_project(core, [None, None, *spatial])
    return [values(draw, y.shape, x.dtype), core, factor, spatial, list(geometry.weight_size), geometry.groups]


def check_patch_convolution(result: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> None:
    *numbers, factor, spatial, bits, mode = rest
    assert_close(result[0], plain_convolution(x, weight, bias, *numbers, mode))
    factor, spatial = kept_patch_factors(factor, spatial, x.dtype)
    core = ops.patch_project(x, factor, list(weight.shape[2:]), *numbers, mode)
    core = ops.tucker_project(core, [None, None, *spatial])
    assert torch.equal(result[1], ops.pack_core(core, bits) if bits else core)


@fuzzes("patch_convolution", check_patch_convolution)
def _(draw: Draw) -> list[Any]:
    geometry, tensors = drawn_convolution(draw)
    y = geometry.convolve(*tensors)
    factor = patch_factor(draw, geometry)
    return [
        *tensors,
        *geometry.arguments,
        factor,
        spatial_factors(draw, y.shape[2:]),
        draw(BITS),
        geometry.mode,
    ]
