"""Convolutions that can keep projected patches in place of a Tucker core of their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lance_kernels.nn as lance_nn
from lance_kernels.nn._compressed import CompressedLayer, Factors
from lance_kernels.nn.convolution import _Convolution
from lance_kernels.ops.convolution import Geometry, output_size
from lance_kernels.ops.patch_convolution import patch_core_size


@dataclass
class PatchFactors:
    """What projects a convolution's patches.

    Attributes:
        factor: `(groups, C / groups * prod(kernel), rank)`.
        spatial: one `(positions, rank)` matrix or None a spatial mode of the output.
    """

    factor: torch.Tensor
    spatial: list[torch.Tensor | None]

    def to(self, device: torch.device) -> PatchFactors:
        """The same on a device."""
        return PatchFactors(self.factor.to(device), [None if f is None else f.to(device) for f in self.spatial])


class PatchConvolution(_Convolution):
    """A compressed convolution that keeps projected patches where `lance_patch` is set; else as its base class."""

    lance_patch: PatchFactors | None

    @property
    def is_calibrated(self) -> bool:
        """Whether the layer has factors of either kind."""
        return self.lance_patch is not None or super().is_calibrated

    def set_patch_factors(self, factors: PatchFactors) -> None:
        """Replaces the layer's factors, of whatever kind."""
        self.lance_clear_factors()
        self.lance_patch = factors

    def lance_geometry(self) -> Geometry:
        """The convolution's numbers."""
        return Geometry.of(self.stride, self.lance_padding(), self.dilation, self.groups, self.padding_mode)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolution of `input`, `(B, C, *S)` or `(C, *S)`."""
        patch = self.lance_patch
        if patch is None or not self.lance_keeps_core():
            plain: torch.Tensor = super().forward(input)
            return plain
        batched = input.dim() == self.batched_dim
        x = input if batched else input.unsqueeze(0)
        geometry = self.lance_geometry()
        y: torch.Tensor
        y, _ = torch.ops.lance.patch_convolution(
            x,
            self.weight,
            self.bias,
            *geometry[:4],
            patch.factor,
            self._spatial_for(x.shape),
            self.lance_core_bits,
            geometry.padding_mode,
        )
        return y if batched else y.squeeze(0)

    def lance_core_size(self, size: Sequence[int]) -> list[int] | None:
        """Shape of the core of an input of this size, of either kind; None when there is nothing to compress."""
        if self.lance_patch is None:
            return super().lance_core_size(size)
        spatial = self._spatial_for(size)
        return patch_core_size(size, self.lance_patch.factor, spatial, self.kernel_size, self.lance_geometry())

    def lance_clear_factors(self) -> None:
        """Forgets the factors, of whatever kind."""
        super().lance_clear_factors()
        self.lance_patch = None

    def lance_factors_for(self, size: Sequence[int]) -> Factors | None:
        """Factors of a Tucker core; None for a layer that keeps patches."""
        return None if self.lance_patch is not None else super().lance_factors_for(size)

    def extra_repr(self) -> str:
        """The base class's, and the patch factor's sizes."""
        if self.lance_patch is None:
            return super().extra_repr()
        _, size, rank = self.lance_patch.factor.shape
        spatial = ", ".join("keep" if f is None else f"{f.shape[0]}->{f.shape[1]}" for f in self.lance_patch.spatial)
        plain = nn.modules.conv._ConvNd.extra_repr(self)
        return f"{plain}, patches={size}->{rank}, positions=({spatial})"

    def _spatial_for(self, size: Sequence[int]) -> list[torch.Tensor | None]:
        """The spatial factors; None where an output of an input of this size has another number of positions."""
        assert self.lance_patch is not None
        positions = output_size(size, self.weight.shape, self.lance_geometry())[2:]
        pairs = zip(self.lance_patch.spatial, positions)
        return [f if f is not None and f.shape[0] == extent else None for f, extent in pairs]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self.lance_patch is not None:
            self.lance_patch = self.lance_patch.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Patch factors belong to the learner's state.
        kind: type[nn.Module] = CompressedLayer if self.lance_patch is None else nn.Module
        kind._save_to_state_dict(self, destination, prefix, keep_vars)


class PatchConv1d(PatchConvolution, lance_nn.Conv1d):
    """`lance_kernels.nn.Conv1d` that can keep projected patches."""

    plain_type = nn.Conv1d


class PatchConv2d(PatchConvolution, lance_nn.Conv2d):
    """`lance_kernels.nn.Conv2d` that can keep projected patches."""

    plain_type = nn.Conv2d


class PatchConv3d(PatchConvolution, lance_nn.Conv3d):
    """`lance_kernels.nn.Conv3d` that can keep projected patches."""

    plain_type = nn.Conv3d


KEEPING_PATCHES: dict[type[nn.Module], type[PatchConvolution]] = {
    lance_nn.Conv1d: PatchConv1d,
    lance_nn.Conv2d: PatchConv2d,
    lance_nn.Conv3d: PatchConv3d,
}


def keep_patches_(layer: CompressedLayer) -> None:
    """Gives a compressed convolution, in place, the class that can keep projected patches; others stay."""
    kind = KEEPING_PATCHES.get(type(layer))
    if kind is not None:
        layer.__class__ = kind
        layer.lance_patch = None  # type: ignore[assignment]
