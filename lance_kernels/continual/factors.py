"""Layers' factors in a learner's state: read, checked and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lance_kernels.continual.layers import PatchConvolution, PatchFactors
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.nn._state import absolute_name, factor_name, layer_state


def factors_state(layers: Mapping[str, CompressedLayer]) -> dict[str, dict[str, Any]]:
    """The factors of every layer that has some, as plain values and tensors, by its name."""
    return {name: _state(layer) for name, layer in layers.items() if layer.is_calibrated}


def check_factors(layers: Mapping[str, CompressedLayer], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses what `factors_state` of other layers gave.

    Raises:
        ValueError: it does not fit these layers.
    """
    for name, state in states.items():
        if name not in layers:
            raise ValueError(f"factors of layer {name!r}, which the model lacks")
        if problem := _problem(name, layers[name], state, states):
            raise ValueError(f"layer {name!r}: {problem}")


def load_factors(layers: Mapping[str, CompressedLayer], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Takes what `factors_state` gave and `check_factors` found right."""
    for layer in layers.values():
        layer.lance_clear_factors()
    for name, state in states.items():
        layer = layers[name]
        layer.lance_core_bits = int(state["core_bits"])
        if state["patch"] is not None:
            assert isinstance(layer, PatchConvolution)
            factor, *spatial = state["patch"]
            layer.set_patch_factors(PatchFactors(factor, list(spatial)).to(layer.weight.device))
        elif state["tucker"]:
            layer.set_factors(state["tucker"])
    for name, state in states.items():
        if owner := state["owner"]:
            layers[name].lance_use_factors_of(layers[absolute_name(owner, name) or ""], owner)


def _state(layer: CompressedLayer) -> dict[str, Any]:
    patch = layer.lance_patch if isinstance(layer, PatchConvolution) else None
    owner = "" if layer._lance_owner is None else layer._lance_owner[1]
    return {
        "owner": owner,
        "tucker": [] if owner else list(layer.factors),
        "patch": None if patch is None else [patch.factor, *patch.spatial],
        "core_bits": layer.lance_core_bits,
    }


def _problem(
    name: str, layer: CompressedLayer, state: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]
) -> str | None:
    if owner := state["owner"]:
        other = states.get(absolute_name(owner, name) or "")
        return f"shares factors with {owner!r}, which has none" if other is None or other["owner"] else None
    if state["patch"] is not None:
        return _patch_problem(layer, state["patch"])
    tucker = state["tucker"]
    entries = {factor_name(mode, len(tucker)): factor for mode, factor in enumerate(tucker) if factor is not None}
    _, problems = layer_state(layer, {**entries, "lance_form": torch.tensor([len(tucker), state["core_bits"]])}, "")
    return problems[0] if problems else None


def _patch_problem(layer: CompressedLayer, patch: Sequence[torch.Tensor | None]) -> str | None:
    shapes = [None if factor is None else tuple(factor.shape) for factor in patch]
    first = shapes[0] or ()
    if (
        not isinstance(layer, PatchConvolution)
        or len(first) != 3
        or first[:2] != (layer.groups, layer.weight[0].numel())
        or len(shapes) != layer.batched_dim - 1
        or any(shape is not None and len(shape) != 2 for shape in shapes[1:])
    ):
        return f"patch factors of shapes {shapes} do not fit a {type(layer).__name__}"
    return None
