"""Piecewise linear activations that keep one bit an element: `relu`, `hardtanh` (ReLU6 with it) and `leaky_relu`.

Their derivative takes two values, so backward needs to know only on which side of its bounds an element fell. The bits
lie in the memory order of the input, eight to a byte, lowest bit first.

ATen's own gradient at NaN depends on the code path for `hardtanh` (zero in its vectorised CPU loop, passed on in the
scalar tail and on CUDA); here NaN always passes the gradient on, as for `relu`. `leaky_relu` scales it, as ATen does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lance_kernels.ops._checks import check, check_floating
from lance_kernels.ops._layout import check_order, empty_in_order, from_order, in_order, memory_order
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    not_differentiable,
    once_differentiable,
    register_triton,
    written,
)


def relu(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)`, keeping 1 bit an element for backward.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.

    Returns:
        Shape and dtype of `x`; values and gradient equal `torch.relu`'s bit for bit.
    """
    y: torch.Tensor = torch.ops.lance.relu(x)
    return y


def hardtanh(x: torch.Tensor, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """`min(max(x, low), high)`, keeping 1 bit an element for backward.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.
        low: lower bound.
        high: upper bound, at least `low`.

    Returns:
        Shape and dtype of `x`; values and gradient equal `torch.nn.functional.hardtanh`'s bit for bit, but for the
        gradient at NaN (see the module's note).
    """
    y: torch.Tensor = torch.ops.lance.hardtanh(x, low, high)
    return y


def leaky_relu(x: torch.Tensor, slope: float = 0.01) -> torch.Tensor:
    """`x` where positive, else `slope * x`, keeping 1 bit an element for backward.

    Args:
        x: any shape and strides, float32, float64, bfloat16 or float16.
        slope: factor below zero.

    Returns:
        Shape and dtype of `x`; values and gradient equal `torch.nn.functional.leaky_relu`'s bit for bit.
    """
    y: torch.Tensor = torch.ops.lance.leaky_relu(x, slope)
    return y


def relu_(x: torch.Tensor) -> torch.Tensor:
    """`relu` in place; returns `x`."""
    return _in_place(x, None, None, None)


def hardtanh_(x: torch.Tensor, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """`hardtanh` in place; returns `x`."""
    return _in_place(x, low, high, None)


def leaky_relu_(x: torch.Tensor, slope: float = 0.01) -> torch.Tensor:
    """`leaky_relu` in place; returns `x`.

    Raises:
        RuntimeError: `slope` is negative, as in `torch.nn.functional.leaky_relu_` whose gradient is then not defined.
    """
    check(
        slope >= 0 or not (torch.is_grad_enabled() and x.requires_grad),
        f"lance::leaky_relu_: slope is {slope}; in place it has to be at least 0 (the sign of the result decides)",
    )
    return _in_place(x, None, None, slope)


def check_bounds(operator: str, x: torch.Tensor, low: float | None, high: float | None) -> None:
    """Refuses a dtype that is not floating, and bounds that leave nothing between them."""
    check_floating(operator, "x", x)
    check(
        low is None or high is None or low <= high,
        lambda: f"lance::{operator}: low is {low} and high {high}; expected low to be at most high",
    )


def plain(x: torch.Tensor, low: float | None, high: float | None, slope: float | None) -> torch.Tensor:
    """ATen's forward of the activation: a leaky ReLU where `slope` is given, ReLU where nothing is, else a clamp."""
    if slope is not None:
        return F.leaky_relu(x, slope)
    return torch.relu(x) if low is None or high is None else F.hardtanh(x, low, high)


def condition(x: torch.Tensor, low: float | None, high: float | None, slope: float | None) -> torch.Tensor:
    """The bits as a boolean tensor: whether the derivative at `x` is one."""
    if slope is not None:
        return x > 0
    if low is None or high is None:
        return ~(x <= 0)
    return ~((x <= low) | (x >= high))


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """Packs a contiguous boolean tensor into `ceil(numel / 8)` bytes, lowest bit first."""
    flat = F.pad(bits.reshape(-1).to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: torch.Tensor, numel: int) -> torch.Tensor:
    """Undoes `pack_bits`: a boolean tensor of `numel` elements."""
    bits = (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.reshape(-1)[:numel].to(torch.bool)


def check_bits(bits: torch.Tensor, order: Sequence[int]) -> None:
    """Refuses bits that are not bool, and an order that does not fit them."""
    check_order("pack_mask", bits, order)
    check(bits.dtype == torch.bool, lambda: f"lance::pack_mask: bits has dtype {bits.dtype}; expected torch.bool")


def pack_mask_reference(bits: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Reference of `lance::pack_mask`."""
    check_bits(bits, order)
    return pack_bits(in_order(bits, order))


def _pack_mask_fake(bits: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    check_bits(bits, order)
    return bits.new_empty([(bits.numel() + 7) // 8], dtype=torch.uint8)


def check_mask(operator: str, mask: torch.Tensor, x: torch.Tensor) -> None:
    """Refuses a mask that does not hold one bit an element of `x`."""
    check(
        mask.dtype == torch.uint8 and mask.dim() == 1 and mask.shape[0] == (x.numel() + 7) // 8,
        lambda: (
            f"lance::{operator}: mask has dtype {mask.dtype} and shape {tuple(mask.shape)}; expected torch.uint8 and "
            f"{((x.numel() + 7) // 8,)}, one bit an element of {tuple(x.shape)}"
        ),
    )


def unpack_mask_reference(mask: torch.Tensor, like: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Reference of `lance::unpack_mask`."""
    check_order("unpack_mask", like, order)
    check_mask("unpack_mask", mask, like)
    return from_order(unpack_bits(mask, like.numel()).view([like.shape[dim] for dim in order]), order)


def _unpack_mask_fake(mask: torch.Tensor, like: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    check_order("unpack_mask", like, order)
    check_mask("unpack_mask", mask, like)
    return empty_in_order(like, order, torch.bool)


def masked_reference(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `lance::masked_activation`: the activation and its bits."""
    check_bounds("masked_activation", x, low, high)
    check_order("masked_activation", x, order)
    flat = in_order(x, order)
    return from_order(plain(flat, low, high, slope), order), pack_bits(condition(flat, low, high, slope))


def _masked_fake(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    check_bounds("masked_activation", x, low, high)
    check_order("masked_activation", x, order)
    return empty_in_order(x, order), x.new_empty([(x.numel() + 7) // 8], dtype=torch.uint8)


def masked_in_place_reference(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    """Reference of `lance::masked_activation_`."""
    y, mask = masked_reference(x, low, high, slope, order)
    x.copy_(y)
    return mask


def _masked_in_place_fake(
    x: torch.Tensor, low: float | None, high: float | None, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    return _masked_fake(x, low, high, slope, order)[1]


def _masked_in_place_autograd(x: torch.Tensor, *args: Any) -> torch.Tensor:
    check(
        not needs_grad(x),
        "lance::masked_activation_ has no derivative; use relu_, hardtanh_ or leaky_relu_, or call it under "
        "torch.no_grad()",
    )
    with below_autograd():
        mask: torch.Tensor = torch.ops.lance.masked_activation_(x, *args)
    written(x)
    return mask


def masked_grad_reference(
    grad: torch.Tensor, mask: torch.Tensor, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    """Reference of `lance::masked_activation_grad`."""
    check_floating("masked_activation_grad", "grad", grad)
    check_order("masked_activation_grad", grad, order)
    check_mask("masked_activation_grad", mask, grad)
    flat = in_order(grad, order)
    other = torch.zeros((), dtype=flat.dtype, device=flat.device) if slope is None else flat * slope
    return from_order(torch.where(unpack_bits(mask, flat.numel()).view(flat.shape), flat, other), order)


def _masked_grad_fake(
    grad: torch.Tensor, mask: torch.Tensor, slope: float | None, order: Sequence[int]
) -> torch.Tensor:
    check_floating("masked_activation_grad", "grad", grad)
    check_order("masked_activation_grad", grad, order)
    check_mask("masked_activation_grad", mask, grad)
    return empty_in_order(grad, order)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float | None, high: float | None, slope: float | None) -> torch.Tensor:
        order = memory_order(x)
        with below_autograd():
            if torch.compiler.is_compiling():
                # The compiler fuses the activation and the comparison with what stands before them.
                y, bits = plain(x, low, high, slope), condition(x, low, high, slope)
                mask = torch.ops.lance.pack_mask(bits, order)
            else:
                y, mask = torch.ops.lance.masked_activation(x, low, high, slope, order)
        ctx.save_for_backward(mask)
        ctx.order, ctx.slope = order, slope
        return y

    @staticmethod
    @once_differentiable("masked_activation")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return masked_grad(grad, mask, ctx.slope, ctx.order), None, None, None


class _MaskedInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: float | None, high: float | None, slope: float | None) -> torch.Tensor:
        ctx.order, ctx.slope = memory_order(x), slope
        with below_autograd():
            mask = torch.ops.lance.masked_activation_(x, low, high, slope, ctx.order)
        ctx.save_for_backward(mask)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable("masked_activation")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (mask,) = ctx.saved_tensors
        return masked_grad(grad, mask, ctx.slope, ctx.order), None, None, None


def masked_grad(grad: torch.Tensor, mask: torch.Tensor, slope: float | None, order: Sequence[int]) -> torch.Tensor:
    """Gradient of a masked activation; shows the compiler the selection, so that it fuses."""
    if not torch.compiler.is_compiling():
        out: torch.Tensor = torch.ops.lance.masked_activation_grad(grad, mask, slope, order)
        return out
    bits = torch.ops.lance.unpack_mask(mask, grad, order)
    return torch.where(bits, grad, torch.zeros_like(grad) if slope is None else grad * slope)


def _checked(
    operator: str, x: torch.Tensor, low: float | None, high: float | None, slope: float | None
) -> torch.Tensor:
    check_bounds(operator, x, low, high)
    return plain(x, low, high, slope)


def _differentiable(
    operator: str, x: torch.Tensor, low: float | None, high: float | None, slope: float | None
) -> torch.Tensor:
    check_bounds(operator, x, low, high)
    if needs_grad(x):
        y: torch.Tensor = apply(_Masked, x, low, high, slope)
        return y
    with below_autograd():
        return plain(x, low, high, slope)


def _in_place(x: torch.Tensor, low: float | None, high: float | None, slope: float | None) -> torch.Tensor:
    if torch.compiler.is_compiling() or x.is_neg():
        # Dynamo traces no operator that mutates and differentiates; the compiler drops the copy. A view that negates
        # is written to by copies only.
        if slope is not None:
            return x.copy_(leaky_relu(x, slope))
        return x.copy_(relu(x) if low is None or high is None else hardtanh(x, low, high))
    if torch.is_grad_enabled() and x.requires_grad:
        y: torch.Tensor = apply(_MaskedInPlace, x, low, high, slope)
        return y
    if slope is not None:
        return F.leaky_relu_(x, slope)
    return torch.relu_(x) if low is None or high is None else F.hardtanh_(x, low, high)


define(
    "pack_mask(Tensor bits, int[] order) -> Tensor",
    reference=pack_mask_reference,
    fake=_pack_mask_fake,
)
define(
    "unpack_mask(Tensor mask, Tensor like, int[] order) -> Tensor",
    reference=unpack_mask_reference,
    fake=_unpack_mask_fake,
    autograd=not_differentiable("unpack_mask"),
)
define(
    "masked_activation(Tensor x, float? low, float? high, float? slope, int[] order) -> (Tensor, Tensor)",
    reference=masked_reference,
    fake=_masked_fake,
    autograd=not_differentiable("masked_activation"),
)
define(
    "masked_activation_(Tensor(a!) x, float? low, float? high, float? slope, int[] order) -> Tensor",
    reference=masked_in_place_reference,
    fake=_masked_in_place_fake,
    autograd=_masked_in_place_autograd,
)
define(
    "masked_activation_grad(Tensor grad, Tensor mask, float? slope, int[] order) -> Tensor",
    reference=masked_grad_reference,
    fake=_masked_grad_fake,
    autograd=not_differentiable("masked_activation_grad"),
)
define(
    "relu(Tensor x) -> Tensor",
    reference=lambda x: _checked("relu", x, None, None, None),
    fake=lambda x: _checked("relu", x, None, None, None),
    autograd=lambda x: _differentiable("relu", x, None, None, None),
)
define(
    "hardtanh(Tensor x, float low=-1.0, float high=1.0) -> Tensor",
    reference=lambda x, low=-1.0, high=1.0: _checked("hardtanh", x, low, high, None),
    fake=lambda x, low=-1.0, high=1.0: _checked("hardtanh", x, low, high, None),
    autograd=lambda x, low=-1.0, high=1.0: _differentiable("hardtanh", x, low, high, None),
)
define(
    "leaky_relu(Tensor x, float slope=0.01) -> Tensor",
    reference=lambda x, slope=0.01: _checked("leaky_relu", x, None, None, slope),
    fake=lambda x, slope=0.01: _checked("leaky_relu", x, None, None, slope),
    autograd=lambda x, slope=0.01: _differentiable("leaky_relu", x, None, None, slope),
)
register_triton("pack_mask", file="mask")
register_triton("unpack_mask", file="mask")
register_triton("masked_activation", file="mask")
register_triton("masked_activation_", file="mask")
register_triton("masked_activation_grad", file="mask")
