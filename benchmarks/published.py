"""The published layer's contractions, the batch mode kept, written plainly from arXiv 2509.21617 (section 3).

They are the rival that `lance_kernels` is timed against. The published layer projects a copy of its input mode by
mode, and forms the weight gradient from the core in the paper's order: the spatial (token) modes are expanded first,
the product with the output's gradient comes next or last, and the feature mode is expanded where the paper does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from torch.nn.grad import conv2d_weight


def project(x: torch.Tensor, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Core of `x` with its first mode kept: a copy of `x`, then one `tensordot` a mode.

    Args:
        x: `(B, size_1, ..., size_{N-1})`.
        factors: `(size_n, rank_n)` for every mode but the first.

    Returns:
        `(B, rank_1, ..., rank_{N-1})`.
    """
    return contract(x.clone(), factors, 1)


def contract(x: torch.Tensor, factors: Sequence[torch.Tensor], first: int) -> torch.Tensor:
    """One `tensordot` a factor, with the modes of `x` from `first` on in turn.

    Args:
        x: `(size_0, ..., size_{N-1})`.
        factors: `(size_n, rank_n)` for every mode from `first` on.
        first: 0 or 1, the number of modes that are kept.
    """
    for factor in factors:
        x = torch.tensordot(x, factor, dims=([first], [0]))  # the contracted mode moves to the end
    return x


def convolution_weight_grad(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Sequence[torch.Tensor],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Weight gradient of a 2-D convolution from its input's core.

    Args:
        grad_output: `(B, O, H', W')`.
        core: `(B, r_C, r_H, r_W)`.
        factors: `U_C`, `U_H`, `U_W`.
        kernel: height and width of the kernel.
        stride: stride of both axes.
        padding: padding of both axes.

    Returns:
        `(O, C, kernel height, kernel width)`.
    """
    channel, height, width = factors[0], *(pad(factor, (0, 0, padding, padding)) for factor in factors[1:])
    rows = torch.einsum("bqkl,hk->bqhl", core, height)
    image = torch.einsum("bqhl,wl->bqhw", rows, width)  # (B, r_C, H + 2 padding, W + 2 padding)
    out_channels, rank = grad_output.shape[1], channel.shape[1]
    if stride == 1:
        # The batch takes the place of the input channels, grad_output that of the kernel.
        thin = torch.conv2d(image.transpose(0, 1), grad_output.transpose(0, 1)).transpose(0, 1)
    else:
        thin = conv2d_weight(image, (out_channels, rank, *kernel), grad_output, stride=stride)
    return torch.conv2d(thin, channel[:, :, None, None])  # (O, r_C, kH, kW) to (O, C, kH, kW)


def linear_weight_grad(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Sequence[torch.Tensor], *, features_last: bool = False
) -> torch.Tensor:
    """Weight gradient of a linear layer from its input's core.

    Args:
        grad_output: `(B, N, O)`.
        core: `(B, r_N, r_D)`.
        factors: `U_N`, `U_D`.
        features_last: expand the features after the product with `grad_output`. The paper expands them before, which
            with the batch mode kept forms the whole input again.

    Returns:
        `(O, D)`.
    """
    token, feature = factors
    tokens = torch.einsum("bkr,nk->brn", core, token)
    if features_last:
        return torch.einsum("bno,brn->or", grad_output, tokens) @ feature.mT
    return torch.einsum("bno,bdn->od", grad_output, torch.einsum("brn,dr->bdn", tokens, feature))
