"""What a method of the benchmarks is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]
Prepare = Callable[[nn.Module, Sequence[str], Sequence[Batch]], nn.Module]


class UnfitLayerError(TypeError):
    """A method is not made for a layer of this kind."""


@dataclass(frozen=True)
class Method:
    """A way to hold less in training.

    Attributes:
        name: its name in tables.
        prepare: changes a model so that its named layers hold less; gets batches of images and labels to calibrate on.
        details: settings, for the rows.
    """

    name: str
    prepare: Prepare
    details: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        """A copy of `model` changed by the method.

        Args:
            model: the model in the mode in which it is trained, its frozen parameters without gradients.
            names: the layers to compress; their weights are trained.
            loader: training batches, images and labels.

        Returns:
            The model to train; `model` stays as it was.
        """
        return self.prepare(copy.deepcopy(model), names, loader)
