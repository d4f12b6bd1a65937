"""Smooth activations that keep their derivative in 8 or 4 bits.

The derivative of each activation lies in a short fixed interval, so it is rounded to the nearest of evenly spaced
values, among them 0 and 1 exactly (where it has them): `code = round(derivative * steps) + zero`, and backward
multiplies the gradient with `(code - zero) / steps`. The highest code stands for NaN. `derivative_bound` gives the
largest error of the derivative. Few-bit derivatives are from Novikov et al., arXiv 2202.00441, there unevenly spaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lance_kernels.ops._checks import accumulation_dtype, check, check_floating
from lance_kernels.ops._layout import check_order, empty_in_order, from_order, in_order, memory_order
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    not_differentiable,
    once_differentiable,
    register_triton,
)

Function = Callable[[torch.Tensor], torch.Tensor]


class Grid(NamedTuple):
    """Evenly spaced values of a derivative.

    Attributes:
        steps: values a unit.
        zero: code of the value 0.
        bound: largest distance of a derivative to its value: half a step, or what the ends cut off.
    """

    steps: int
    zero: int
    bound: float


class Kind(NamedTuple):
    """One activation: its forward, its derivative (of float32 or float64) and the values by number of bits."""

    forward: Function
    derivative: Function
    grids: dict[int, Grid]


def _gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    # At infinity the second term is 0 times infinity.
    tail = torch.where(x.isinf(), 0.0, x * density)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + tail


def _gelu_tanh_derivative(x: torch.Tensor) -> torch.Tensor:
    slope, cubic = math.sqrt(2 / math.pi), 0.044715
    # Beyond 10 the derivative is 0 or 1 in every dtype; the clamp keeps infinity out of the products.
    x = x.clamp(-10, 10)
    t = torch.tanh(slope * (x + cubic * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope * (1 + 3 * cubic * x * x)


def _silu_derivative(x: torch.Tensor) -> torch.Tensor:
    # Beyond 100 the derivative is 0 or 1 in every dtype but float64, there to 1e-41.
    x = x.clamp(-100, 100)
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _hardswish_derivative(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).where(~x.isnan(), x)


def _sigmoid_derivative(x: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _tanh_derivative(x: torch.Tensor) -> torch.Tensor:
    t = torch.tanh(x)
    return 1 - t * t


def _hardsigmoid_derivative(x: torch.Tensor) -> torch.Tensor:
    return torch.where((x > -3) & (x < 3), 1 / 6, 0.0)


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _quick_gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    return _silu_derivative(1.702 * x)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


# Extreme derivatives: GELU -0.1290 and 1.1290 (at -+1.4142), its tanh form the same to 1e-4, SiLU -0.0999 and 1.0999.
KINDS: dict[str, Kind] = {
    "gelu": Kind(F.gelu, _gelu_derivative, {8: Grid(200, 26, 1 / 400), 4: Grid(11, 1, 1 / 22)}),
    "gelu_tanh": Kind(_gelu_tanh, _gelu_tanh_derivative, {8: Grid(200, 26, 1 / 400), 4: Grid(11, 1, 1 / 22)}),
    "silu": Kind(F.silu, _silu_derivative, {8: Grid(210, 21, 1 / 420), 4: Grid(12, 1, 1 / 24)}),
    "quick_gelu": Kind(_quick_gelu, _quick_gelu_derivative, {8: Grid(210, 21, 1 / 420), 4: Grid(12, 1, 1 / 24)}),
    "hardswish": Kind(F.hardswish, _hardswish_derivative, {8: Grid(126, 63, 1 / 252), 4: Grid(7, 3, 1 / 14)}),
    "sigmoid": Kind(torch.sigmoid, _sigmoid_derivative, {8: Grid(1016, 0, 1 / 2032), 4: Grid(56, 0, 1 / 112)}),
    "tanh": Kind(torch.tanh, _tanh_derivative, {8: Grid(254, 0, 1 / 508), 4: Grid(14, 0, 1 / 28)}),
    "hardsigmoid": Kind(F.hardsigmoid, _hardsigmoid_derivative, {8: Grid(6, 0, 0.0), 4: Grid(6, 0, 0.0)}),
}


def activation(x: torch.Tensor, kind: str, bits: int = 8) -> torch.Tensor:
    """An activation that keeps its derivative in few bits.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.
        kind: "gelu", "gelu_tanh", "silu", "quick_gelu" (`x sigmoid(1.702 x)`), "hardswish", "sigmoid", "tanh" or
            "hardsigmoid".
        bits: 8 or 4, a derivative.

    Returns:
        Shape and dtype of `x`; values equal ATen's. The gradient differs by at most `|grad| derivative_bound(kind,
        bits)`, and by rounding to its dtype. At infinity the derivative is its limit, where ATen's GELU and SiLU give
        NaN; at NaN it is NaN.

    Raises:
        RuntimeError: the kind, the number of bits or the dtype is unknown.
    """
    y: torch.Tensor = torch.ops.lance.activation(x, kind, bits)
    return y


def activation_of(function: Function, x: torch.Tensor, kind: str, bits: int = 8) -> torch.Tensor:
    """`activation` whose values a function computes that writes the same activation in its own way.

    Args:
        function: computes the values; nothing of it is recorded.
        x: any shape and strides, float32, float64, bfloat16 or float16, requiring a gradient.
        kind: one of `activation`'s kinds.
        bits: 8 or 4, a derivative.

    Returns:
        `function(x)`, with the gradient of `activation`.
    """
    check_kind("activation", x, kind, bits)
    y: torch.Tensor = apply(_Activation, x, kind, bits, function)
    return y


def derivative_bound(kind: str, bits: int) -> float:
    """Largest error of the derivative that `activation` keeps.

    Args:
        kind: one of `activation`'s kinds.
        bits: 8 or 4.
    """
    return KINDS[kind].grids[bits].bound


def check_kind(operator: str, tensor: torch.Tensor, kind: str, bits: int) -> None:
    """Refuses a dtype, kind or number of bits that there is not."""
    check_floating(operator, "x" if operator != "activation_grad" else "grad", tensor)
    check(kind in KINDS, lambda: f"lance::{operator}: kind is {kind!r}; expected one of {', '.join(KINDS)}")
    check(bits in (4, 8), lambda: f"lance::{operator}: bits is {bits}; expected 8 or 4")


def derivative_codes(x: torch.Tensor, kind: str, bits: int) -> torch.Tensor:
    """One code an element, uint8, of the derivative at `x`."""
    grid = KINDS[kind].grids[bits]
    derivative = KINDS[kind].derivative(x.to(accumulation_dtype(x.dtype)))
    missing = 2**bits - 1
    codes = (torch.round(derivative * grid.steps) + grid.zero).clamp(0, missing - 1)
    return torch.where(codes.isnan(), missing, codes).to(torch.uint8)


def decode(codes: torch.Tensor, kind: str, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The derivatives that codes stand for."""
    grid = KINDS[kind].grids[bits]
    values = (codes.to(dtype) - grid.zero) / grid.steps
    return torch.where(codes == 2**bits - 1, torch.nan, values)


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes a byte, the first in the low half."""
    flat = F.pad(codes.reshape(-1), (0, codes.numel() % 2)).view(-1, 2)
    return flat[:, 0] | (flat[:, 1] << 4)


def unpack_pairs(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """Undoes `pack_pairs`."""
    return torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1)[:numel]


def code_bytes(x: torch.Tensor, bits: int) -> int:
    """Bytes that the codes of `x` take."""
    return x.numel() if bits == 8 else (x.numel() + 1) // 2


def _codes(x: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    codes = derivative_codes(in_order(x, order), kind, bits).reshape(-1)
    return codes if bits == 8 else pack_pairs(codes)


def _grad(grad: torch.Tensor, codes: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    flat = in_order(grad, order)
    whole = (codes if bits == 8 else unpack_pairs(codes, flat.numel())).view(flat.shape)
    dtype = accumulation_dtype(grad.dtype)
    return from_order((flat * decode(whole, kind, bits, dtype)).to(grad.dtype), order)


def codes_reference(x: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Reference of `lance::activation_codes`."""
    check_kind("activation_codes", x, kind, bits)
    check_order("activation_codes", x, order)
    return _codes(x, kind, bits, order)


def _codes_fake(x: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    check_kind("activation_codes", x, kind, bits)
    check_order("activation_codes", x, order)
    return x.new_empty([code_bytes(x, bits)], dtype=torch.uint8)


def check_codes(grad: torch.Tensor, codes: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> None:
    """Refuses codes that are not those of a tensor of the shape of `grad`."""
    check_kind("activation_grad", grad, kind, bits)
    check_order("activation_grad", grad, order)
    check(
        codes.dtype == torch.uint8 and codes.dim() == 1 and codes.shape[0] == code_bytes(grad, bits),
        lambda: (
            f"lance::activation_grad: codes has dtype {codes.dtype} and shape {tuple(codes.shape)}; expected "
            f"torch.uint8 and {(code_bytes(grad, bits),)}, {bits} bits an element of {tuple(grad.shape)}"
        ),
    )


def grad_reference(grad: torch.Tensor, codes: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    """Reference of `lance::activation_grad`."""
    check_codes(grad, codes, kind, bits, order)
    return _grad(grad, codes, kind, bits, order)


def _grad_fake(grad: torch.Tensor, codes: torch.Tensor, kind: str, bits: int, order: Sequence[int]) -> torch.Tensor:
    check_codes(grad, codes, kind, bits, order)
    return empty_in_order(grad, order)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: str, bits: int, function: Function) -> torch.Tensor:
        order = memory_order(x)
        # The result is ATen's, so that it has ATen's bits.
        y = function(x)
        if torch.compiler.is_compiling():
            codes = _codes(x, kind, bits, order)
        else:
            codes = torch.ops.lance.activation_codes(x, kind, bits, order)
        ctx.save_for_backward(codes)
        ctx.kind, ctx.bits, ctx.order = kind, bits, order
        return y

    @staticmethod
    @once_differentiable("activation")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (codes,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return _grad(grad, codes, ctx.kind, ctx.bits, ctx.order), None, None, None
        return torch.ops.lance.activation_grad(grad, codes, ctx.kind, ctx.bits, ctx.order), None, None, None


def _activation_reference(x: torch.Tensor, kind: str, bits: int = 8) -> torch.Tensor:
    check_kind("activation", x, kind, bits)
    return KINDS[kind].forward(x)


def _activation_fake(x: torch.Tensor, kind: str, bits: int = 8) -> torch.Tensor:
    check_kind("activation", x, kind, bits)
    return torch.empty_like(x)


def _activation_autograd(x: torch.Tensor, kind: str, bits: int = 8) -> torch.Tensor:
    if needs_grad(x):
        check_kind("activation", x, kind, bits)
        y: torch.Tensor = apply(_Activation, x, kind, bits, KINDS[kind].forward)
        return y
    with below_autograd():
        return activation(x, kind, bits)


define(
    "activation_codes(Tensor x, str kind, int bits, int[] order) -> Tensor",
    reference=codes_reference,
    fake=_codes_fake,
    autograd=not_differentiable("activation_codes"),
)
define(
    "activation_grad(Tensor grad, Tensor codes, str kind, int bits, int[] order) -> Tensor",
    reference=grad_reference,
    fake=_grad_fake,
    autograd=not_differentiable("activation_grad"),
)
define(
    "activation(Tensor x, str kind, int bits=8) -> Tensor",
    reference=_activation_reference,
    fake=_activation_fake,
    autograd=_activation_autograd,
)
register_triton("activation_codes", file="activation")
register_triton("activation_grad", file="activation")
