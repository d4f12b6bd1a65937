"""Gram matrices of mode-n unfoldings and their eigenvectors, the two steps of the one-shot HOSVD.

`G_n = unfold(x, n) unfold(x, n)^T`; its leading eigenvectors are the leading left singular vectors of the unfolding,
the mode-n factor of the HOSVD (De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 2000).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.ops._checks import accumulation_dtype, check, check_floating, check_not_expanded
from lance_kernels.ops._registry import below_autograd, define, needs_grad, not_differentiable, written


def mode_gram(x: torch.Tensor, mode: int) -> torch.Tensor:
    """Gram matrix of the mode-`mode` unfolding of `x`.

    Args:
        x: any shape of at least one mode, float32, float64, bfloat16 or float16, any strides.
        mode: the mode, from `-x.dim()` to `x.dim() - 1`.

    Returns:
        `(size_mode, size_mode)`, symmetric, float32 (float64 for float64 `x`).

    Raises:
        RuntimeError: `mode` is out of range, or the dtype is not a floating one.
    """
    gram: torch.Tensor = torch.ops.lance.mode_gram(x, mode)
    return gram


def mode_grams_(grams: Sequence[torch.Tensor], x: torch.Tensor, modes: Sequence[int]) -> None:
    """Adds the Gram matrices of several modes of `x` to running ones, in place.

    Args:
        grams: one `(size_n, size_n)` float32 or float64 matrix a mode; float64 for float64 `x`.
        x: any shape, float32, float64, bfloat16 or float16, any strides.
        modes: the modes, each once, from `-x.dim()` to `x.dim() - 1`.

    Raises:
        RuntimeError: numbers, shapes, dtypes or devices do not fit; `grams` are left as they were.
    """
    torch.ops.lance.mode_grams_(list(grams), x, list(modes))


def gram_eigh(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a Gram matrix, computed in float64 where the matrix is.

    It waits for the device to refuse NaN and infinity, so a CUDA graph cannot capture it.

    Args:
        gram: `(size, size)` symmetric positive semidefinite, float32 or float64; zero is fine.

    Returns:
        The eigenvalues, descending and not below zero, `(size,)`, and the eigenvectors as columns, `(size, size)`, each
        with its entry of largest magnitude positive; both in the dtype of `gram`.

    Raises:
        RuntimeError: `gram` is not square, not float32 or float64, or holds NaN or infinity.
    """
    eigenvalues, eigenvectors = torch.ops.lance.gram_eigh(gram)
    return eigenvalues, eigenvectors


def _check_mode(operator: str, x: torch.Tensor, mode: int) -> int:
    check_floating(operator, "x", x)
    check(
        -x.dim() <= mode < x.dim(),
        f"lance::{operator}: mode is {mode}; expected one of the {x.dim()} modes of x, whose shape is {tuple(x.shape)}",
    )
    return mode % x.dim()


def _check_grams(grams: Sequence[torch.Tensor], x: torch.Tensor, modes: Sequence[int]) -> list[int]:
    check(
        len(grams) == len(modes),
        f"lance::mode_grams_: grams has {len(grams)} entries; expected one for each of modes {list(modes)}",
    )
    wrapped = [_check_mode("mode_grams_", x, mode) for mode in modes]
    check(len(set(wrapped)) == len(wrapped), f"lance::mode_grams_: modes {list(modes)} names a mode twice")
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    for index, (gram, mode) in enumerate(zip(grams, wrapped)):
        size = x.shape[mode]
        check(
            gram.dim() == 2 and gram.shape[0] == size and gram.shape[1] == size,
            f"lance::mode_grams_: grams[{index}] has shape {tuple(gram.shape)}; expected ({size}, {size}) for mode "
            f"{mode} of x, whose shape is {tuple(x.shape)}",
        )
        check(
            gram.dtype in allowed,
            f"lance::mode_grams_: grams[{index}] has dtype {gram.dtype}; expected {' or '.join(map(str, allowed))} "
            f"for x of {x.dtype}",
        )
        check(
            gram.device == x.device,
            f"lance::mode_grams_: grams[{index}] is on {gram.device}; expected {x.device}, where x is",
        )
        check_not_expanded("mode_grams_", f"grams[{index}]", gram)
    return wrapped


def _gram(x: torch.Tensor, mode: int, dtype: torch.dtype) -> torch.Tensor:
    other = [index for index in range(x.dim()) if index != mode]
    wide = x.to(dtype)
    gram: torch.Tensor = torch.tensordot(wide, wide, dims=(other, other))
    return gram


def _mode_gram_reference(x: torch.Tensor, mode: int) -> torch.Tensor:
    mode = _check_mode("mode_gram", x, mode)
    return _gram(x, mode, accumulation_dtype(x.dtype))


def _mode_gram_fake(x: torch.Tensor, mode: int) -> torch.Tensor:
    size = x.shape[_check_mode("mode_gram", x, mode)]
    return x.new_empty((size, size), dtype=accumulation_dtype(x.dtype))


def _mode_grams_reference(grams: Sequence[torch.Tensor], x: torch.Tensor, modes: Sequence[int]) -> None:
    for gram, mode in zip(grams, _check_grams(grams, x, modes)):
        gram.add_(_gram(x, mode, accumulation_dtype(x.dtype)))


def _mode_grams_fake(grams: Sequence[torch.Tensor], x: torch.Tensor, modes: Sequence[int]) -> None:
    _check_grams(grams, x, modes)


def _check_square(gram: torch.Tensor) -> None:
    check(
        gram.dim() == 2 and gram.shape[0] == gram.shape[1],
        f"lance::gram_eigh: gram has shape {tuple(gram.shape)}; expected a square matrix",
    )
    check(
        gram.dtype in (torch.float32, torch.float64),
        f"lance::gram_eigh: gram has dtype {gram.dtype}; expected float32 or float64",
    )


def _gram_eigh_reference(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_square(gram)
    check(bool(gram.isfinite().all()), "lance::gram_eigh: gram holds NaN or infinity; expected finite values")
    size = gram.shape[0]
    if size == 0:
        return gram.new_empty(0), gram.new_empty((0, 0))
    wide = gram.double()
    eigenvalues, eigenvectors = torch.linalg.eigh((wide + wide.mT) / 2)
    eigenvalues, eigenvectors = eigenvalues.flip(0).clamp_min(0), eigenvectors.flip(1)
    largest = eigenvectors.gather(0, eigenvectors.abs().argmax(dim=0, keepdim=True))
    return eigenvalues.to(gram.dtype), (eigenvectors * largest.sign()).to(gram.dtype).contiguous()


def _gram_eigh_fake(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_square(gram)
    return gram.new_empty(gram.shape[0]), gram.new_empty(gram.shape)


def _mode_grams_autograd(grams: Sequence[torch.Tensor], x: torch.Tensor, modes: Sequence[int]) -> None:
    check(
        not needs_grad(x, *grams),
        "lance::mode_grams_ has no derivative; detach its inputs or call it under torch.no_grad()",
    )
    with below_autograd():
        mode_grams_(grams, x, modes)
    written(*grams)


def _mode_gram_flops(shape: Sequence[int], mode: int, **kwargs: Any) -> int:
    return 2 * math.prod(shape) * shape[mode]


def _mode_grams_flops(
    gram_shapes: Sequence[Sequence[int]], shape: Sequence[int], modes: Sequence[int], **kwargs: Any
) -> int:
    return sum(_mode_gram_flops(shape, mode) for mode in modes)


define(
    "mode_gram(Tensor x, int mode) -> Tensor",
    reference=_mode_gram_reference,
    fake=_mode_gram_fake,
    autograd=not_differentiable("mode_gram"),
    flops=_mode_gram_flops,
)
define(
    "mode_grams_(Tensor(a!)[] grams, Tensor x, int[] modes) -> ()",
    reference=_mode_grams_reference,
    fake=_mode_grams_fake,
    autograd=_mode_grams_autograd,
    flops=_mode_grams_flops,
)
define(
    "gram_eigh(Tensor gram) -> (Tensor, Tensor)",
    reference=_gram_eigh_reference,
    fake=_gram_eigh_fake,
    autograd=not_differentiable("gram_eigh"),
)
