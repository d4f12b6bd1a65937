"""Small models that other people wrote: `transformers` classes built from configs, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=5)
    )


def mobilenet() -> nn.Module:
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(image_size=32, depth_multiplier=0.25, num_labels=5, classifier_dropout_prob=0.0)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=5,
        )
    )


def with_statistics(model: nn.Module) -> nn.Module:
    """The model in eval mode, its batch norms' statistics taken from images: a random network fades to nothing else."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        model(images(32)[0])
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "mobilenet": mobilenet, "vit": vit}


def images(count: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class shows: one blurred random pattern a class, with noise; `(count, 3, 32, 32)` and labels."""
    labels = torch.arange(count) % classes
    patterns = nn.functional.interpolate(torch.randn(classes, 3, 4, 4), size=(32, 32), mode="bilinear")
    return patterns[labels] + 0.1 * torch.randn(count, 3, 32, 32), labels
