"""Gradient filtering: Yang et al., CVPR 2023 (arXiv 2301.00330)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

from benchmarks.methods.interface import UnfitLayerError
from benchmarks.methods.kept import Compression, Layer


class GradientFilter(Compression):
    """Patches of `R x R` output gradients are replaced by their mean, which leaves one sum a patch of the input.

    With `g` the mean gradient of a patch and `X` the sum of the input pixels below it, every tap of the weight gets
    `sum over patches of g X^T`; the input's gradient is `W` summed over its taps, transposed, times `g`, the same for
    the whole patch. The paper writes this for stride 1; at stride `s` a tap meets one in `s^2` of a patch's `(R s)^2`
    input pixels, so both are divided by `s^2`.
    """

    def __init__(self, patch: int) -> None:
        self.patch = patch

    def keep(self, x: torch.Tensor, layer: Layer) -> list[torch.Tensor]:
        """The sum over every patch, `(B, C, H / (R s), W / (R s))` rounded up.

        Raises:
            UnfitLayerError: the layer is no ungrouped convolution.
        """
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
            raise UnfitLayerError(f"GradientFilter: layer is {layer}; expected a Conv2d with one group")
        patch = self._input_patch(layer)
        return [avg_pool2d(x, patch, ceil_mode=True, divisor_override=1)]

    def weight_grad(
        self, kept: Sequence[torch.Tensor], grad_output: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """The same for every tap."""
        assert isinstance(layer, nn.Conv2d)
        mean = self._mean(grad_output)
        if mean.shape[2:] != kept[0].shape[2:]:
            raise ValueError(
                f"GradientFilter: the output has {tuple(mean.shape[2:])} patches and the input "
                f"{tuple(kept[0].shape[2:])}; expected the same (padding that keeps the size)"
            )
        tap = mean.transpose(0, 1).flatten(1) @ kept[0].transpose(0, 1).flatten(1).mT  # (O, C)
        return (tap / _area(layer.stride))[:, :, None, None].expand_as(layer.weight).contiguous()

    def input_grad(
        self, grad_output: torch.Tensor, weight: torch.Tensor, size: torch.Size, layer: Layer
    ) -> torch.Tensor:
        """The same for a whole patch."""
        assert isinstance(layer, nn.Conv2d)
        taps = weight.sum((2, 3)) / _area(layer.stride)  # (O, C)
        patches = torch.einsum("oc,bohw->bchw", taps, self._mean(grad_output))
        height, width = self._input_patch(layer)
        whole = patches.repeat_interleave(height, 2).repeat_interleave(width, 3)
        return whole[:, :, : size[2], : size[3]]

    def _mean(self, grad_output: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(grad_output, self.patch, ceil_mode=True, count_include_pad=False)

    def _input_patch(self, layer: nn.Conv2d) -> tuple[int, int]:
        return self.patch * layer.stride[0], self.patch * layer.stride[1]


def _area(stride: Sequence[int]) -> int:
    return stride[0] * stride[1]
