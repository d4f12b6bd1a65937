"""Weight gradient of a convolution from the core of its input.

With `x_hat = core x_0 U_0 ...` in place of `x`, never formed, there are two ways, equal but for rounding. The shifted
one moves the spatial factors instead of the image: with `V_s[h', i, k] = U_s[stride h' + dilation i - padding, k]`,
`Q[b, o, i, k, ...] = sum_{h'...} grad_output[b, o, h', ...] V_s[h', i, k] ...` and
`grad_weight[o, c, i, ...] = sum_q U_C[c, q] sum_{b, k, ...} core[b, q, k, ...] Q[b, o, i, k, ...]`. The expanded one
expands the spatial modes of the core and takes the library's weight gradient on `rank_C` channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import accumulation_dtype, check, check_factors, check_same, kept_by_sizes
from lance_kernels.ops._padding import pad_pairs, pad_spatial, padded_rows, shifted_factor
from lance_kernels.ops._registry import define, not_differentiable, register_triton
from lance_kernels.ops.convolution import Geometry, bias_grad, check_geometry, output_size
from lance_kernels.ops.tucker import Factors, mode_product, mode_product_flops, ranks_of


def convolution_weight_grad(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Weight gradient of a convolution from the core of its input.

    Args:
        grad_output: `(B, O, *S')`, float32, float64, bfloat16 or float16, any strides.
        core: the input's core, one rank a mode, dtype of `grad_output`.
        factors: one `(size, rank)` matrix or None a mode of the input.
        weight_size: `(O, C / groups, *K)`.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode.
        dilation: one number a spatial mode.
        groups: number of groups.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        `(O, C / groups, *K)`, contiguous, dtype of `grad_output`, accumulated in float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit.
    """
    grad_weight: torch.Tensor = torch.ops.lance.convolution_weight_grad(
        grad_output, core, list(factors), weight_size, stride, padding, dilation, groups, padding_mode
    )
    return grad_weight


def _input_size(core_size: Sequence[int], factor_shapes: Sequence[Sequence[int] | None]) -> list[int]:
    return [rank if shape is None else shape[0] for rank, shape in zip(core_size, factor_shapes)]


def _shapes(factors: Factors) -> list[Sequence[int] | None]:
    return [None if factor is None else factor.shape for factor in factors]


@kept_by_sizes
def _checked_output(
    core_size: Sequence[int],
    factor_shapes: Sequence[Sequence[int] | None],
    weight_size: Sequence[int],
    geometry: Geometry,
) -> tuple[Sequence[int], Sequence[int]]:
    """Shapes of the input and of the output, once they fit the geometry."""
    input_size = _input_size(core_size, factor_shapes)
    check_geometry("convolution_weight_grad", input_size, weight_size, geometry)
    return input_size, output_size(input_size, weight_size, geometry)


def _check(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], geometry: Geometry
) -> None:
    check_factors("convolution_weight_grad", "core", core, factors, side=1)
    input_size, expected = _checked_output(core.shape, tuple(_shapes(factors)), tuple(weight_size), geometry)
    check(
        list(grad_output.shape) == expected,
        lambda: (
            f"lance::convolution_weight_grad: grad_output has shape {tuple(grad_output.shape)}; expected "
            f"{tuple(expected)} for an input of size {tuple(input_size)} and weight_size {tuple(weight_size)}"
        ),
    )
    check_same("convolution_weight_grad", grad_output, (("core", core),))


def _plan(
    core_size: Sequence[int],
    factor_shapes: Sequence[Sequence[int] | None],
    weight_size: Sequence[int],
    geometry: Geometry,
) -> tuple[bool, int]:
    """Whether the shifted way takes fewer operations than the expanded one, and the operations of the lesser."""
    outputs, group_channels, *kernel = weight_size
    batch_shape, channel_shape, *spatial_shapes = factor_shapes
    output = output_size(_input_size(core_size, factor_shapes), weight_size, geometry)
    samples = core_size[0]
    common = mode_product_flops(output, [samples, *[None] * (len(output) - 1)]) if batch_shape is not None else 0
    channels = min(core_size[1], group_channels)
    if channel_shape is not None:
        common += 2 * core_size[1] * (math.prod(weight_size) if channels == core_size[1] else math.prod(core_size))
    expanded = mode_product_flops(core_size, [None, None, *ranks_of(spatial_shapes, side=0)])
    expanded += 2 * samples * math.prod(output[1:]) * math.prod(kernel) * channels
    if any(shape is None for shape in spatial_shapes):
        return False, common + expanded
    taps = [size * rank for size, rank in zip(kernel, core_size[2:])]
    shifted = mode_product_flops([samples, *output[1:]], [None, None, *taps])
    shifted += 2 * samples * outputs * math.prod(taps) * channels
    return shifted < expanded, common + min(shifted, expanded)


def shifted_rows(factor: torch.Tensor, index: int, outputs: int, taps: int, geometry: Geometry) -> torch.Tensor:
    """The factor of spatial mode `index` as each tap of the kernel meets it, `(outputs, taps, rank)`."""
    pair = pad_pairs(geometry.padding, len(geometry.stride))[index]
    rows = padded_rows(factor.shape[0], *pair, geometry.padding_mode, factor.device)
    return shifted_factor(factor, rows, outputs, taps, geometry.stride[index], geometry.dilation[index])


def _weight_grad_shifted(
    grad: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], geometry: Geometry
) -> torch.Tensor:
    """The shifted way, for a core whose batch and channel modes are as wide as they will be contracted."""
    outputs, channels, *kernel = weight_size
    for index, taps in enumerate(kernel):
        factor = factors[2 + index]
        assert factor is not None
        shifted = shifted_rows(factor.to(grad.dtype), index, grad.shape[2 + index], taps, geometry)
        grad = mode_product(grad, shifted.flatten(1).mT, 2 + index)
    # Q: (B, groups, O / groups, K_1, r_1, K_2, r_2, ...) to (groups, O / groups, K_1, K_2, ..., B, r_1, r_2, ...)
    groups = geometry.groups
    taps_ranks = [extent for pair in zip(kernel, core.shape[2:]) for extent in pair]
    q = grad.reshape(core.shape[0], groups, outputs // groups, *taps_ranks)
    q = q.permute(1, 2, *range(3, q.dim(), 2), 0, *range(4, q.dim(), 2))
    q = q.reshape(groups, outputs // groups * math.prod(kernel), core.shape[0] * math.prod(core.shape[2:]))
    # core: (B, groups, channels, r_1, ...) to (groups, B * r_1 * ..., channels)
    kept = core.reshape(core.shape[0], groups, channels, -1).permute(1, 0, 3, 2)
    product = q @ kept.reshape(groups, -1, channels)
    return product.reshape(outputs, *kernel, channels).movedim(-1, 1)


def _weight_grad_expanded(
    grad: torch.Tensor, core: torch.Tensor, factors: Factors, weight_size: Sequence[int], geometry: Geometry
) -> torch.Tensor:
    """The expanded way, for a core whose batch and channel modes are as wide as they will be contracted."""
    kernel = weight_size[2:]
    for index in range(len(kernel)):
        factor = factors[2 + index]
        if factor is not None:
            core = mode_product(core, factor.to(core.dtype), 2 + index)
    core = pad_spatial(core, pad_pairs(geometry.padding, len(kernel)), geometry.padding_mode)
    if grad.numel() == 0 or core.numel() == 0:
        return grad.new_zeros(tuple(weight_size))
    product: torch.Tensor = torch.ops.aten.convolution_backward(
        grad,
        core,
        grad.new_empty(1).expand(tuple(weight_size)),
        None,
        geometry.stride,
        [0] * len(kernel),
        geometry.dilation,
        False,
        [0] * len(kernel),
        geometry.groups,
        [False, True, False],
    )[1]
    return product


def _weight_grad(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    weight_size: Sequence[int],
    geometry: Geometry,
    shifts: bool | None = None,
) -> torch.Tensor:
    _check(grad_output, core, factors, weight_size, geometry)
    wide = accumulation_dtype(core.dtype)
    if shifts is None:
        shifts, _ = _plan(core.shape, _shapes(factors), weight_size, geometry)
    grad, kept = grad_output.to(wide), core.to(wide)
    batch, feature, *_ = factors
    if batch is not None:
        grad = mode_product(grad, batch.to(wide).mT, 0)
    # The core's channels are contracted as ranks, or expanded first where a group has fewer channels than that.
    ranks_last = feature is not None and kept.shape[1] <= weight_size[1]
    if feature is not None and not ranks_last:
        kept = mode_product(kept, feature.to(wide), 1)
    way = _weight_grad_shifted if shifts else _weight_grad_expanded
    if not ranks_last:
        return way(grad, kept, factors, weight_size, geometry).to(grad_output.dtype).contiguous()
    assert feature is not None
    groups, rank = geometry.groups, kept.shape[1]
    # Every output channel with every rank, whatever the groups: (O, rank, *K)
    product = way(grad, kept, factors, [weight_size[0], rank, *weight_size[2:]], geometry._replace(groups=1))
    grouped = product.reshape(groups, weight_size[0] // groups, rank, -1)
    rows = feature.to(wide).reshape(groups, 1, weight_size[1], rank)
    return (rows @ grouped).reshape(tuple(weight_size)).to(grad_output.dtype)


def _reference(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    geometry = Geometry.of(stride, padding, dilation, groups, padding_mode)
    return _weight_grad(grad_output, core, factors, weight_size, geometry)


def _weight_bias_grad_reference(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    weight_grad = torch.ops.lance.convolution_weight_grad(grad_output, core, factors, *numbers)
    return weight_grad, bias_grad(grad_output)


def _fake(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factors: Factors,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    _check(grad_output, core, factors, weight_size, Geometry.of(stride, padding, dilation, groups, padding_mode))
    return grad_output.new_empty(list(weight_size))


def _weight_bias_grad_fake(
    grad_output: torch.Tensor, core: torch.Tensor, factors: Factors, *numbers: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(grad_output, core, factors, *numbers), grad_output.new_empty(grad_output.shape[1])


def weight_grad_flops(
    grad_shape: Sequence[int],
    core_size: Sequence[int],
    factor_shapes: Sequence[Sequence[int] | None],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
    **kwargs: Any,
) -> int:
    """Operations of the cheaper way, without those of a bias gradient."""
    geometry = Geometry.of(stride, padding, dilation, groups, padding_mode)
    return _plan(core_size, factor_shapes, weight_size, geometry)[1]


define(
    "convolution_weight_grad(Tensor grad_output, Tensor core, Tensor?[] factors, int[] weight_size, int[] stride, "
    'int[] padding, int[] dilation, int groups, str padding_mode="zeros") -> Tensor',
    reference=_reference,
    fake=_fake,
    autograd=not_differentiable("convolution_weight_grad"),
    flops=weight_grad_flops,
    tags=(torch.Tag.flexible_layout,),
)
define(
    "convolution_weight_bias_grad(Tensor grad_output, Tensor core, Tensor?[] factors, int[] weight_size, int[] stride, "
    'int[] padding, int[] dilation, int groups, str padding_mode="zeros") -> (Tensor, Tensor)',
    reference=_weight_bias_grad_reference,
    fake=_weight_bias_grad_fake,
    autograd=not_differentiable("convolution_weight_bias_grad"),
    flops=weight_grad_flops,
    tags=(torch.Tag.flexible_layout,),
)
register_triton("convolution_weight_grad")
register_triton("convolution_weight_bias_grad", "convolution_weight_grad")
