"""The companions' operators: activations, masks, dropout, norms, pooling, attention, frozen weights, 8-bit rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from lance_kernels.ops._layout import from_order, in_order
from lance_kernels.ops.activation import KINDS, decode, unpack_pairs
from lance_kernels.ops.mask import condition, pack_bits, plain, unpack_bits
from tests.fuzz.drawing import (
    Draw,
    assert_close,
    floating,
    fuzzes,
    maybe,
    order_of,
    random_bytes,
    shape,
    values,
)
from tests.ops.cases import geometries

ops = torch.ops.lance


def any_tensor(draw: Draw) -> torch.Tensor:
    return values(draw, shape(draw), floating(draw))


def bounds(draw: Draw) -> tuple[float | None, float | None, float | None]:
    """Those of a ReLU, a clamp or a leaky ReLU."""
    return draw(st.sampled_from(((None, None, None), (-1.0, 1.0, None), (0.0, 6.0, None), (None, None, 0.01))))


fuzzes("relu", plain=torch.relu)(lambda draw: [any_tensor(draw)])
fuzzes("hardtanh", plain=F.hardtanh)(lambda draw: [any_tensor(draw), -0.5, draw(st.sampled_from((0.5, 2.0)))])
fuzzes("leaky_relu", plain=F.leaky_relu)(lambda draw: [any_tensor(draw), draw(st.sampled_from((0.01, 0.3)))])


def bits_in(order: list[int], mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The bits of a mask as a boolean tensor of the shape of `like`."""
    return from_order(unpack_bits(mask, like.numel()).view([like.shape[dim] for dim in order]), order)


def check_masked(result: Any, x: Any, low: Any, high: Any, slope: Any, order: list[int]) -> None:
    assert_close(result[0], plain(x, low, high, slope))
    assert torch.equal(bits_in(order, result[1], x), condition(x, low, high, slope))


@fuzzes("masked_activation", check_masked)
def _(draw: Draw) -> list[Any]:
    x = any_tensor(draw)
    return [x, *bounds(draw), order_of(draw, x)]


# Whether elements share memory, so that they cannot be written, is not known to tracing.
@fuzzes("masked_activation_", lambda result, *args: check_masked(result[::-1], *args), mutates=0, by_value=True)
def _(draw: Draw) -> list[Any]:
    x = any_tensor(draw).clone(memory_format=torch.preserve_format)
    return [x, *bounds(draw), order_of(draw, x)]


def check_masked_grad(result: Any, grad: Any, mask: Any, slope: Any, order: list[int]) -> None:
    kept = bits_in(order, mask, grad)
    assert_close(result, torch.where(kept, grad, torch.zeros_like(grad) if slope is None else grad * slope))


@fuzzes("masked_activation_grad", check_masked_grad)
def _(draw: Draw) -> list[Any]:
    grad = any_tensor(draw)
    return [grad, random_bytes((grad.numel() + 7) // 8), bounds(draw)[2], order_of(draw, grad)]


@fuzzes("pack_mask", lambda result, bits, order: check_pack_mask(result, bits, order))
def _(draw: Draw) -> list[Any]:
    bits = any_tensor(draw) > 0
    return [bits, order_of(draw, bits)]


def check_pack_mask(result: torch.Tensor, bits: torch.Tensor, order: list[int]) -> None:
    assert bits.dtype == torch.bool
    assert torch.equal(bits_in(order, result, bits), bits)


@fuzzes("unpack_mask", lambda result, mask, like, order: check_unpack_mask(result, mask, like, order))
def _(draw: Draw) -> list[Any]:
    like = any_tensor(draw)
    return [random_bytes((like.numel() + 7) // 8), like, order_of(draw, like)]


def check_unpack_mask(result: torch.Tensor, mask: torch.Tensor, like: torch.Tensor, order: list[int]) -> None:
    assert torch.equal(result, bits_in(order, mask, like))
    again = pack_bits(in_order(result, order))
    assert torch.equal(again[: like.numel() // 8], mask[: like.numel() // 8])


def kind_and_bits(draw: Draw) -> tuple[str, int]:
    return draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from((8, 4)))


@fuzzes("activation", plain=lambda x, kind, bits: KINDS[kind].forward(x), exact=False)
def _(draw: Draw) -> list[Any]:
    return [any_tensor(draw), *kind_and_bits(draw)]


def code_of(codes: torch.Tensor, like: torch.Tensor, bits: int, order: list[int]) -> torch.Tensor:
    flat = codes if bits == 8 else unpack_pairs(codes, like.numel())
    return from_order(flat.view([like.shape[dim] for dim in order]), order)


def check_codes(codes: Any, x: Any, kind: str, bits: int, order: list[int]) -> None:
    grid = KINDS[kind].grids[bits]
    found = decode(code_of(codes, x, bits, order), kind, bits, torch.float64)
    derivative = KINDS[kind].derivative(x.double())
    # At a jump of the derivative a rounded input may lie on the other side.
    jumps = (x.abs() - 3).abs() < 1e-3 if kind.startswith("hard") else torch.zeros_like(x, dtype=torch.bool)
    assert (((found - derivative).abs() <= 1.01 * grid.bound + 2e-6) | derivative.isnan() | jumps).all()
    assert torch.equal(found.isnan(), derivative.isnan())


@fuzzes("activation_codes", check_codes)
def _(draw: Draw) -> list[Any]:
    x = any_tensor(draw) * 3
    return [x, *kind_and_bits(draw), order_of(draw, x)]


def check_activation_grad(result: Any, grad: Any, codes: Any, kind: str, bits: int, order: list[int]) -> None:
    derivative = decode(code_of(codes, grad, bits, order), kind, bits, torch.float64)
    assert_close(result, grad.double() * derivative)


@fuzzes("activation_grad", check_activation_grad)
def _(draw: Draw) -> list[Any]:
    grad, (kind, bits) = any_tensor(draw), kind_and_bits(draw)
    return [grad, random_bytes((grad.numel() * bits + 7) // 8), kind, bits, order_of(draw, grad)]


def check_dropped(y: torch.Tensor, x: torch.Tensor, kept: torch.Tensor, p: float) -> None:
    assert 0 <= p < 1
    assert_close(y, torch.where(kept, x.double() / (1 - p), torch.zeros((), dtype=torch.float64)))


@fuzzes("dropout", lambda y, x, p: check_dropped(y, x, (y != 0) | (x == 0), p), random=True)
def _(draw: Draw) -> list[Any]:
    return [any_tensor(draw), draw(st.floats(0, 0.9))]


@fuzzes(
    "dropout_mask",
    lambda result, x, p, order: check_dropped(result[0], x, bits_in(order, result[1], x), p),
    random=True,
)
def _(draw: Draw) -> list[Any]:
    x = any_tensor(draw)
    return [x, draw(st.floats(0, 0.9)), order_of(draw, x)]


@fuzzes("dropout_grad", lambda result, grad, mask, p, order: check_dropped(result, grad, bits_in(order, mask, grad), p))
def _(draw: Draw) -> list[Any]:
    grad = any_tensor(draw)
    return [grad, random_bytes((grad.numel() + 7) // 8), draw(st.floats(0, 0.9)), order_of(draw, grad)]


def vectors(draw: Draw, channels: int, dtype: torch.dtype) -> list[Any]:
    """Weight, bias, running mean and variance."""
    dtype = dtype if draw(st.booleans()) else (torch.float64 if dtype == torch.float64 else torch.float32)
    weight, bias = (maybe(draw, lambda: torch.randn(channels).to(dtype)) for _ in range(2))
    return [weight, bias, torch.randn(channels).to(dtype), (torch.rand(channels) + 0.5).to(dtype)]


def images(draw: Draw) -> torch.Tensor:
    return values(draw, shape(draw, 2, 5, smallest=1), floating(draw))


def normalised(x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> torch.Tensor:
    wide = [None if vector is None else vector.double() for vector in (mean, var, weight, bias)]
    return F.batch_norm(x.double(), *wide, False, 0.0, eps)


def bounded(y: torch.Tensor, high: float | None) -> torch.Tensor:
    return torch.relu(y) if high is None else F.hardtanh(y, 0.0, high)


@fuzzes("batch_norm_frozen", plain=normalised)
def _(draw: Draw) -> list[Any]:
    x = images(draw)
    return [x, *vectors(draw, x.shape[1], x.dtype), 1e-5]


@fuzzes("batch_norm_relu_frozen", plain=lambda *args: bounded(normalised(*args[:-1]), args[-1]), exact=False)
def _(draw: Draw) -> list[Any]:
    x = images(draw)
    return [x, *vectors(draw, x.shape[1], x.dtype), 1e-5, draw(st.sampled_from((None, 6.0)))]


def check_relu_mask(result: Any, *args: Any) -> None:
    *first, high, order = args
    y, kept = normalised(*first), bits_in(order, result[1], args[0])
    assert_close(result[0], bounded(y, high))
    near = torch.minimum(y.abs(), (y - (high or 0.0)).abs()) < 1e-2 * (1 + y.abs())
    assert ((kept == condition(y, None if high is None else 0.0, high, None)) | near).all()


@fuzzes("batch_norm_relu_mask", check_relu_mask)
def _(draw: Draw) -> list[Any]:
    x = images(draw)
    return [x, *vectors(draw, x.shape[1], x.dtype), 1e-5, draw(st.sampled_from((None, 6.0))), order_of(draw, x)]


def scaled(grad: Any, weight: Any, var: Any, eps: float) -> torch.Tensor:
    factor = (var.double() + eps).rsqrt() * (1 if weight is None else weight.double())
    assert factor.shape == (grad.shape[1],)
    return grad.double() * factor.view(-1, *[1] * (grad.dim() - 2))


@fuzzes("batch_norm_frozen_grad", lambda result, *args: assert_close(result, scaled(*args[:-1])))
def _(draw: Draw) -> list[Any]:
    grad = images(draw)
    weight, _, _, var = vectors(draw, grad.shape[1], grad.dtype)
    return [grad, weight, var, 1e-5, order_of(draw, grad)]


def check_relu_grad(result: Any, grad: Any, mask: Any, weight: Any, var: Any, eps: float, order: list[int]) -> None:
    assert_close(result, scaled(torch.where(bits_in(order, mask, grad), grad, 0), weight, var, eps))


@fuzzes("batch_norm_relu_grad", check_relu_grad)
def _(draw: Draw) -> list[Any]:
    grad = images(draw)
    weight, _, _, var = vectors(draw, grad.shape[1], grad.dtype)
    return [grad, random_bytes((grad.numel() + 7) // 8), weight, var, 1e-5, order_of(draw, grad)]


def affine(draw: Draw, size: Any, dtype: torch.dtype, count: int = 2) -> list[Any]:
    return [maybe(draw, lambda: torch.randn(tuple(size)).to(dtype)) for _ in range(count)]


def rows(draw: Draw) -> tuple[torch.Tensor, list[int]]:
    x = values(draw, shape(draw, 1, smallest=1), floating(draw))
    return x, list(x.shape[draw(st.integers(0, x.dim() - 1)) :])


@fuzzes("layer_norm", plain=F.layer_norm, exact=False)
def _(draw: Draw) -> list[Any]:
    x, size = rows(draw)
    return [x, size, *affine(draw, size, x.dtype), 1e-5]


@fuzzes("rms_norm", plain=F.rms_norm, exact=False)
def _(draw: Draw) -> list[Any]:
    x, size = rows(draw)
    return [x, size, *affine(draw, size, x.dtype, 1), draw(st.sampled_from((None, 1e-3)))]


@fuzzes("group_norm", plain=torch.group_norm, exact=False)
def _(draw: Draw) -> list[Any]:
    groups, size = draw(st.sampled_from((1, 2, 3))), shape(draw, 1, 3, smallest=1)
    channels = groups * draw(st.integers(1, 3))
    x = values(draw, (size[0], channels, *size[1:]), floating(draw))
    return [x, groups, *affine(draw, (channels,), x.dtype), 1e-5]


def pooled(draw: Draw, adaptive: bool = False) -> list[Any]:
    """An image or volume, batched or not, and a window's numbers."""
    spatial = draw(st.sampled_from((2, 3)))
    samples, channels = draw(st.sampled_from(((), (1,), (2,), (0,)))), draw(st.integers(1, 3))
    x = values(draw, (*samples, channels, *(draw(st.integers(3, 7)) for _ in range(spatial))), floating(draw))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(spatial)]

    if adaptive:
        return [x, each(1, 6)]
    kernel = each(1, 3)
    return [x, kernel, each(1, 3), [draw(st.integers(0, size // 2)) for size in kernel]]


def plain_max_pool(x: Any, *numbers: Any) -> torch.Tensor:
    return (F.max_pool2d if len(numbers[0]) == 2 else F.max_pool3d)(x.contiguous(), *numbers)


def plain_avg_pool(x: Any, *numbers: Any) -> torch.Tensor:
    return (F.avg_pool2d if len(numbers[0]) == 2 else F.avg_pool3d)(x, *numbers)


def plain_adaptive(x: Any, size: Any) -> torch.Tensor:
    return (F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d)(x, size)


def max_pool(draw: Draw) -> list[Any]:
    x, *window = pooled(draw)
    return [x, *window, [draw(st.integers(1, 2)) if size > 1 else 1 for size in window[0]], draw(st.booleans())]


def fitting_max_pool(draw: Draw) -> list[Any]:
    """Dilated windows inside the padded image."""
    x, kernel, stride, padding, dilation, ceil_mode = max_pool(draw)
    sizes = x.shape[-len(kernel) :]
    dilation = [
        gap if size + 2 * pad > gap * (taps - 1) else 1
        for size, taps, pad, gap in zip(sizes, kernel, padding, dilation)
    ]
    return [x, kernel, stride, padding, dilation, ceil_mode]


fuzzes("max_pool", plain=plain_max_pool)(fitting_max_pool)


def positions(offsets: Any, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> torch.Tensor:
    """Flat input positions of window offsets."""
    remaining, flat, inner = offsets.long(), torch.zeros_like(offsets, dtype=torch.int64), 1
    for dim in reversed(range(len(size))):
        place = torch.arange(offsets.shape[offsets.dim() - len(size) + dim]) * stride[dim] - padding[dim]
        taken = remaining % kernel[dim] * dilation[dim] + place.view([-1] + [1] * (len(size) - 1 - dim))
        remaining, flat, inner = remaining // kernel[dim], flat + taken * inner, inner * size[dim]
    return flat


def check_offsets(result: Any, x: Any, *numbers: Any) -> None:
    y, offsets = result
    spatial = len(numbers[0])
    assert torch.equal(y, plain_max_pool(x, *numbers))
    flat = positions(offsets, x.shape[-spatial:], *numbers[:-1])
    assert torch.equal(x.flatten(-spatial).gather(-1, flat.flatten(-spatial)), y.flatten(-spatial))


fuzzes("max_pool_offsets", check_offsets)(fitting_max_pool)


def check_pool_grad(result: Any, grad: Any, offsets: Any, size: Any, *numbers: Any) -> None:
    flat = positions(offsets, size, *numbers[:-1]).flatten(-len(size))
    image = torch.zeros((*grad.shape[: -len(size)], *size), dtype=torch.float64).flatten(-len(size))
    image.scatter_add_(-1, flat, grad.double().flatten(-len(size)))
    assert_close(result, image.view(result.shape), factor=4)


@fuzzes("max_pool_grad", check_pool_grad, by_value=True)
def _(draw: Draw) -> list[Any]:
    x, *numbers = fitting_max_pool(draw)
    y, offsets = ops.max_pool_offsets(x, *numbers)
    return [values(draw, y.shape, x.dtype), offsets, list(x.shape[-len(numbers[0]) :]), *numbers]


@fuzzes("avg_pool", plain=plain_avg_pool)
def _(draw: Draw) -> list[Any]:
    divisor = draw(st.sampled_from((None, 3)))
    return [*pooled(draw), draw(st.booleans()), draw(st.booleans()), divisor]


fuzzes("adaptive_avg_pool", plain=plain_adaptive)(lambda draw: pooled(draw, adaptive=True))


def check_rows(result: Any, x: Any, center: Any, outer: int, count: int, order: list[int]) -> None:
    codes, steps = result
    assert codes.shape == (x.numel(),)
    assert steps.shape == (count,)
    if not x.numel():
        return
    # Memory is read as (outer, rows, inner).
    flat = in_order(x, order).reshape(outer, count, -1).double()
    deviation = flat if center is None else flat - center.double()[:, None]
    largest = deviation.abs().amax((0, 2))
    assert_close(steps, largest / 127, factor=10)
    error = (codes.view(deviation.shape).double() * steps.double()[:, None] - deviation).abs()
    assert (error <= 0.501 * steps.double()[:, None] + 1e-30).all()


def row_numbers(draw: Draw, x: torch.Tensor) -> tuple[list[int], int, int]:
    """An order of dimensions, and where in it rows begin and end."""
    order = order_of(draw, x)
    begin = draw(st.integers(0, x.dim()))
    end = draw(st.integers(begin, x.dim()))
    sizes = [x.shape[dim] for dim in order]
    return order, torch.Size(sizes[:begin]).numel(), torch.Size(sizes[begin:end]).numel()


@fuzzes("quantize_rows", check_rows)
def _(draw: Draw) -> list[Any]:
    x = any_tensor(draw)
    order, outer, count = row_numbers(draw, x)
    return [x, maybe(draw, lambda: torch.randn(count).to(x.dtype)), outer, count, order]


def check_restored(result: Any, codes: Any, steps: Any, outer: int, like: Any, order: list[int]) -> None:
    assert result.dtype == like.dtype
    if not like.numel():
        assert result.shape == like.shape
        return
    flat = codes.view(outer, steps.shape[0], -1).double() * steps.double()[:, None]
    assert_close(result, from_order(flat.view([like.shape[dim] for dim in order]), order))


@fuzzes("dequantize_rows", check_restored)
def _(draw: Draw) -> list[Any]:
    like = any_tensor(draw)
    order, outer, count = row_numbers(draw, like)
    codes = torch.randint(-127, 128, (like.numel(),), dtype=torch.int8)
    return [codes, torch.rand(count), outer, like, order]


def plain_attention(query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Any:
    return F.scaled_dot_product_attention(query, key, value, mask, p, causal, scale=scale, enable_gqa=gqa)


@fuzzes("attention", plain=plain_attention, exact=False, random=True)
def _(draw: Draw) -> list[Any]:
    dtype, leading = floating(draw), draw(st.sampled_from(((), (2,), (2, 3), (1, 2, 2))))
    length, others, width, out = (draw(st.integers(1, 5)) for _ in range(4))
    query = values(draw, (*leading, length, width), dtype)
    key, value = values(draw, (*leading, others, width), dtype), values(draw, (*leading, others, out), dtype)
    mask = draw(st.sampled_from((None, torch.bool, dtype)))
    if mask is not None:
        mask = torch.randn(length, others).to(dtype) if mask == dtype else torch.rand(length, others) < 0.8
    causal = mask is None and draw(st.booleans())
    return [query, key, value, mask, 0.0, causal, draw(st.sampled_from((None, 0.7))), False]


def plain_frozen(x: Any, weight: Any, bias: Any, *numbers: Any) -> torch.Tensor:
    return torch.ops.aten.convolution(x, weight, bias, *numbers)


@fuzzes("frozen_convolution", plain=plain_frozen)
def _(draw: Draw) -> list[Any]:
    geometry, dtype, transposed = draw(geometries()), floating(draw), draw(st.booleans())
    spatial = len(geometry.spatial)
    outputs, _, *kernel = geometry.weight_size
    size = (geometry.channels, outputs // geometry.groups, *kernel) if transposed else geometry.weight_size
    bias = maybe(draw, lambda: torch.randn(outputs).to(dtype))
    x, weight = values(draw, geometry.input_size, dtype), values(draw, size, dtype)
    padding = geometry.padding[:spatial]
    return [x, weight, bias, geometry.stride, padding, geometry.dilation, transposed, [0] * spatial, geometry.groups]
