"""`torch.nn.functional`'s functions in forms that hold less, with their signatures and approximate gradients.

Values are exact; the error of each gradient is bounded as `lance_kernels.ops.activation`, `norm` and `attention` say.
They fall back to PyTorch's own where those of `functional` do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

import lance_kernels.ops as ops
from lance_kernels.nn.companions import functional as exact
from lance_kernels.nn.companions.functional import takes


def gelu(input: torch.Tensor, approximate: str = "none", bits: int = 8) -> torch.Tensor:
    """As `torch.nn.functional.gelu`; keeps `bits` bits an element."""
    if not takes(input) or approximate not in ("none", "tanh"):
        return F.gelu(input, approximate=approximate)
    return ops.activation(input, "gelu_tanh" if approximate == "tanh" else "gelu", bits)


def silu(input: torch.Tensor, inplace: bool = False, bits: int = 8) -> torch.Tensor:
    """As `torch.nn.functional.silu`; keeps `bits` bits an element."""
    if not takes(input):
        return F.silu(input, inplace)
    y = ops.activation(input, "silu", bits)
    return input.copy_(y) if inplace else y


def hardswish(input: torch.Tensor, inplace: bool = False, bits: int = 8) -> torch.Tensor:
    """As `torch.nn.functional.hardswish`; keeps `bits` bits an element."""
    if not takes(input):
        return F.hardswish(input, inplace)
    y = ops.activation(input, "hardswish", bits)
    return input.copy_(y) if inplace else y


def hardsigmoid(input: torch.Tensor, inplace: bool = False, bits: int = 8) -> torch.Tensor:
    """As `torch.nn.functional.hardsigmoid`; keeps `bits` bits an element."""
    if not takes(input):
        return F.hardsigmoid(input, inplace)
    y = ops.activation(input, "hardsigmoid", bits)
    return input.copy_(y) if inplace else y


def sigmoid(input: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """As `torch.sigmoid`; keeps `bits` bits an element."""
    return ops.activation(input, "sigmoid", bits) if takes(input) else torch.sigmoid(input)


def tanh(input: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """As `torch.tanh`; keeps `bits` bits an element."""
    return ops.activation(input, "tanh", bits) if takes(input) else torch.tanh(input)


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.layer_norm`; keeps 8 bits an element."""
    if not takes(input):
        return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
    return ops.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """As `torch.nn.functional.rms_norm`; keeps 8 bits an element."""
    if not takes(input):
        return F.rms_norm(input, list(normalized_shape), weight, eps)
    return ops.rms_norm(input, normalized_shape, weight, eps)


def group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.group_norm`; keeps 8 bits an element."""
    if not takes(input):
        return F.group_norm(input, num_groups, weight, bias, eps)
    return ops.group_norm(input, num_groups, weight, bias, eps)


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """As `torch.nn.functional.batch_norm`; keeps 8 bits an element, or vectors only where those are exact."""
    frozen = not any(vector is not None and vector.requires_grad for vector in (weight, bias))
    few = training and input.numel() == input.shape[1]
    if not takes(input) or few or (frozen and not training):
        return exact.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return ops.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`; keeps query, key and value in 8 bits."""
    compiled_dropout = dropout_p > 0 and torch.compiler.is_compiling()
    if compiled_dropout or not any(takes(tensor) for tensor in (query, key, value)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    return ops.attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
