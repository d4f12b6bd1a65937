"""Memory layouts, factors and oracles of the operators' tests, and how close a result has to be."""

from __future__ import annotations

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded", "transposed")

# Largest error over the largest expected magnitude: a few roundings of the accumulation, one of the result.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def assert_near(actual: torch.Tensor, expected: torch.Tensor, factor: float = 1.0, terms: int = 1) -> None:
    """Asserts shape, dtype-dependent closeness, and that nothing is NaN.

    Roundings of a sum of `terms` products grow as its square root.
    """
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return
    assert actual.isfinite().all()
    scale = expected.double().abs().max().clamp_min(1e-30)
    error = (actual.double() - expected.double()).abs().max() / scale
    allowed = factor * TOLERANCE[actual.dtype] * max(1.0, terms**0.5 / 8)
    assert error <= allowed, f"error {error:.3e} of the largest value, {actual.dtype}"


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A tensor of the shape of `x` in another memory layout; equal to `x` but for "expanded", which repeats a slice."""
    if layout == "channels_last" and x.dim() > 2:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
        window = wide[tuple(slice(1, None, 2) for _ in x.shape)]
        return window.copy_(x)
    if layout == "expanded":
        return x[:1].expand(x.shape) if x.shape[0] else x
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x


def orthonormal(size: int, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """`(size, rank)` with orthonormal columns."""
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0][:, :rank].to(dtype).contiguous()


def cast(factors: list[torch.Tensor | None], dtype: torch.dtype) -> list[torch.Tensor | None]:
    """The factors in another dtype."""
    return [None if factor is None else factor.to(dtype) for factor in factors]


def dense(x: torch.Tensor, factors: list[torch.Tensor | None], transpose: bool = True) -> torch.Tensor:
    """Mode-n products one after the other in float64, by tensordot: the oracle of the Tucker operators."""
    out = x.double()
    for mode, factor in enumerate(factors):
        if factor is not None:
            matrix = factor.double() if transpose else factor.double().mT
            out = torch.tensordot(out, matrix, dims=([mode], [0])).movedim(-1, mode)
    return out


def approximation(x: torch.Tensor, factors: list[torch.Tensor | None]) -> torch.Tensor:
    """`x_hat` in float64: every mode projected and expanded again."""
    return dense(dense(x, factors), factors, transpose=False)
