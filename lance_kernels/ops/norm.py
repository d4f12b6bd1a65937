"""Layer, RMS, group and batch norm that keep their normalised input in 8 bits.

Values come from ATen. Kept are the deviations `d = x - mean`, rounded to 8 bits with one step a row (a channel for
batch norm), and `1 / sigma`; backward hands `d` with mean 0 to ATen's own formula. Of the normalised input `d / sigma`
an element is off by at most half a step over sigma: its row's largest magnitude over 254.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lance_kernels.ops._checks import accumulation_dtype, check, check_floating
from lance_kernels.ops._layout import memory_order
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    once_differentiable,
    without_autocast,
)
from lance_kernels.ops.quantize_rows import dequantize_rows, placeholder, quantize_rows


def layer_norm(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm` that keeps its normalised input in 8 bits.

    Args:
        x: `(..., *normalized_shape)`, float32, float64, bfloat16 or float16.
        normalized_shape: the trailing sizes that are normalised together.
        weight: `normalized_shape` or None.
        bias: `normalized_shape` or None.
        eps: added to the variance.

    Returns:
        Shape and dtype of `x`; values equal PyTorch's, gradients come from the rounded input (see the module's note).
    """
    y: torch.Tensor = torch.ops.lance.layer_norm(x, normalized_shape, weight, bias, eps)
    return y


def rms_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """`torch.nn.functional.rms_norm` that keeps its normalised input in 8 bits.

    Args:
        x: `(..., *normalized_shape)`, float32, float64, bfloat16 or float16.
        normalized_shape: the trailing sizes that are normalised together.
        weight: `normalized_shape` or None.
        eps: added to the mean square; None for the machine epsilon of the dtype in which sums are kept (float32's for
            16-bit `x`), as PyTorch does.

    Returns:
        Shape and dtype of `x`; values equal PyTorch's, gradients come from the rounded input (see the module's note).
    """
    y: torch.Tensor = torch.ops.lance.rms_norm(x, normalized_shape, weight, eps)
    return y


def group_norm(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.group_norm` that keeps its normalised input in 8 bits.

    Args:
        x: `(B, C, ...)`, float32, float64, bfloat16 or float16.
        groups: number of groups, dividing `C`.
        weight: `(C,)` or None.
        bias: `(C,)` or None.
        eps: added to the variance.

    Returns:
        Shape and dtype of `x`; values equal PyTorch's, gradients come from the rounded input (see the module's note).
    """
    y: torch.Tensor = torch.ops.lance.group_norm(x, groups, weight, bias, eps)
    return y


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    """`torch.nn.functional.batch_norm` that keeps its normalised input in 8 bits.

    Not an operator of `torch.ops.lance`: in training it updates the running statistics in place.

    Args:
        x: `(B, C, ...)`, float32, float64, bfloat16 or float16.
        weight: `(C,)` or None.
        bias: `(C,)` or None.
        mean: `(C,)`, the running mean, or None in training.
        var: `(C,)`, the running variance, or None in training.
        training: normalise by the batch's statistics and update the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        Shape and dtype of `x`; values equal PyTorch's, gradients come from the rounded input (see the module's note).
    """
    if x.numel() == 0:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    y: torch.Tensor = apply(_BatchNorm, x, weight, bias, mean, var, training, momentum, eps)
    return y


def _check_affine(operator: str, x: torch.Tensor, size: Sequence[int], *vectors: torch.Tensor | None) -> None:
    """Refuses a weight or bias that is not of this size, or not of the dtype of `x` or (for narrow ones) float32."""
    given = [(name, vector) for name, vector in zip(("weight", "bias"), vectors) if vector is not None]
    for name, vector in given:
        check(
            vector.dtype == given[0][1].dtype and vector.dtype in (x.dtype, accumulation_dtype(x.dtype)),
            f"lance::{operator}: {name} has dtype {vector.dtype}; expected {x.dtype}, that of x, or "
            f"{accumulation_dtype(x.dtype)}, the same for weight and bias",
        )
        check(
            list(vector.shape) == list(size),
            f"lance::{operator}: {name} has shape {tuple(vector.shape)}; expected {tuple(size)} for x of shape "
            f"{tuple(x.shape)}",
        )


def _normalised(x: torch.Tensor, normalized_shape: Sequence[int], operator: str, *vectors: torch.Tensor | None) -> int:
    check_floating(operator, "x", x)
    count = len(normalized_shape)
    check(
        count > 0 and list(x.shape[x.dim() - count :]) == list(normalized_shape),
        f"lance::{operator}: x has shape {tuple(x.shape)}; expected (..., {', '.join(map(str, normalized_shape))})",
    )
    _check_affine(operator, x, normalized_shape, *vectors)
    return count


def _row_count(x: torch.Tensor, count: int) -> Any:
    rows = 1
    for size in x.shape[: x.dim() - count]:
        rows = rows * size
    return rows


def _identity(x: torch.Tensor) -> list[int]:
    return list(range(x.dim()))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        y, mean, rstd = torch.ops.aten.native_layer_norm(x, normalized_shape, weight, bias, eps)
        rows = _row_count(x, len(normalized_shape))
        codes, steps = quantize_rows(x, mean.reshape(-1), 1, rows, _identity(x))
        ctx.save_for_backward(codes, steps, rstd, weight, bias)
        ctx.normalized_shape, ctx.size, ctx.mean_dtype = normalized_shape, x.shape, mean.dtype
        kept: torch.Tensor = y
        return kept

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, steps, rstd, weight, bias = ctx.saved_tensors
        x = dequantize_rows(codes, steps, 1, placeholder(ctx.size, grad), list(range(len(ctx.size))))
        mask = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, ctx.normalized_shape, torch.zeros_like(rstd, dtype=ctx.mean_dtype), rstd, weight, bias, mask
        )
        return grad_x, None, grad_weight, grad_bias, None


def _epsilon(x: torch.Tensor, eps: float | None) -> float:
    return torch.finfo(accumulation_dtype(x.dtype)).eps if eps is None else eps


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None, eps: float | None
    ) -> torch.Tensor:
        count = len(normalized_shape)
        epsilon = _epsilon(x, eps)
        rows = _row_count(x, count)
        wide = x.to(accumulation_dtype(x.dtype))
        dims = list(range(-count, 0))
        rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
        codes, steps = quantize_rows(x, None, 1, rows, _identity(x))
        ctx.save_for_backward(codes, steps, rstd, weight)
        ctx.dims, ctx.size = dims, x.shape
        return F.rms_norm(x, list(normalized_shape), weight, epsilon)

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, steps, rstd, weight = ctx.saved_tensors
        wide = grad.to(rstd.dtype)
        like = placeholder(ctx.size, rstd)
        normalised = dequantize_rows(codes, steps, 1, like, list(range(len(ctx.size)))) * rstd
        scaled = wide if weight is None else wide * weight
        grad_x = rstd * (scaled - normalised * (scaled * normalised).mean(ctx.dims, keepdim=True))
        grad_weight = None
        if ctx.needs_input_grad[2]:
            leading = list(range(wide.dim() - len(ctx.dims)))
            product = wide * normalised
            grad_weight = (product.sum(leading) if leading else product).to(weight.dtype)
        return grad_x.to(grad.dtype), None, grad_weight, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        groups: int,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        samples, channels = x.shape[:2]
        inner = _row_count(x, 0) // (samples * channels) if x.numel() else 0
        y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, samples, channels, inner, groups, eps)
        codes, steps = quantize_rows(x, mean.reshape(-1), 1, samples * groups, _identity(x))
        ctx.save_for_backward(codes, steps, rstd, weight)
        ctx.groups, ctx.size, ctx.inner, ctx.mean_dtype = groups, x.shape, inner, mean.dtype
        kept: torch.Tensor = y
        return kept

    @staticmethod
    @once_differentiable("group_norm")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, steps, rstd, weight = ctx.saved_tensors
        x = dequantize_rows(codes, steps, 1, placeholder(ctx.size, grad), list(range(len(ctx.size))))
        mask = [ctx.needs_input_grad[index] for index in (0, 2, 3)]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
            grad.contiguous(),
            x,
            torch.zeros_like(rstd, dtype=ctx.mean_dtype),
            rstd,
            weight,
            ctx.size[0],
            ctx.size[1],
            ctx.inner,
            ctx.groups,
            mask,
        )
        return grad_x, None, grad_weight, grad_bias, None


def _channel_rows(size: Sequence[Any], order: Sequence[int]) -> Any:
    """How often the channels repeat in memory: the `outer` of `quantize_rows` with one row a channel."""
    outer = 1
    for dim in order[: list(order).index(1)]:
        outer = outer * size[dim]
    return outer


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        weight, bias, running_mean, running_var, training, momentum, eps = args
        order = memory_order(x)
        y, mean, rstd = torch.ops.aten.native_batch_norm(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
        center = mean if training else running_mean
        codes, steps = quantize_rows(x, center, _channel_rows(x.shape, order), x.shape[1], order)
        ctx.save_for_backward(codes, steps, weight, *((rstd, None) if training else (None, running_var)))
        ctx.training, ctx.eps, ctx.order, ctx.size = training, eps, order, x.shape
        kept: torch.Tensor = y
        return kept

    @staticmethod
    @once_differentiable("batch_norm")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, steps, weight, rstd, var = ctx.saved_tensors
        x = dequantize_rows(codes, steps, _channel_rows(ctx.size, ctx.order), placeholder(ctx.size, grad), ctx.order)
        zero = torch.zeros_like(rstd if ctx.training else var)
        running = (None, None) if ctx.training else (zero, var)
        saved = (zero, rstd) if ctx.training else (None, None)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, *running, *saved, ctx.training, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return (*grads, None, None, None, None, None)


def _autocast_wide(operator: Any) -> Any:
    """Autocast rule of the norms, as PyTorch's: float32 on CUDA, no cast on the CPU."""

    def cast(value: Any) -> Any:
        narrow = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if narrow else value

    def autocast(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "cuda":
            x, args, kwargs = cast(x), tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
        with without_autocast():
            return operator()(x, *args, **kwargs)

    return autocast


def _layer_norm_reference(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    _normalised(x, normalized_shape, "layer_norm", weight, bias)
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


def _layer_norm_autograd(
    x: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    if needs_grad(x, weight, bias):
        _normalised(x, normalized_shape, "layer_norm", weight, bias)
        y: torch.Tensor = apply(_LayerNorm, x, normalized_shape, weight, bias, eps)
        return y
    with below_autograd():
        return layer_norm(x, normalized_shape, weight, bias, eps)


def _rms_norm_reference(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    _normalised(x, normalized_shape, "rms_norm", weight)
    return F.rms_norm(x, list(normalized_shape), weight, _epsilon(x, eps))


def _rms_norm_autograd(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    if needs_grad(x, weight):
        _normalised(x, normalized_shape, "rms_norm", weight)
        y: torch.Tensor = apply(_RMSNorm, x, normalized_shape, weight, eps)
        return y
    with below_autograd():
        return rms_norm(x, normalized_shape, weight, eps)


def _check_groups(x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    check_floating("group_norm", "x", x)
    check(
        x.dim() >= 2 and groups > 0 and x.shape[1] % groups == 0,
        f"lance::group_norm: x has shape {tuple(x.shape)} and groups is {groups}; expected (B, C, ...) with "
        "C a multiple of groups",
    )
    _check_affine("group_norm", x, x.shape[1:2], weight, bias)


def _group_norm_reference(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    _check_groups(x, groups, weight, bias)
    # Not `torch.nn.functional`'s, which refuses groups of one value.
    return torch.group_norm(x, groups, weight, bias, eps)


def _group_norm_autograd(
    x: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    if needs_grad(x, weight, bias):
        _check_groups(x, groups, weight, bias)
        y: torch.Tensor = apply(_GroupNorm, x.contiguous(), groups, weight, bias, eps)
        return y
    with below_autograd():
        return group_norm(x, groups, weight, bias, eps)


define(
    "layer_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) "
    "-> Tensor",
    reference=_layer_norm_reference,
    fake=_layer_norm_reference,
    autograd=_layer_norm_autograd,
    autocast=_autocast_wide(lambda: torch.ops.lance.layer_norm),
)
define(
    "rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> Tensor",
    reference=_rms_norm_reference,
    fake=_rms_norm_reference,
    autograd=_rms_norm_autograd,
    # PyTorch 2.11 has no such rule.
    autocast=_autocast_wide(lambda: torch.ops.lance.rms_norm)
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
    else None,
)
define(
    "group_norm(Tensor x, int groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor",
    reference=_group_norm_reference,
    fake=_group_norm_reference,
    autograd=_group_norm_autograd,
    autocast=_autocast_wide(lambda: torch.ops.lance.group_norm),
)
