"""Saved states: checks before loading, links between layers that share factors, files that appear whole."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.nn._state import absolute_name, is_own, layer_state, relative_name


def plain_state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A compressed model's state dictionary without its factors, for a plain model.

    Args:
        state: what `state_dict()` of a model that `compress_` changed returned; a plain one stays as it is.

    Returns:
        A new dictionary of the same tensors without the entries that compressed layers added.

    Warns:
        UserWarning: how many entries were dropped, if any.
    """
    kept = {key: value for key, value in state.items() if not is_own(key)}
    dropped = [key for key in state if key not in kept]
    if dropped:
        layers = {key.rpartition(".")[0] for key in dropped}
        warnings.warn(
            f"plain_state_dict: dropped {len(dropped)} entries (factors) of {len(layers)} compressed layers",
            stacklevel=2,
        )
    return kept


def atomic_save(content: Any, path: str | Path) -> None:
    """`torch.save` to a temporary file beside `path`, then a rename: readers see the old file or the whole new one.

    Args:
        content: what to save.
        path: the file; a file that is there is replaced once the new one is complete.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        # mkstemp makes files that only the owner reads.
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def share_factors(model: nn.Module, groups: Mapping[str, str]) -> dict[str, str]:
    """Lets layers that read the same input use one layer's factors and cores, where those came out the same.

    Args:
        model: a calibrated model.
        groups: name of the owner by name of the layer, as `Calibration.shared` has it.

    Returns:
        The pairs that share now; the others keep factors of their own.
    """
    layers = _layers(model)
    linked: dict[str, str] = {}
    for name, owner_name in groups.items():
        layer, owner = layers.get(name), layers.get(owner_name)
        if layer is None or owner is None or layer is owner or owner._lance_owner is not None:
            continue
        same = _same([*layer.factors, layer.lance_lengths], [*owner.factors, owner.lance_lengths])
        if layer.lance_core_bits == owner.lance_core_bits and same:
            layer.lance_use_factors_of(owner, relative_name(owner_name, name))
            linked[name] = owner_name
    prepare_loading(model)
    return linked


def prepare_loading(model: nn.Module) -> None:
    """Lets the model check a state before it loads any of it, and keep its factors out of DDP's broadcasts.

    Args:
        model: the root that names in states are relative to.
    """
    forget_loading(model)
    if _layers(model):
        model.register_load_state_dict_pre_hook(_check_state)
        model.register_load_state_dict_post_hook(_link_loaded)
        _ignore_in_ddp(model)


def forget_loading(model: nn.Module) -> None:
    """Undoes `prepare_loading`."""
    before: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, hook in before.items() if getattr(hook, "hook", hook) is _check_state]:
        del before[key]
    after: dict[int, Any] = model._load_state_dict_post_hooks
    for key in [key for key, hook in after.items() if hook is _link_loaded]:
        del after[key]
    vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _check_state(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuses a state whose factors do not fit before any tensor of the model is overwritten."""
    layers = _layers(model)
    by_layer: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        if key.startswith(prefix) and is_own(key):
            by_layer.setdefault(key[len(prefix) :].rpartition(".")[0], {})[key] = value
    problems: list[str] = []
    for name, entries in by_layer.items():
        layer = layers.get(name)
        if layer is None:
            continue
        full = f"{prefix}{name}." if name else prefix
        found, wrong = layer_state(layer, entries, full)
        problems += wrong
        if found is not None and found.owner:
            owner_name = absolute_name(found.owner, name)
            owner = by_layer.get(owner_name or "")
            if owner_name in (None, name) or owner_name not in layers or owner is None:
                problems.append(f"{full}lance_owner names {found.owner!r}, which has no factors in this state")
            elif any(key.endswith(".lance_owner") for key in owner):
                problems.append(f"{full}lance_owner names {found.owner!r}, which uses another layer's factors")
        for kind, tensor in layer.named_parameters(recurse=False):
            value = state_dict.get(f"{full}{kind}")
            if isinstance(value, torch.Tensor) and value.shape != tensor.shape:
                problems.append(f"{full}{kind} has shape {tuple(value.shape)}; expected {tuple(tensor.shape)}")
    if problems:
        raise RuntimeError(
            "lance_kernels: this state does not fit the model, which stays as it was:\n\t" + "\n\t".join(problems)
        )


def _link_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    layers = _layers(model)
    for name, layer in layers.items():
        owner = vars(layer).pop("_lance_pending_owner", None)
        owner_name = absolute_name(owner, name) if owner else None
        if owner_name in layers:
            layer.lance_use_factors_of(layers[owner_name], owner)
    _ignore_in_ddp(model)


def _ignore_in_ddp(model: nn.Module) -> None:
    # Every rank has the same factors; DDP's broadcast would write to what a running graph holds.
    names = [
        f"{name}.{buffer}" if name else buffer
        for name, layer in _layers(model).items()
        if layer._lance_factor_names
        for buffer in (*layer._lance_factor_names, "lance_lengths")
    ]
    if names:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _layers(model: nn.Module) -> dict[str, CompressedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLayer)}


def _same(mine: list[torch.Tensor | None], theirs: list[torch.Tensor | None]) -> bool:
    return len(mine) == len(theirs) and all(
        a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(mine, theirs)
    )
