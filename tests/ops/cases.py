"""Inputs that the operator tests draw: shapes, ranks, memory layouts, geometries; and how close a result has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

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


@st.composite
def factored(draw: st.DrawFn, shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    """One factor or None a mode; ranks from 1 to the mode's size."""
    factors: list[torch.Tensor | None] = []
    for size in shape:
        keep = size == 0 or draw(st.booleans())
        factors.append(None if keep else orthonormal(size, draw(st.integers(1, size))))
    return factors


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


@dataclass
class Geometry:
    """A convolution's numbers and sizes."""

    batch: int
    channels: int
    spatial: tuple[int, ...]
    outputs: int
    kernel: tuple[int, ...]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    mode: str

    @property
    def input_size(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.spatial)

    @property
    def weight_size(self) -> tuple[int, ...]:
        return (self.outputs, self.channels // self.groups, *self.kernel)

    @property
    def arguments(self) -> tuple[list[int], list[int], list[int], int]:
        return self.stride, self.padding, self.dilation, self.groups

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same convolution by PyTorch alone: pad, then convolve."""
        dimensions = len(self.spatial)
        pairs = (
            [(p, p) for p in self.padding]
            if len(self.padding) == dimensions
            else list(zip(self.padding[0::2], self.padding[1::2]))
        )
        amounts = [amount for pair in reversed(pairs) for amount in pair]
        if any(amounts):
            x = torch.nn.functional.pad(x, amounts, mode="constant" if self.mode == "zeros" else self.mode)
        function = (torch.conv1d, torch.conv2d, torch.conv3d)[dimensions - 1]
        return function(x, weight, bias, self.stride, 0, self.dilation, self.groups)


@st.composite
def geometries(draw: st.DrawFn, modes: tuple[str, ...] = ("zeros", "reflect", "replicate", "circular")) -> Geometry:
    """Any convolution of one to three spatial modes, kernels no larger than the padded input."""
    dimensions = draw(st.sampled_from((1, 2, 2, 2, 3)))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    group_channels, group_outputs = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (3, 2), (5, 3))))
    pairs = draw(st.booleans())

    def each(low: int, high: int, count: int = dimensions) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(count)]

    return Geometry(
        batch=draw(st.sampled_from((1, 2, 3, 5))),
        channels=groups * group_channels,
        spatial=tuple(each(5, 9)),
        outputs=groups * group_outputs,
        kernel=tuple(each(1, 3)),
        stride=each(1, 3),
        padding=each(0, 2, 2 * dimensions if pairs else dimensions),
        dilation=each(1, 2),
        groups=groups,
        mode=draw(st.sampled_from(modes)),
    )
