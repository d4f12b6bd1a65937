"""Argument checks and small shape rules shared by the operator families."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Of a stride, padding or dilation: no sum or product of one with a size overflows.
MOST_NUMBER = 2**31 - 1


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """Raises `RuntimeError(message)` unless `condition` holds, as PyTorch's own operators do.

    Args:
        condition: what has to hold.
        message: what is said otherwise; a function, called only then, where a call of an operator pays for its words.
    """
    if not condition:
        raise RuntimeError(message if isinstance(message, str) else message())


def kept_by_sizes(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function of sizes and numbers: it keeps its results where all arguments are hashable.

    Sizes that a tracer has left open are not.
    """
    kept = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def found(*args: object) -> Result:
        try:
            return kept(*args)
        except TypeError:
            return function(*args)

    return found


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums over a tensor of `dtype` are kept: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_floating(operator: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor that is not float32, float64, bfloat16 or float16."""
    check(
        tensor.dtype in FLOATING,
        lambda: (
            f"lance::{operator}: {argument} has dtype {tensor.dtype}; expected float32, float64, bfloat16 or float16"
        ),
    )


def check_factors(
    operator: str, argument: str, tensor: torch.Tensor, factors: Sequence[torch.Tensor | None], side: int
) -> None:
    """Refuses factors that do not fit `tensor`.

    Args:
        operator: operator named in the message.
        argument: name of `tensor` in the message.
        tensor: the tensor whose modes the factors belong to.
        factors: one `(size, rank)` matrix or None a mode.
        side: 0 when the modes of `tensor` have the factors' sizes (an input), 1 when they have their ranks (a core).

    Raises:
        RuntimeError: a factor's number, shape, dtype or device does not fit.
    """
    check_floating(operator, argument, tensor)
    check(
        len(factors) == tensor.dim(),
        lambda: (
            f"lance::{operator}: factors has {len(factors)} entries; expected one a mode of {argument}, "
            f"whose shape is {tuple(tensor.shape)}"
        ),
    )
    for mode, factor in enumerate(factors):
        if factor is None:
            continue
        shape = factor.shape
        check_floating(operator, f"factors[{mode}]", factor)
        if len(shape) != 2 or shape[1] < 1:
            raise RuntimeError(
                f"lance::{operator}: factors[{mode}] has shape {tuple(shape)}; expected (size, rank) with rank >= 1"
            )
        if shape[side] != tensor.shape[mode]:
            raise RuntimeError(
                f"lance::{operator}: factors[{mode}] has shape {tuple(shape)}; expected its "
                f"{'rank' if side else 'size'} to be that of mode {mode} of {argument}, whose shape is "
                f"{tuple(tensor.shape)}"
            )
        if factor.device != tensor.device:
            raise RuntimeError(
                f"lance::{operator}: factors[{mode}] is on {factor.device}; expected {tensor.device}, where {argument} "
                "is"
            )


def check_same(operator: str, first: torch.Tensor, others: Sequence[tuple[str, torch.Tensor | None]]) -> None:
    """Refuses tensors whose dtype or device is not that of the operator's first argument."""
    for argument, tensor in others:
        if tensor is not None and (tensor.dtype != first.dtype or tensor.device != first.device):
            raise RuntimeError(
                f"lance::{operator}: {argument} is {tensor.dtype} on {tensor.device}; expected {first.dtype} on "
                f"{first.device}, as the first argument"
            )


def check_not_expanded(operator: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuses to add to a tensor of which several entries lie in one place."""
    check(
        all(size < 2 or stride != 0 for size, stride in zip(tensor.shape, tensor.stride())),
        lambda: (
            f"lance::{operator}: {argument} has strides {list(tensor.stride())}; expected a place for each entry, none "
            "expanded"
        ),
    )


def factors_require_grad(factors: Sequence[torch.Tensor | None]) -> bool:
    """Whether any of the factors asks for a gradient, which no operator gives."""
    return any(factor is not None and factor.requires_grad for factor in factors)
