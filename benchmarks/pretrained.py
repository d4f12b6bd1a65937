"""Networks that fine-tuning starts from: pretrained on half of the classes here, and kept; or a library's backbone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.data import Images
from benchmarks.environment import ROOT
from benchmarks.finetune import Recipe, train
from benchmarks.network import ResidualNetwork

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
