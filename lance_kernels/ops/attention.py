"""Scaled dot product attention that keeps query, key and value in 8 bits and computes its result again in backward.

With `P = softmax(scale Q K^T + mask)` and `O = P V`: `dV = P^T dO`, `dS = P (dP - sum(dP P))` with `dP = dO V^T`,
`dQ = scale dS K`, `dK = scale dS^T Q`. PyTorch keeps `Q`, `K`, `V`, `O` and the logarithms of the sums; here one byte
an element of `Q`, `K` and `V` is kept, with one step a row (a token and head). A float32 mask that is itself a result
(the learned bias of positions, added to a mask of windows) is kept in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from lance_kernels.ops._checks import check, check_floating
from lance_kernels.ops._layout import memory_order
from lance_kernels.ops._registry import (
    apply,
    autocast_arguments,
    below_autograd,
    define,
    needs_grad,
    once_differentiable,
    without_autocast,
)
from lance_kernels.ops.quantize_rows import dequantize_rows, placeholder, quantize_rows


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` that keeps query, key and value in 8 bits.

    Args:
        query: `(..., H, L, E)`, float32, float64, bfloat16 or float16.
        key: `(..., H, S, E)`.
        value: `(..., H, S, Ev)`.
        attn_mask: broadcastable to `(..., H, L, S)`, boolean or added to the scores, where it may require a gradient.
        dropout_p: probability with which attention weights are dropped; drawn again alike in backward.
        is_causal: mask the upper triangle.
        scale: factor of the scores, `1 / sqrt(E)` by default.
        enable_gqa: let several heads of the query share one of key and value.

    Returns:
        `(..., H, L, Ev)`; values equal PyTorch's. Gradients are those at the rounded query, key and value, each element
        off by at most its row's largest magnitude over 254, and, where a float32 `attn_mask` is the result of other
        operations and requires a gradient, at the mask in float16: each element off by at most `2^-11` of its
        magnitude, or by `2^-25`; below -65504 it hides as before.
    """
    y: torch.Tensor = torch.ops.lance.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return y


def _check_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    enable_gqa: bool = False,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_floating("attention", name, tensor)
        check(
            tensor.dim() == query.dim() >= 2 and tensor.dtype == query.dtype,
            f"lance::attention: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected as many "
            f"dimensions as query, whose shape is {tuple(query.shape)} and dtype {query.dtype}",
        )
    check(
        key.shape[-1] == query.shape[-1] and value.shape[-2] == key.shape[-2],
        f"lance::attention: query has shape {tuple(query.shape)}, key {tuple(key.shape)} and value "
        f"{tuple(value.shape)}; expected (..., L, E), (..., S, E) and (..., S, Ev)",
    )
    check(
        query.dim() > 2 or not enable_gqa,
        f"lance::attention: enable_gqa needs heads; query has shape {tuple(query.shape)}, expected (..., H, L, E)",
    )
    if attn_mask is None:
        return
    scores = (query.shape[-2], key.shape[-2])
    check(
        attn_mask.dtype in (torch.bool, query.dtype),
        f"lance::attention: attn_mask has dtype {attn_mask.dtype}; expected torch.bool or {query.dtype}, that of query",
    )
    check(
        2 <= attn_mask.dim() <= query.dim()
        and all(size in (1, full) for size, full in zip(attn_mask.shape[-2:], scores)),
        f"lance::attention: attn_mask has shape {tuple(attn_mask.shape)}; expected (L, S), {scores}, or one that "
        "broadcasts to the scores",
    )


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    _check_attention(query, key, value, attn_mask, enable_gqa)
    return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _quantize(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    # Rows are heads' vectors, wherever the head dimension lies.
    order = [dim for dim in memory_order(tensor) if dim != tensor.dim() - 1] + [tensor.dim() - 1]
    rows = 1
    for dim in order[:-1]:
        rows = rows * tensor.shape[dim]
    codes, steps = quantize_rows(tensor, None, 1, rows, order)
    return codes, steps, order


# Layers that are given one mask keep one: by mask, its version and what is kept of it.
_KEPT_MASKS = WeakTensorKeyDictionary()


def _keep_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """What backward needs of a mask: half the bytes where nothing else holds it whole."""
    if mask is None or mask.dtype != torch.float32 or not mask.requires_grad or mask.is_leaf:
        return mask
    if any(stride == 0 and size > 1 for stride, size in zip(mask.stride(), mask.shape)):
        return mask
    if torch.compiler.is_compiling():
        return _halve(mask)
    known: tuple[int, torch.Tensor] | None = _KEPT_MASKS.get(mask)
    if known is None or known[0] != mask._version:
        known = _KEPT_MASKS[mask] = (mask._version, _halve(mask))
    return known[1]


def _halve(mask: torch.Tensor) -> torch.Tensor:
    limit = torch.finfo(torch.float16).max
    bounded = mask.clamp(-limit, limit)
    return bounded.masked_fill(mask == -torch.inf, -torch.inf).to(torch.float16)


def _restore_mask(kept: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if kept is None or kept.dtype in (torch.bool, dtype):
        return kept
    # A row that is hidden throughout weighs all alike only while its scores vanish beside the mask.
    lowest = kept == torch.finfo(torch.float16).min
    return kept.to(dtype).masked_fill(lowest, torch.finfo(dtype).min)


def _generator_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> torch.Tensor:
        state = _generator_state(query.device) if dropout_p > 0 else None
        y = _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        kept = [_quantize(tensor) for tensor in (query, key, value)]
        ctx.save_for_backward(
            *(part for codes, steps, _ in kept for part in (codes, steps)), _keep_mask(attn_mask), state
        )
        ctx.orders = [order for _, _, order in kept]
        ctx.sizes = [tensor.shape for tensor in (query, key, value)]
        ctx.options = (dropout_p, is_causal, scale, enable_gqa)
        return y

    @staticmethod
    @once_differentiable("attention")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *kept, kept_mask, state = ctx.saved_tensors
        attn_mask = _restore_mask(kept_mask, grad.dtype)
        tensors = [
            dequantize_rows(codes, steps, 1, placeholder(size, grad), order)
            for codes, steps, size, order in zip(kept[0::2], kept[1::2], ctx.sizes, ctx.orders)
        ]
        if torch.compiler.is_compiling():
            query, key, value = tensors
            _, is_causal, scale, enable_gqa = ctx.options
            grads: Sequence[torch.Tensor | None] = attention_grads(
                grad, query, key, value, attn_mask, is_causal, scale, enable_gqa, ctx.needs_input_grad[3]
            )
        else:
            grads = _library_grads(ctx, grad, tensors, attn_mask, state)
        return (*grads, None, None, None, None)


def _library_grads(
    ctx: Any, grad: torch.Tensor, tensors: list[torch.Tensor], attn_mask: torch.Tensor | None, state: Any
) -> Sequence[torch.Tensor | None]:
    """Gradients through the library's own attention, computed again from the rounded tensors."""
    needs = list(ctx.needs_input_grad[:4])
    leaves = [
        None if tensor is None else tensor.detach().requires_grad_(need)
        for tensor, need in zip([*tensors, attn_mask], needs)
    ]
    devices = [grad.device] if grad.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices, enabled=state is not None):
        if state is not None:
            if devices:
                torch.cuda.set_rng_state(state, grad.device)
            else:
                torch.set_rng_state(state)
        query, key, value, mask = leaves
        assert query is not None
        assert key is not None
        assert value is not None
        y = _plain(query, key, value, mask, *ctx.options)
        wanted = [leaf for leaf, need in zip(leaves, needs) if need and leaf is not None]
        found = iter(torch.autograd.grad(y, wanted, grad))
    return [next(found) if need else None for need in needs]


def attention_grads(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    needs_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The gradients by their formula, in operations a compiler traces; no dropout."""
    factor = float(query.shape[-1]) ** -0.5 if scale is None else scale
    heads = query.shape[-3] if query.dim() > 2 else 1
    whole_key, whole_value = key, value
    if enable_gqa:
        whole_key = key.repeat_interleave(heads // key.shape[-3], -3)
        whole_value = value.repeat_interleave(heads // value.shape[-3], -3)
    scores = query @ whole_key.mT * factor
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        hide = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hide else scores + attn_mask
    # A row that sees nothing has no weights.
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    grad_value = weights.mT @ grad
    grad_weights = grad @ whole_value.mT
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
    grad_query = grad_scores @ whole_key * factor
    grad_key = grad_scores.mT @ query * factor
    if enable_gqa:
        grad_key = _sum_heads(grad_key, key)
        grad_value = _sum_heads(grad_value, value)
    grad_mask = grad_scores.sum_to_size(attn_mask.shape) if needs_mask and attn_mask is not None else None
    return (
        grad_query.sum_to_size(query.shape),
        grad_key.sum_to_size(key.shape),
        grad_value.sum_to_size(value.shape),
        grad_mask,
    )


def _sum_heads(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    summed: torch.Tensor = grad.unflatten(-3, (like.shape[-3], -1)).sum(-3)
    return summed


def _autograd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    options = (dropout_p, is_causal, scale, enable_gqa)
    inputs = (query, key, value, attn_mask)
    if needs_grad(*inputs):
        _check_attention(query, key, value, attn_mask, enable_gqa)
        y: torch.Tensor = apply(_Attention, query, key, value, attn_mask, *options)
        return y
    with below_autograd():
        return attention(query, key, value, attn_mask, *options)


def _autocast(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *options: Any,
    **named: Any,
) -> torch.Tensor:
    query, key, value, attn_mask = autocast_arguments(query, key, value, attn_mask)
    with without_autocast():
        y: torch.Tensor = torch.ops.lance.attention(query, key, value, attn_mask, *options, **named)
    return y


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    heads = 1
    for size in query[:-2]:
        heads *= size
    return 2 * heads * query[-2] * key[-2] * (query[-1] + value[-1])


define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor",
    reference=_reference,
    fake=_reference,
    autograd=_autograd,
    autocast=_autocast,
    flops=_flops,
    tags=(torch.Tag.nondeterministic_seeded,),
)
