"""The convolution that keeps the projected patches of its input for the weight gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count

from lance_kernels.ops._checks import FLOATING, check, check_factors
from lance_kernels.ops._registry import apply, autocast_arguments, define, once_differentiable, without_autocast
from lance_kernels.ops.convolution import Geometry, _input_grad, _product, output_size
from lance_kernels.ops.linear import kept_factors, restore_core, scaled_factor
from lance_kernels.ops.pack_core import packed_bytes
from lance_kernels.ops.patch import core_shape
from lance_kernels.ops.tucker import Factors, mode_product_flops, ranks_of


def patch_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factor: torch.Tensor,
    spatial_factors: Factors,
    core_bits: int = 0,
    padding_mode: str = "zeros",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolution of `x` with `weight`, keeping the projected patches of `x` for the weight gradient.

    Args:
        x: `(B, C, *S)` with one to three spatial modes, float32, float64, bfloat16 or float16, any strides.
        weight: `(O, C / groups, *K)`, dtype of `x` (under autocast both are cast).
        bias: `(O,)` or None.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode.
        dilation: one number a spatial mode.
        groups: number of groups; divides C and O.
        factor: `(groups, C / groups * prod(K), rank)`; every weight gradient's rows lie in its span.
        spatial_factors: one `(S'_i, R_i)` matrix or None (mode kept) a spatial mode of the output.
        core_bits: 0 keeps the core in the dtype of `x`; 8, 4, 2 or 1 keep what `pack_core` makes of it.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        `y`, `(B, O, *S')`, exactly PyTorch's, and the core, `(B, groups * rank, *R)` (the packed buffer with
        `core_bits`; in float16 divided by a power of two, see `kept_factors`). `y` is differentiable once in `x`,
        `weight` and `bias`; the core carries no gradient. Kept for the backward pass: the core when `weight` needs a
        gradient, `weight` when `x` does, the factors.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit, a factor requires a gradient, or a second
            derivative is asked for.
    """
    y, core = torch.ops.lance.patch_convolution(
        x, weight, bias, stride, padding, dilation, groups, factor, list(spatial_factors), core_bits, padding_mode
    )
    return y, core


def patch_core(
    x: torch.Tensor, factor: torch.Tensor, spatial_factors: Factors, kernel: Sequence[int], geometry: Geometry
) -> torch.Tensor:
    """The projected patches of `x` with their spatial modes projected in turn, `(B, groups * rank, *R)`.

    Made with the factors of `kept_patch_factors`.
    """
    factor, spatial_factors = kept_patch_factors(factor, spatial_factors, x.dtype)
    core: torch.Tensor = torch.ops.lance.patch_project(x, factor, kernel, *geometry)
    if all(spatial is None for spatial in spatial_factors):
        return core
    projected: torch.Tensor = torch.ops.lance.tucker_project(core, [None, None, *spatial_factors])
    return projected


def kept_patch_factors(
    factor: torch.Tensor, spatial_factors: Factors, dtype: torch.dtype, expand: bool = False
) -> tuple[torch.Tensor, Factors]:
    """The factors that a kept core is made with, or expanded with; in float16 scaled as `kept_factors` does."""
    # Others are refused by what they are handed to.
    if dtype == torch.float16 and factor.dim() == 3 and factor.dtype in FLOATING:
        factor = scaled_factor(factor, factor.shape[1], expand)
    return factor, kept_factors(spatial_factors, dtype, expand)


def patch_core_size(
    size: Sequence[int], factor: torch.Tensor, spatial_factors: Factors, kernel: Sequence[int], geometry: Geometry
) -> list[int]:
    """Shape of what `patch_core` gives for an input of shape `size`."""
    samples, channels, *spatial = core_shape(size, factor.shape, kernel, geometry)
    return [samples, channels, *(s if f is None else f.shape[1] for s, f in zip(spatial, spatial_factors))]


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Geometry, spatial_factors: Factors
) -> torch.Tensor:
    y = _product(x, weight, bias, geometry, [None] * x.dim())
    check_factors("patch_convolution", "the output", y, [None, None, *spatial_factors], side=0)
    return y


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: Geometry,
    core_bits: int,
    factor: torch.Tensor,
    spatial_factors: Factors,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = _convolve(x, weight, bias, geometry, spatial_factors)
    core = patch_core(x, factor, spatial_factors, weight.shape[2:], geometry)
    return y, torch.ops.lance.pack_core(core, core_bits) if core_bits else core


class _PatchConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        core_bits: int,
        factor: torch.Tensor,
        *spatial_factors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check(
            not any(f is not None and f.requires_grad for f in (factor, *spatial_factors)),
            "lance::patch_convolution: a factor requires a gradient; expected fixed ones",
        )
        y, core = _forward(x, weight, bias, geometry, core_bits, factor, spatial_factors)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(core if needs_weight else None, weight if needs_x else None, factor, *spatial_factors)
        ctx.core_size = patch_core_size(x.shape, factor, spatial_factors, weight.shape[2:], geometry)
        ctx.geometry, ctx.core_bits, ctx.dtype = geometry, core_bits, x.dtype
        ctx.input_size, ctx.weight_size = x.shape, weight.shape
        ctx.mark_non_differentiable(core)
        ctx.set_materialize_grads(False)
        return y, core

    @staticmethod
    @once_differentiable("patch_convolution")
    def backward(ctx: Any, grad_output: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        core, weight, factor, *spatial_factors = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if grad_output is not None:
            if needs_x:
                grad_x = _input_grad(grad_output, weight, ctx.input_size, ctx.geometry)
            if needs_weight:
                core = restore_core(core, ctx.core_size, ctx.core_bits, None, 0, ctx.dtype)
                expanding = kept_patch_factors(factor, spatial_factors, ctx.dtype, expand=True)
                grad_weight = torch.ops.lance.patch_weight_grad(
                    grad_output, core, *expanding, ctx.weight_size, ctx.geometry.groups
                )
            if needs_bias:
                grad_bias = grad_output.sum(dim=[0, *range(2, grad_output.dim())])
        return grad_x, grad_weight, grad_bias, None, None, None, *[None] * len(spatial_factors)


def _split(
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    factor: Any,
    spatial_factors: Sequence[Any],
    core_bits: int = 0,
    padding_mode: str = "zeros",
) -> tuple[Geometry, int, Any, Sequence[Any]]:
    """Geometry, bits of the core and factors (their shapes, for FLOPs) from what follows the tensors in a call."""
    return Geometry.of(stride, padding, dilation, groups, padding_mode), core_bits, factor, spatial_factors


def _reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(x, weight, bias, *_split(*numbers))


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry, core_bits, factor, spatial_factors = _split(*numbers)
    y = _convolve(x, weight, bias, geometry, spatial_factors)
    core = patch_core(x, factor, spatial_factors, weight.shape[2:], geometry)
    return y, x.new_empty(packed_bytes(core.shape, core_bits), dtype=torch.uint8) if core_bits else core


def _autograd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry, core_bits, factor, spatial_factors = _split(*numbers)
    y, core = apply(_PatchConvolution, x, weight, bias, geometry, core_bits, factor, *spatial_factors)
    return y, core


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    x, weight, bias = autocast_arguments(x, weight, bias)
    with without_autocast():
        y, core = torch.ops.lance.patch_convolution(x, weight, bias, *args)
    return y, core


def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    *numbers: Any,
    **kwargs: Any,
) -> int:
    geometry, _, factor_shape, spatial_shapes = _split(*numbers)
    output = output_size(x_shape, weight_shape, geometry)
    product = conv_flop_count(list(x_shape), list(weight_shape), output, transposed=False)
    core = core_shape(x_shape, factor_shape, weight_shape[2:], geometry)
    project = 2 * math.prod(core) * factor_shape[1]
    return int(product + project) + mode_product_flops(core, [None, None, *ranks_of(spatial_shapes, side=1)])


define(
    "patch_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    'Tensor factor, Tensor?[] spatial_factors, int core_bits=0, str padding_mode="zeros") -> (Tensor, Tensor)',
    reference=_reference,
    fake=_fake,
    autograd=_autograd,
    autocast=_autocast,
    flops=_flops,
)
