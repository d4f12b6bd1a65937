"""Patches of a convolution's input: their projection, their Gram matrices, and the weight gradient from projected ones.

The patch at an output position is what one output value is made of: the `C / groups` channels under the kernel, in the
order of a weight's row, `n = C / groups * prod(kernel)` values a group. A factor is `(groups, n, rank)`, one
orthonormal basis a group; projecting the patches is a convolution with its columns as filters. With
`core[b, g * rank + r, h'] = sum_i factor[g, i, r] patch[b, g, i, h']` in place of the patches,
`grad_weight[g, o, i] = sum_r factor[g, i, r] sum_{b, h'} grad_output[b, g, o, h'] core[b, g * rank + r, h']`, whose
rows lie in the factor's span: gradient projection (Saha et al., arXiv 2103.09762) without a dense gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import (
    accumulation_dtype,
    check,
    check_factors,
    check_floating,
    check_not_expanded,
    check_same,
)
from lance_kernels.ops._padding import pad_spatial
from lance_kernels.ops._registry import (
    apply,
    below_autograd,
    define,
    needs_grad,
    not_differentiable,
    register_triton,
    written,
)
from lance_kernels.ops.convolution import Geometry, _input_grad, _split_padding, check_geometry, output_size
from lance_kernels.ops.tucker import Factors, mode_product, mode_product_flops, ranks_of


def patch_project(
    x: torch.Tensor,
    factor: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> torch.Tensor:
    """Projects the patches of `x` onto a factor a group.

    Args:
        x: `(B, C, *S)` with one to three spatial modes, float32, float64, bfloat16 or float16, any strides.
        factor: `(groups, C / groups * prod(kernel), rank)` of any floating dtype, rows in the order of a weight's.
        kernel: one number a spatial mode.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode; padded positions are part of patches.
        dilation: one number a spatial mode.
        groups: number of groups; divides C.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Returns:
        The core, `(B, groups * rank, *S')` with `S'` the convolution's output positions; contiguous, dtype of `x`,
        accumulated in float32 (float64 for float64). Differentiable in `x`.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit, or the factor requires a gradient.
    """
    core: torch.Tensor = torch.ops.lance.patch_project(
        x, factor, kernel, stride, padding, dilation, groups, padding_mode
    )
    return core


def patch_gram_(
    gram: torch.Tensor,
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str = "zeros",
) -> None:
    """Adds the Gram matrices of the patches of `x` to running ones, in place.

    Args:
        gram: `(groups, n, n)` with `n = C / groups * prod(kernel)`, float32 or float64; float64 for float64 `x`.
        x: `(B, C, *S)` with one to three spatial modes, float32, float64, bfloat16 or float16, any strides.
        kernel: one number a spatial mode.
        stride: one number a spatial mode.
        padding: one number a spatial mode, or two (before, after), mode by mode; padded positions are part of patches.
        dilation: one number a spatial mode.
        groups: number of groups; divides C.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit; `gram` is left as it was.
    """
    check(not gram.is_neg(), "lance::patch_gram_: gram is a view that negates; expected gram.resolve_neg()")
    torch.ops.lance.patch_gram_(gram, x, kernel, stride, padding, dilation, groups, padding_mode)


def patch_weight_grad(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factor: torch.Tensor,
    spatial_factors: Factors,
    weight_size: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """Weight gradient of a convolution from its projected patches.

    Args:
        grad_output: `(B, O, *S')`, float32, float64, bfloat16 or float16, any strides.
        core: `(B, groups * rank, *R)`, dtype of `grad_output`: what `patch_project` gave, its spatial modes projected
            onto `spatial_factors`.
        factor: `(groups, n, rank)`, that of the projection.
        spatial_factors: one `(S'_i, R_i)` matrix or None (mode kept) a spatial mode.
        weight_size: `(O, C / groups, *K)`.
        groups: number of groups.

    Returns:
        `(O, C / groups, *K)`, contiguous, dtype of `grad_output`, accumulated in float32 (float64 for float64).

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers do not fit.
    """
    grad_weight: torch.Tensor = torch.ops.lance.patch_weight_grad(
        grad_output, core, factor, list(spatial_factors), weight_size, groups
    )
    return grad_weight


def check_patches(
    operator: str, x: torch.Tensor, kernel: Sequence[int], geometry: Geometry, filters: int = 1
) -> Sequence[tuple[int, int]]:
    """Refuses patches that `x` does not have.

    Args:
        operator: operator named in the message.
        x: the input.
        kernel: one number a spatial mode.
        geometry: the convolution's numbers.
        filters: filters a group that the patches will meet.

    Returns:
        The padding, one (before, after) pair a spatial mode.
    """
    check_floating(operator, "x", x)
    groups = geometry.groups
    check(
        groups >= 1 and x.dim() > 1 and x.shape[1] % groups == 0,
        f"lance::{operator}: groups is {groups}; expected a divisor of C of x, whose shape is {tuple(x.shape)}",
    )
    return check_geometry(operator, x.shape, (groups * filters, x.shape[1] // groups, *kernel), geometry)


def _check_factor(operator: str, factor: torch.Tensor, groups: int, size: int, tensor: torch.Tensor) -> None:
    check_floating(operator, "factor", factor)
    check(
        factor.dim() == 3 and factor.shape[0] == groups and factor.shape[1] == size and factor.shape[2] > 0,
        f"lance::{operator}: factor has shape {tuple(factor.shape)}; expected ({groups}, {size}, rank) with rank >= 1, "
        "one basis of the patches a group",
    )
    check(
        factor.device == tensor.device,
        f"lance::{operator}: factor is on {factor.device}; expected {tensor.device}, where the first argument is",
    )


def _patch_size(x: torch.Tensor, kernel: Sequence[int], groups: int) -> int:
    return x.shape[1] // groups * math.prod(kernel)


def _filters(factor: torch.Tensor, channels: int, kernel: Sequence[int]) -> torch.Tensor:
    """The columns of `(groups, n, rank)` as filters, `(groups * rank, C / groups, *K)`."""
    return factor.mT.reshape(factor.shape[0] * factor.shape[2], channels, *kernel)


def _check_project(
    x: torch.Tensor, factor: torch.Tensor, kernel: Sequence[int], geometry: Geometry
) -> Sequence[tuple[int, int]]:
    pairs = check_patches("patch_project", x, kernel, geometry)
    _check_factor("patch_project", factor, geometry.groups, _patch_size(x, kernel, geometry.groups), x)
    return pairs


def _project_reference(x: torch.Tensor, factor: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> torch.Tensor:
    geometry = Geometry.of(*numbers)
    pairs = _check_project(x, factor, kernel, geometry)
    wide = accumulation_dtype(x.dtype)
    filters = _filters(factor.to(wide), x.shape[1] // geometry.groups, kernel)
    inner, outer = _split_padding(pairs, geometry.padding_mode)
    core: torch.Tensor = torch.ops.aten.convolution(
        pad_spatial(x.to(wide), outer, geometry.padding_mode),
        filters,
        None,
        geometry.stride,
        inner,
        geometry.dilation,
        False,
        [0] * len(pairs),
        geometry.groups,
    )
    return core.to(x.dtype).contiguous()


def _project_fake(x: torch.Tensor, factor: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> torch.Tensor:
    geometry = Geometry.of(*numbers)
    _check_project(x, factor, kernel, geometry)
    return x.new_empty(core_shape(x.shape, factor.shape, kernel, geometry))


def core_shape(
    size: Sequence[int], factor_shape: Sequence[int], kernel: Sequence[int], geometry: Geometry
) -> list[int]:
    """Shape of the projected patches of an input of shape `size`."""
    groups = geometry.groups
    return output_size(size, [groups * factor_shape[2], size[1] // groups, *kernel], geometry)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, factor: torch.Tensor, kernel: Sequence[int], geometry: Geometry
    ) -> torch.Tensor:
        ctx.save_for_backward(factor)
        ctx.size, ctx.kernel, ctx.geometry = x.shape, kernel, geometry
        with below_autograd():
            return patch_project(x, factor, kernel, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors
        filters = _filters(factor.to(grad.dtype), ctx.size[1] // ctx.geometry.groups, ctx.kernel)
        return _input_grad(grad, filters, ctx.size, ctx.geometry), None, None, None


def _project_autograd(x: torch.Tensor, factor: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> torch.Tensor:
    check(not factor.requires_grad, "lance::patch_project: factor requires a gradient; expected a fixed one")
    geometry = Geometry.of(*numbers)
    core: torch.Tensor = apply(_Project, x, factor, kernel, geometry)
    return core


def _project_flops(
    shape: Sequence[int],
    factor_shape: Sequence[int],
    kernel: Sequence[int],
    *args: Any,
    out_shape: Sequence[int],
    **kwargs: Any,
) -> int:
    return 2 * math.prod(out_shape) * factor_shape[1]


def _check_gram(gram: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> None:
    check_patches("patch_gram_", x, kernel, geometry)
    groups, size = geometry.groups, _patch_size(x, kernel, geometry.groups)
    check(
        gram.dim() == 3 and gram.shape[0] == groups and gram.shape[1] == size and gram.shape[2] == size,
        f"lance::patch_gram_: gram has shape {tuple(gram.shape)}; expected ({groups}, {size}, {size}) for the patches "
        f"of x, whose shape is {tuple(x.shape)}",
    )
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    check(
        gram.dtype in allowed,
        f"lance::patch_gram_: gram has dtype {gram.dtype}; expected {' or '.join(map(str, allowed))} for x of "
        f"{x.dtype}",
    )
    check(
        gram.device == x.device,
        f"lance::patch_gram_: gram is on {gram.device}; expected {x.device}, where x is",
    )
    check_not_expanded("patch_gram_", "gram", gram)


def patches_of(x: torch.Tensor, kernel: Sequence[int], geometry: Geometry) -> torch.Tensor:
    """The patches of `x` as columns: `(groups, n, B * prod(S'))`, a copy."""
    dimensions, groups = len(kernel), geometry.groups
    pairs = check_patches("patch_gram_", x, kernel, geometry)
    windows = pad_spatial(x, pairs, geometry.padding_mode)
    for index, (taps, stride, dilation) in enumerate(zip(kernel, geometry.stride, geometry.dilation)):
        windows = windows.unfold(2 + index, dilation * (taps - 1) + 1, stride)[..., ::dilation]
    # (B, C, *S', *K) to (C, *K, B, *S')
    taps_first = [1, *range(2 + dimensions, 2 + 2 * dimensions), 0, *range(2, 2 + dimensions)]
    size = _patch_size(x, kernel, groups)
    return windows.permute(taps_first).reshape(groups, size, x.shape[0] * windows.shape[2 : 2 + dimensions].numel())


def _gram_reference(gram: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> None:
    geometry = Geometry.of(*numbers)
    _check_gram(gram, x, kernel, geometry)
    wide = accumulation_dtype(x.dtype)
    total = torch.zeros(gram.shape, dtype=wide, device=gram.device)
    # One sample's patches at a time: all of them are prod(kernel) times as large as x.
    for sample in x.to(wide).split(1):
        patches = patches_of(sample, kernel, geometry)
        total.baddbmm_(patches, patches.mT)
    gram.add_(total)


def _gram_fake(gram: torch.Tensor, x: torch.Tensor, kernel: Sequence[int], *numbers: Any) -> None:
    _check_gram(gram, x, kernel, Geometry.of(*numbers))


def _gram_autograd(gram: torch.Tensor, x: torch.Tensor, *args: Any) -> None:
    check(
        not needs_grad(gram, x),
        "lance::patch_gram_ has no derivative; detach its inputs or call it under torch.no_grad()",
    )
    with below_autograd():
        torch.ops.lance.patch_gram_(gram, x, *args)
    written(gram)


def _gram_flops(
    gram_shape: Sequence[int], shape: Sequence[int], kernel: Sequence[int], *numbers: Any, **kwargs: Any
) -> int:
    geometry = Geometry.of(*numbers)
    positions = output_size(shape, [geometry.groups, shape[1] // geometry.groups, *kernel], geometry)
    return 2 * math.prod(gram_shape) * positions[0] * math.prod(positions[2:])


def _check_weight_grad(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factor: torch.Tensor,
    spatial_factors: Factors,
    weight_size: Sequence[int],
    groups: int,
) -> None:
    operator = "patch_weight_grad"
    check(
        len(weight_size) >= 3 and groups >= 1 and weight_size[0] % groups == 0,
        f"lance::{operator}: weight_size is {list(weight_size)} and groups {groups}; expected (O, C / groups, *kernel) "
        "and O a multiple of groups",
    )
    check(
        len(spatial_factors) == len(weight_size) - 2 == core.dim() - 2,
        f"lance::{operator}: spatial_factors has {len(spatial_factors)} entries; expected {len(weight_size) - 2}, one "
        f"a spatial mode of core, whose shape is {tuple(core.shape)}",
    )
    check_factors(operator, "core", core, [None, None, *spatial_factors], side=1)
    _check_factor(operator, factor, groups, math.prod(weight_size[1:]), grad_output)
    check(
        core.shape[1] == groups * factor.shape[2],
        f"lance::{operator}: core has shape {tuple(core.shape)}; expected {groups * factor.shape[2]} channels, groups "
        f"times the rank of factor, whose shape is {tuple(factor.shape)}",
    )
    spatial = [size if f is None else f.shape[0] for size, f in zip(core.shape[2:], spatial_factors)]
    check(
        list(grad_output.shape) == [core.shape[0], weight_size[0], *spatial],
        f"lance::{operator}: grad_output has shape {tuple(grad_output.shape)}; expected "
        f"{(core.shape[0], weight_size[0], *spatial)}, as core, spatial_factors and weight_size give it",
    )
    check_same(operator, grad_output, (("core", core),))


def _weight_grad_plan(
    grad_shape: Sequence[int],
    core_size: Sequence[int],
    factor_shape: Sequence[int],
    spatial_shapes: Sequence[Sequence[int] | None],
) -> tuple[bool, int]:
    """Whether to project `grad_output` onto the spatial factors, or else expand the core; and the operations needed."""
    products = 2 * grad_shape[0] * grad_shape[1] * factor_shape[2]
    project = mode_product_flops(grad_shape, [None, None, *ranks_of(spatial_shapes, side=1)])
    project += products * math.prod(core_size[2:])
    expand = mode_product_flops(core_size, [None, None, *ranks_of(spatial_shapes, side=0)])
    expand += products * math.prod(grad_shape[2:])
    return project < expand, min(project, expand) + 2 * grad_shape[1] * factor_shape[1] * factor_shape[2]


def _weight_grad_reference(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factor: torch.Tensor,
    spatial_factors: Factors,
    weight_size: Sequence[int],
    groups: int,
) -> torch.Tensor:
    _check_weight_grad(grad_output, core, factor, spatial_factors, weight_size, groups)
    wide = accumulation_dtype(core.dtype)
    grad, kept = grad_output.to(wide), core.to(wide)
    shapes = [None if f is None else f.shape for f in spatial_factors]
    projects, _ = _weight_grad_plan(grad.shape, kept.shape, factor.shape, shapes)
    matrices = [(2 + index, f.to(wide)) for index, f in enumerate(spatial_factors) if f is not None]
    for mode, matrix in sorted(matrices, key=lambda entry: entry[1].shape[1] / max(entry[1].shape[0], 1)):
        if projects:
            grad = mode_product(grad, matrix.mT, mode)
        else:
            kept = mode_product(kept, matrix, mode)
    samples, outputs, rank = grad.shape[0], grad.shape[1], factor.shape[2]
    positions = samples * grad.shape[2:].numel()
    # (groups, O / groups, B * positions) and (groups, B * positions, rank)
    rows = grad.reshape(samples, groups, outputs // groups, positions // max(samples, 1)).permute(1, 2, 0, 3)
    columns = kept.reshape(samples, groups, rank, positions // max(samples, 1)).permute(1, 0, 3, 2)
    product = rows.reshape(groups, outputs // groups, positions) @ columns.reshape(groups, positions, rank)
    return (product @ factor.to(wide).mT).reshape(tuple(weight_size)).to(grad_output.dtype)


def _weight_grad_fake(
    grad_output: torch.Tensor,
    core: torch.Tensor,
    factor: torch.Tensor,
    spatial_factors: Factors,
    weight_size: Sequence[int],
    groups: int,
) -> torch.Tensor:
    _check_weight_grad(grad_output, core, factor, spatial_factors, weight_size, groups)
    return grad_output.new_empty(list(weight_size))


def _weight_grad_flops(
    grad_shape: Sequence[int],
    core_size: Sequence[int],
    factor_shape: Sequence[int],
    spatial_shapes: Sequence[Sequence[int] | None],
    *args: Any,
    **kwargs: Any,
) -> int:
    return _weight_grad_plan(grad_shape, core_size, factor_shape, spatial_shapes)[1]


define(
    "patch_project(Tensor x, Tensor factor, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    'str padding_mode="zeros") -> Tensor',
    reference=_project_reference,
    fake=_project_fake,
    autograd=_project_autograd,
    flops=_project_flops,
)
define(
    "patch_gram_(Tensor(a!) gram, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, "
    'str padding_mode="zeros") -> ()',
    reference=_gram_reference,
    fake=_gram_fake,
    autograd=_gram_autograd,
    flops=_gram_flops,
)
define(
    "patch_weight_grad(Tensor grad_output, Tensor core, Tensor factor, Tensor?[] spatial_factors, int[] weight_size, "
    "int groups) -> Tensor",
    reference=_weight_grad_reference,
    fake=_weight_grad_fake,
    autograd=not_differentiable("patch_weight_grad"),
    flops=_weight_grad_flops,
)
register_triton("patch_gram_", "patch")
