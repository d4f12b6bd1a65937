"""Mode-n products with every factor of a call: `tucker_project` (to the core) and `tucker_reconstruct` (back).

For `x` of `N` modes and factors `U_n` of shape `(size_n, rank_n)`, in the notation of Kolda and Bader ("Tensor
Decompositions and Applications", SIAM Review 2009), `core = x x_0 U_0^T ... x_{N-1} U_{N-1}^T` and
`x_hat = core x_0 U_0 ... x_{N-1} U_{N-1}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import accumulation_dtype, check, check_factors, factors_require_grad
from lance_kernels.ops._registry import apply, below_autograd, define, needs_grad, register_triton

Factors = Sequence[torch.Tensor | None]


def tucker_project(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Projects every mode of `x` onto its factor.

    Args:
        x: `(size_0, ..., size_{N-1})`, float32, float64, bfloat16 or float16, any strides.
        factors: one entry a mode, `(size_n, rank_n)` of any floating dtype, or None, which keeps the mode.

    Returns:
        The core, `(rank_0, ..., rank_{N-1})` with `size_n` where the factor is None; contiguous, dtype of `x`,
        accumulated in float32 (float64 for float64). Differentiable in `x`.

    Raises:
        RuntimeError: the factors do not fit `x`, or one of them requires a gradient.
    """
    core: torch.Tensor = torch.ops.lance.tucker_project(x, list(factors))
    return core


def tucker_reconstruct(core: torch.Tensor, factors: Factors) -> torch.Tensor:
    """Expands every mode of `core` by its factor, the transpose of `tucker_project`.

    Args:
        core: `(rank_0, ..., rank_{N-1})`, float32, float64, bfloat16 or float16, any strides.
        factors: one entry a mode, `(size_n, rank_n)` of any floating dtype, or None, which keeps the mode.

    Returns:
        `(size_0, ..., size_{N-1})`; contiguous, dtype of `core`, accumulated as in `tucker_project`. Differentiable in
        `core`.

    Raises:
        RuntimeError: the factors do not fit `core`, or one of them requires a gradient.
    """
    x_hat: torch.Tensor = torch.ops.lance.tucker_reconstruct(core, list(factors))
    return x_hat


def mode_product(x: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """Mode-n product `x x_n matrix` for `matrix` of shape `(rows, x.shape[mode])`; contiguous."""
    if mode == x.dim() - 1:
        return x @ matrix.mT
    flat = x.reshape(x.shape[:mode].numel(), x.shape[mode], x.shape[mode + 1 :].numel())
    return (matrix @ flat).reshape(*x.shape[:mode], matrix.shape[0], *x.shape[mode + 1 :])


def _apply(x: torch.Tensor, matrices: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    # The product that shrinks most goes first.
    out = x.to(accumulation_dtype(x.dtype))
    for mode, matrix in sorted(matrices, key=lambda entry: entry[1].shape[0] / max(entry[1].shape[1], 1)):
        out = mode_product(out, matrix.to(out.dtype), mode)
    out = out.to(x.dtype)
    return out.clone(memory_format=torch.contiguous_format) if out is x else out.contiguous()


def _project_reference(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    check_factors("tucker_project", "x", x, factors, side=0)
    return _apply(x, [(mode, factor.mT) for mode, factor in enumerate(factors) if factor is not None])


def _reconstruct_reference(core: torch.Tensor, factors: Factors) -> torch.Tensor:
    check_factors("tucker_reconstruct", "core", core, factors, side=1)
    return _apply(core, [(mode, factor) for mode, factor in enumerate(factors) if factor is not None])


def _project_fake(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    check_factors("tucker_project", "x", x, factors, side=0)
    return x.new_empty([size if factor is None else factor.shape[1] for size, factor in zip(x.shape, factors)])


def _reconstruct_fake(core: torch.Tensor, factors: Factors) -> torch.Tensor:
    check_factors("tucker_reconstruct", "core", core, factors, side=1)
    return core.new_empty([size if factor is None else factor.shape[0] for size, factor in zip(core.shape, factors)])


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *factors: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*factors)
        with below_autograd():
            return tucker_project(x, factors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tucker_reconstruct(grad, ctx.saved_tensors), *[None] * len(ctx.saved_tensors)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, core: torch.Tensor, *factors: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*factors)
        with below_autograd():
            return tucker_reconstruct(core, factors)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return tucker_project(grad, ctx.saved_tensors), *[None] * len(ctx.saved_tensors)


def _autograd(function: type[torch.autograd.Function], below: Callable[..., torch.Tensor]) -> Any:
    def kernel(tensor: torch.Tensor, factors: Factors) -> torch.Tensor:
        check(not factors_require_grad(factors), "lance: factors require a gradient; expected fixed factors")
        if needs_grad(tensor, *factors):
            result: torch.Tensor = apply(function, tensor, *factors)
            return result
        with below_autograd():
            return below(tensor, factors)

    return kernel


def mode_product_flops(shape: Sequence[int], ranks: Sequence[int | None]) -> int:
    """Floating point operations of the mode-n products that take `shape` to `ranks`, most shrinking product first."""
    sizes, total = list(shape), 0
    pairs = [(mode, rank) for mode, rank in enumerate(ranks) if rank is not None]
    for mode, rank in sorted(pairs, key=lambda pair: pair[1] / max(shape[pair[0]], 1)):
        total += 2 * rank * math.prod(sizes)
        sizes[mode] = rank
    return total


def ranks_of(factor_shapes: Sequence[Sequence[int] | None], side: int) -> list[int | None]:
    """The factors' ranks (`side` 1) or sizes (`side` 0), None where there is no factor."""
    return [None if shape is None else shape[side] for shape in factor_shapes]


def _flops(side: int) -> Any:
    def flops(shape: Sequence[int], factor_shapes: Sequence[Sequence[int] | None], *args: Any, **kwargs: Any) -> int:
        return mode_product_flops(shape, ranks_of(factor_shapes, side))

    return flops


define(
    "tucker_project(Tensor x, Tensor?[] factors) -> Tensor",
    reference=_project_reference,
    fake=_project_fake,
    autograd=_autograd(_Project, tucker_project),
    flops=_flops(side=1),
    tags=(torch.Tag.flexible_layout,),
)
define(
    "tucker_reconstruct(Tensor core, Tensor?[] factors) -> Tensor",
    reference=_reconstruct_reference,
    fake=_reconstruct_fake,
    autograd=_autograd(_Reconstruct, tucker_reconstruct),
    flops=_flops(side=0),
)
register_triton("tucker_project", "tucker")
