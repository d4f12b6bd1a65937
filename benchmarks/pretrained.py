"""Networks that fine-tuning starts from: pretrained on half of the classes here, and kept; or a library's backbone."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.data import Images
from benchmarks.environment import ROOT
from benchmarks.finetune import Recipe, train
from benchmarks.network import ResidualNetwork, restart_head

FOLDER = ROOT / "build" / "pretrained"


def widths_for(images: Images) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and blocks of the stages: the demo's network for images of this size."""
    small = images.train.images.shape[-1] <= 16
    return ((32, 64, 128), (1, 1, 2)) if small else ((32, 64, 128, 256), (1, 1, 1, 2))


def pretrained(
    images: Images,
    recipe: Recipe,
    seed: int,
    *,
    widths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    folder: Path = FOLDER,
) -> ResidualNetwork:
    """The residual network trained on the first half of the classes, read from `folder` where it was left before.

    Args:
        images: the data set; its first half of the classes is trained on.
        recipe: how to train.
        seed: seed of the weights and of the data's order.
        widths: channels of the stages; by default those that fit the size of the images.
        depths: blocks of the stages; as `widths`.
        folder: where trained networks are kept, by what they were made from.

    Returns:
        The network with a head for the first half's classes.
    """
    first, _ = images.halves()
    chosen_widths, chosen_depths = widths_for(images)
    widths, depths = list(widths or chosen_widths), list(depths or chosen_depths)
    torch.manual_seed(seed)
    model = ResidualNetwork(images.train.images.shape[1], first.classes, widths, depths)
    sizes = [*images.train.images.shape, *images.test.images.shape]
    made_from = {"data": images.name, "sizes": sizes, "recipe": asdict(recipe), "widths": widths, "depths": depths}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{digest}-seed{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    train(model, first, recipe, seed, f"seed {seed}: pretrain", frozen_norms=False)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), temporary)
    temporary.replace(path)
    return model


def backbone(name: str, classes: int) -> nn.Module:
    """A network with the weights that timm or torchvision has for it, and a head for `classes`.

    Args:
        name: its name in timm or, where timm is not installed or lacks it, in torchvision.
        classes: outputs of the new head.

    Raises:
        ValueError: neither library is installed, or neither has the network.
    """
    installed = [library for library in ("timm", "torchvision") if importlib.util.find_spec(library) is not None]
    if "timm" in installed:
        timm = importlib.import_module("timm")
        if timm.is_model(name):
            made: nn.Module = timm.create_model(name, pretrained=True, num_classes=classes)
            return made
    if "torchvision" in installed:
        known = importlib.import_module("torchvision.models")
        if name in known.list_models():
            model: nn.Module = known.get_model(name, weights="DEFAULT")
            restart_head(model, classes, torch.Generator().manual_seed(0))
            return model
    have = f"installed: {', '.join(installed)}" if installed else "neither timm nor torchvision is installed"
    raise ValueError(f"backbone: no pretrained network named {name!r}; {have}")
