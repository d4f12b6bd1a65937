"""Inputs that the operator tests draw: shapes, ranks, memory layouts, geometries; and how close a result has to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from tests.ops.tensors import (
    DTYPES,
    LAYOUTS,
    TOLERANCE,
    approximation,
    assert_near,
    cast,
    dense,
    lay_out,
    orthonormal,
)

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "TOLERANCE",
    "Geometry",
    "approximation",
    "assert_near",
    "cast",
    "dense",
    "factored",
    "geometries",
    "lay_out",
    "orthonormal",
]


@st.composite
def factored(draw: st.DrawFn, shape: tuple[int, ...]) -> list[torch.Tensor | None]:
    """One factor or None a mode; ranks from 1 to the mode's size."""
    factors: list[torch.Tensor | None] = []
    for size in shape:
        keep = size == 0 or draw(st.booleans())
        factors.append(None if keep else orthonormal(size, draw(st.integers(1, size))))
    return factors


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
