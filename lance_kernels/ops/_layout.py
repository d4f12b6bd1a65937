"""Memory order of tensors: operators that save by element keep the order in which the elements lie in memory.

An order is a permutation of the dimensions, slowest first: `[0, 1, 2, 3]` for a contiguous image batch, `[0, 2, 3, 1]`
for a channels_last one. Unlike strides it stays the same when a size changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lance_kernels.ops._checks import check


def memory_order(x: torch.Tensor) -> list[int]:
    """The dimensions of `x` from the slowest to the fastest in memory."""
    if x.is_contiguous():
        return list(range(x.dim()))
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1]
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return [0, 2, 3, 4, 1]
    # Where modes are expanded, the order of what elementwise operators of PyTorch give.
    strides = x.stride() if 0 not in x.stride() else torch.empty_like(x, device="meta").stride()
    return sorted(range(x.dim()), key=lambda dim: -strides[dim])


def memory_format_of(x: torch.Tensor) -> torch.memory_format:
    """The memory format of an image batch: channels_last where only that describes it, else contiguous."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format


def inverse_order(order: Sequence[int]) -> list[int]:
    """The permutation that undoes `order`."""
    inverse = [0] * len(order)
    for position, dim in enumerate(order):
        inverse[dim] = position
    return inverse


def _keeps(order: Sequence[int]) -> bool:
    return list(order) == list(range(len(order)))


def in_order(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """`x` with its dimensions permuted to `order`, contiguous; `x` or a view of it where it already lies so."""
    return x.contiguous() if _keeps(order) else x.permute(*order).contiguous()


def from_order(flat: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Undoes the permutation of `in_order`, as a view or `flat` itself."""
    return flat if _keeps(order) else flat.permute(*inverse_order(order))


def empty_in_order(x: torch.Tensor, order: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor of the shape of `x` whose memory follows `order`."""
    return from_order(x.new_empty([x.shape[dim] for dim in order], dtype=dtype), order)


def check_order(operator: str, x: torch.Tensor, order: Sequence[int]) -> None:
    """Refuses an order that is no permutation of the dimensions of `x`."""
    check(
        sorted(order) == list(range(x.dim())),
        lambda: (
            f"lance::{operator}: order is {list(order)}; expected a permutation of the {x.dim()} dimensions of a "
            f"tensor of shape {tuple(x.shape)}"
        ),
    )
