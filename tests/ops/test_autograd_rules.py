"""What all operators share towards autograd: second derivatives and tangents raise, writes are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lance_kernels  # noqa: F401  registers the operators

lance = torch.ops.lance


def penalty(layer, x, head=None):
    """A gradient penalty of `activation(layer(x))` beside a plain term that the layers' weights reach themselves."""
    y = lance.activation(layer(x), "gelu")
    (grad,) = torch.autograd.grad((y if head is None else head(y).square()).sum(), x, create_graph=True)
    return grad.square().sum() + sum(weight.square().sum() for weight in (layer if head is None else head).parameters())


@pytest.mark.parametrize("behind", [True, False])
def test_a_second_derivative_of_some_leaves_only_raises(behind):
    # Of what follows, through the incoming gradient; of what came before, through what is kept.
    layer, head = nn.Linear(6, 5), nn.Linear(5, 3) if behind else None
    x = torch.randn(4, 6, requires_grad=True)
    weights = list((head or layer).parameters())
    with pytest.raises(RuntimeError, match="lance::activation is differentiable once"):
        torch.autograd.grad(penalty(layer, x, head), weights)
    with pytest.raises(RuntimeError, match="lance::activation is differentiable once"):
        penalty(layer, x, head).backward(inputs=weights)


CHANNELS = (None, None, torch.zeros(4), torch.ones(4))
CALLS = {
    "relu": lambda x: lance.relu(x),
    "hardtanh": lambda x: lance.hardtanh(x),
    "leaky_relu": lambda x: lance.leaky_relu(x),
    "activation": lambda x: lance.activation(x, "gelu"),
    "dropout": lambda x: lance.dropout(x, 0.5),
    "batch_norm_frozen": lambda x: lance.batch_norm_frozen(x, *CHANNELS),
    "batch_norm_relu_frozen": lambda x: lance.batch_norm_relu_frozen(x, *CHANNELS),
    "layer_norm": lambda x: lance.layer_norm(x, [6]),
    "rms_norm": lambda x: lance.rms_norm(x, [6]),
    "group_norm": lambda x: lance.group_norm(x, 2),
    "attention": lambda x: lance.attention(x, x, x),
    "max_pool": lambda x: lance.max_pool(x, [2, 2], [2, 2], [0, 0], [1, 1]),
    "avg_pool": lambda x: lance.avg_pool(x, [2, 2], [2, 2], [0, 0]),
    "adaptive_avg_pool": lambda x: lance.adaptive_avg_pool(x, [2, 2]),
    "frozen_convolution": lambda x: lance.frozen_convolution(
        x, torch.ones(3, 4, 3, 3), None, [1], [0], [1], False, [0], 1
    ),
    "linear": lambda x: lance.linear(x, torch.ones(2, 6), None, [None] * 4)[0],
    "tucker_project": lambda x: lance.tucker_project(x, [None] * 4),
    "tucker_reconstruct": lambda x: lance.tucker_reconstruct(x, [None] * 4),
    "tucker_project, factor": lambda x: lance.tucker_project(torch.ones(6, 6), [None, x[0, 0]]),
    "mode_gram": lambda x: lance.mode_gram(x, 1),
    "gram_eigh": lambda x: lance.gram_eigh(x[0, 0])[0],
}


@pytest.mark.parametrize("name", CALLS)
def test_tangents_are_refused(name):
    x = torch.randn(2, 4, 6, 6)
    with pytest.raises(RuntimeError, match=r"forward-mode derivative|jvp|functorch"):
        torch.func.jvp(CALLS[name], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        CALLS[name](x)


def test_what_is_written_gets_another_version():
    grams, x = [torch.zeros(4, 4)], torch.ones(1, 4, 2)
    lance.mode_grams_(grams, x, [1])
    lance.patch_gram_(grams[0].unsqueeze(0), x, [1], [1], [0], [1], 1)
    assert grams[0]._version == 2
    lance.masked_activation_(x, None, None, None, [0, 1, 2])
    assert x._version == 1


def test_a_masked_activation_in_place_refuses_what_requires_grad():
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="lance::masked_activation_ has no derivative; use relu_"):
        lance.masked_activation_(x, None, None, None, [0])
    with torch.no_grad():
        lance.masked_activation_(x, None, None, None, [0])
