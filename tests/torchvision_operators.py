"""What torchvision's wheel, which is for CUDA, needs to import beside a PyTorch for the CPU."""

from __future__ import annotations

import functools

import torch


@functools.cache  # what is defined goes with the library
def define_torchvision_operators() -> torch.library.Library | None:
    """Defines the operators that it registers kernels for; beside a PyTorch for CUDA it does so itself."""
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
