"""Batch norm with running statistics and frozen affine: keeps its per-channel vectors, alone or with the ReLU after it.

The layer is `y = (x - mean) / sqrt(var + eps) weight + bias`, so the gradient of `x` is
`grad_y / sqrt(var + eps) weight` and nothing of `x` is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from lance_kernels.ops.mask import check_mask, condition, pack_bits, plain, unpack_bits


def batch_norm_frozen(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Batch norm with fixed statistics and affine.

    Args:
        x: `(B, C, ...)`, any strides, float32, float64, bfloat16 or float16.
        weight: `(C,)` or None.
        bias: `(C,)` or None.
        mean: `(C,)`, the running mean.
        var: `(C,)`, the running variance.
        eps: added to `var`.

    Returns:
        Shape and dtype of `x`; values equal `torch.nn.functional.batch_norm`'s in eval mode, and so does the gradient
        of `x`, the only one.

    Raises:
        RuntimeError: shapes do not fit, or another argument than `x` requires a gradient.
    """
    y: torch.Tensor = torch.ops.lance.batch_norm_frozen(x, weight, bias, mean, var, eps)
    return y


def batch_norm_relu_frozen(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
    high: float | None = None,
) -> torch.Tensor:
    """`batch_norm_frozen` and the ReLU (`high` None) or `hardtanh(0, high)` (ReLU6 with 6) after it, in one pass.

    Args:
        x: `(B, C, ...)`, any strides, float32, float64, bfloat16 or float16.
        weight: `(C,)` or None.
        bias: `(C,)` or None.
        mean: `(C,)`, the running mean.
        var: `(C,)`, the running variance.
        eps: added to `var`.
        high: upper bound of the activation, or None.

    Returns:
        Shape and dtype of `x`; within 1 ulp of the two calls. Keeps 1 bit an element.

    Raises:
        RuntimeError: shapes do not fit, or another argument than `x` requires a gradient.
    """
    y: torch.Tensor = torch.ops.lance.batch_norm_relu_frozen(x, weight, bias, mean, var, eps, high)
    return y


def check_batch_norm(operator: str, x: torch.Tensor, *vectors: torch.Tensor | None) -> None:
    check_floating(operator, "x", x)
    check(x.dim() >= 2, lambda: f"lance::{operator}: x has shape {tuple(x.shape)}; expected (B, C, ...)")
    for name, vector in zip(("weight", "bias", "mean", "var"), vectors):
        if vector is None:
            continue
        check_floating(operator, name, vector)
        if vector.dim() != 1 or vector.shape[0] != x.shape[1]:
            raise RuntimeError(
                f"lance::{operator}: {name} has shape {tuple(vector.shape)}; expected ({x.shape[1]},), the channels of "
                f"x, whose shape is {tuple(x.shape)}"
            )


def _check_numbers(operator: str, eps: float, high: float | None = None) -> None:
    check(eps > 0, lambda: f"lance::{operator}: eps is {eps}; expected a positive number")
    check(high is None or high >= 0, lambda: f"lance::{operator}: high is {high}; expected at least 0, or None")


def _check_dtypes(operator: str, x: torch.Tensor, *vectors: torch.Tensor | None) -> None:
    """Refuses what ATen refuses: vectors share one dtype, that of `x` or (for narrow ones) float32."""
    dtypes = {vector.dtype for vector in vectors if vector is not None}
    check(
        len(dtypes) == 1 and dtypes <= {x.dtype, accumulation_dtype(x.dtype)},
        lambda: (
            f"lance::{operator}: weight, bias, mean and var have {sorted(map(str, dtypes))}; expected one dtype, "
            f"{x.dtype} or {accumulation_dtype(x.dtype)}, for x of {x.dtype}"
        ),
    )


def _check_frozen(operator: str, *vectors: torch.Tensor | None) -> None:
    for name, vector in zip(("weight", "bias", "mean", "var"), vectors):
        if vector is not None and vector.requires_grad:
            raise RuntimeError(f"lance::{operator}: {name} requires a gradient; expected a frozen one")


def per_channel(vector: torch.Tensor, dim: int) -> torch.Tensor:
    """`(C,)` shaped to broadcast over `(B, C, ...)` of `dim` dimensions."""
    return vector.view(1, -1, *[1] * (dim - 2))


def frozen_grad(grad: torch.Tensor, weight: torch.Tensor | None, var: torch.Tensor, eps: float) -> torch.Tensor:
    """`grad weight / sqrt(var + eps)` in plain PyTorch, in ATen's order and precision of each step."""
    dtype = accumulation_dtype(grad.dtype)
    out = grad * per_channel((1 / torch.sqrt(var.double() + eps)).to(dtype), grad.dim())
    return (out if weight is None else out * per_channel(weight.to(dtype), grad.dim())).to(grad.dtype)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        weight, bias, mean, var, eps = args
        ctx.save_for_backward(weight, var)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable("batch_norm_frozen")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, var = ctx.saved_tensors
        if torch.compiler.is_compiling():
            grad_x = frozen_grad(grad, weight, var, ctx.eps)
        else:
            grad_x = torch.ops.lance.batch_norm_frozen_grad(grad, weight, var, ctx.eps, memory_order(grad))
        return grad_x, None, None, None, None, None


class _FrozenReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        weight, bias, mean, var, eps, high = args
        order = memory_order(x)
        if torch.compiler.is_compiling():
            normalised = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
            low = None if high is None else 0.0
            y = plain(normalised, low, high, None)
            mask = torch.ops.lance.pack_mask(condition(normalised, low, high, None), order)
        else:
            y, mask = torch.ops.lance.batch_norm_relu_mask(x, weight, bias, mean, var, eps, high, order)
        ctx.save_for_backward(mask, weight, var)
        ctx.eps, ctx.order = eps, order
        return y

    @staticmethod
    @once_differentiable("batch_norm_relu_frozen")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mask, weight, var = ctx.saved_tensors
        if torch.compiler.is_compiling():
            bits = torch.ops.lance.unpack_mask(mask, grad, ctx.order)
            grad_x = frozen_grad(torch.where(bits, grad, torch.zeros_like(grad)), weight, var, ctx.eps)
        else:
            grad_x = torch.ops.lance.batch_norm_relu_grad(grad, mask, weight, var, ctx.eps, ctx.order)
        return grad_x, None, None, None, None, None, None


def _frozen_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    check_batch_norm("batch_norm_frozen", x, weight, bias, mean, var)
    _check_dtypes("batch_norm_frozen", x, weight, bias, mean, var)
    _check_numbers("batch_norm_frozen", eps)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _frozen_autograd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    if torch.is_grad_enabled():
        _check_frozen("batch_norm_frozen", weight, bias, mean, var)
    if needs_grad(x, weight, bias, mean, var):
        check_batch_norm("batch_norm_frozen", x, weight, bias, mean, var)
        _check_dtypes("batch_norm_frozen", x, weight, bias, mean, var)
        _check_numbers("batch_norm_frozen", eps)
        y: torch.Tensor = apply(_Frozen, x, weight, bias, mean, var, eps)
        return y
    with below_autograd():
        return batch_norm_frozen(x, weight, bias, mean, var, eps)


def _relu_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
    high: float | None = None,
) -> torch.Tensor:
    check_batch_norm("batch_norm_relu_frozen", x, weight, bias, mean, var)
    _check_dtypes("batch_norm_relu_frozen", x, weight, bias, mean, var)
    _check_numbers("batch_norm_relu_frozen", eps, high)
    normalised = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return plain(normalised, None if high is None else 0.0, high, None)


def _relu_autograd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float = 1e-5,
    high: float | None = None,
) -> torch.Tensor:
    if torch.is_grad_enabled():
        _check_frozen("batch_norm_relu_frozen", weight, bias, mean, var)
    if needs_grad(x, weight, bias, mean, var):
        check_batch_norm("batch_norm_relu_frozen", x, weight, bias, mean, var)
        _check_dtypes("batch_norm_relu_frozen", x, weight, bias, mean, var)
        _check_numbers("batch_norm_relu_frozen", eps, high)
        y: torch.Tensor = apply(_FrozenReLU, x, weight, bias, mean, var, eps, high)
        return y
    with below_autograd():
        return batch_norm_relu_frozen(x, weight, bias, mean, var, eps, high)


def mask_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    high: float | None,
    order: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    check_batch_norm("batch_norm_relu_mask", x, weight, bias, mean, var)
    _check_numbers("batch_norm_relu_mask", eps, high)
    check_order("batch_norm_relu_mask", x, order)
    normalised = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    low = None if high is None else 0.0
    flat = in_order(normalised, order)
    return from_order(plain(flat, low, high, None), order), pack_bits(condition(flat, low, high, None))


def _mask_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    high: float | None,
    order: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    check_batch_norm("batch_norm_relu_mask", x, weight, bias, mean, var)
    _check_numbers("batch_norm_relu_mask", eps, high)
    check_order("batch_norm_relu_mask", x, order)
    return empty_in_order(x, order), x.new_empty([(x.numel() + 7) // 8], dtype=torch.uint8)


def frozen_grad_reference(
    grad: torch.Tensor, weight: torch.Tensor | None, var: torch.Tensor, eps: float, order: Sequence[int]
) -> torch.Tensor:
    check_batch_norm("batch_norm_frozen_grad", grad, weight, None, None, var)
    check_order("batch_norm_frozen_grad", grad, order)
    return from_order(in_order(frozen_grad(grad, weight, var, eps), order), order)


def _frozen_grad_fake(
    grad: torch.Tensor, weight: torch.Tensor | None, var: torch.Tensor, eps: float, order: Sequence[int]
) -> torch.Tensor:
    check_batch_norm("batch_norm_frozen_grad", grad, weight, None, None, var)
    check_order("batch_norm_frozen_grad", grad, order)
    return empty_in_order(grad, order)


def check_relu_grad(
    grad: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor | None, var: torch.Tensor, order: Sequence[int]
) -> None:
    check_batch_norm("batch_norm_relu_grad", grad, weight, None, None, var)
    check_order("batch_norm_relu_grad", grad, order)
    check_mask("batch_norm_relu_grad", mask, grad)


def relu_grad_reference(
    grad: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None,
    var: torch.Tensor,
    eps: float,
    order: Sequence[int],
) -> torch.Tensor:
    check_relu_grad(grad, mask, weight, var, order)
    flat = in_order(grad, order)
    masked = torch.where(unpack_bits(mask, flat.numel()).view(flat.shape), flat, torch.zeros_like(flat))
    return frozen_grad(from_order(masked, order), weight, var, eps)


def _relu_grad_fake(
    grad: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor | None,
    var: torch.Tensor,
    eps: float,
    order: Sequence[int],
) -> torch.Tensor:
    check_relu_grad(grad, mask, weight, var, order)
    return empty_in_order(grad, order)


ARGUMENTS = "Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var"

define(
    f"batch_norm_frozen({ARGUMENTS}, float eps=1e-05) -> Tensor",
    reference=_frozen_reference,
    fake=_frozen_reference,
    autograd=_frozen_autograd,
)
define(
    f"batch_norm_relu_frozen({ARGUMENTS}, float eps=1e-05, float? high=None) -> Tensor",
    reference=_relu_reference,
    fake=_relu_reference,
    autograd=_relu_autograd,
)
define(
    f"batch_norm_relu_mask({ARGUMENTS}, float eps, float? high, int[] order) -> (Tensor, Tensor)",
    reference=mask_reference,
    fake=_mask_fake,
    autograd=not_differentiable("batch_norm_relu_mask"),
)
define(
    "batch_norm_frozen_grad(Tensor grad, Tensor? weight, Tensor var, float eps, int[] order) -> Tensor",
    reference=frozen_grad_reference,
    fake=_frozen_grad_fake,
    autograd=not_differentiable("batch_norm_frozen_grad"),
)
define(
    "batch_norm_relu_grad(Tensor grad, Tensor mask, Tensor? weight, Tensor var, float eps, int[] order) -> Tensor",
    reference=relu_grad_reference,
    fake=_relu_grad_fake,
    autograd=not_differentiable("batch_norm_relu_grad"),
)
register_triton("batch_norm_relu_mask", file="batch_norm")
register_triton("batch_norm_frozen_grad", file="batch_norm")
register_triton("batch_norm_relu_grad", file="batch_norm")
