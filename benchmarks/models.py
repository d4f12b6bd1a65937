"""Models and inputs of the whole-model suites: `transformers` configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Classifier(nn.Module):
    """An image classifier of `transformers` that takes images and gives logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=images).logits


def resnet18(classes: int = 100) -> Classifier:
    """ResNet-18."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=classes
    )
    return Classifier(ResNetForImageClassification(config))


def mobilenet_v2(classes: int = 100) -> Classifier:
    """MobileNetV2 at width 1."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return Classifier(MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=classes)))


def resnet50(classes: int = 100) -> Classifier:
    """ResNet-50."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return Classifier(ResNetForImageClassification(ResNetConfig(num_labels=classes)))


def deit_tiny(classes: int = 100) -> Classifier:
    """A vision transformer of DeiT-Tiny's size."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, num_labels=classes
    )
    return Classifier(ViTForImageClassification(config))


def swin_tiny(classes: int = 100) -> Classifier:
    """Swin-Tiny, without stochastic depth."""
    from transformers import SwinConfig, SwinForImageClassification

    return Classifier(SwinForImageClassification(SwinConfig(drop_path_rate=0.0, num_labels=classes)))


MODELS: dict[str, Callable[[], Classifier]] = {
    "ResNet-18": resnet18,
    "MobileNetV2": mobilenet_v2,
    "ResNet-50": resnet50,
    "DeiT-Tiny": deit_tiny,
    "Swin-Tiny": swin_tiny,
}


def frozen_norms(model: nn.Module) -> nn.Module:
    """Training mode with every batch norm frozen: evaluation statistics, affine parameters without a gradient."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def natural_images(batch: int, size: int, seed: int) -> torch.Tensor:
    """Random images whose amplitude falls with spatial frequency, as that of photographs does (Field, 1987).

    White noise has no low-rank structure at all, so that compressing it says nothing of images.

    Returns:
        `(batch, 3, size, size)` of mean 0 and deviation 1, the three channels correlated.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(torch.randn(batch, 3, size, size, generator=generator))
    vertical, horizontal = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    frequency = (vertical**2 + horizontal**2).sqrt().clamp_min(1 / size)
    images = torch.fft.irfft2(spectrum / frequency, s=(size, size))
    images = images + 2 * images.mean(1, keepdim=True)
    return (images - images.mean()) / images.std()
