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
from lance_kernels.nn._state import absolute_name, is_own, layer_state, owner_name, owner_tensor, relative_name


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
    members: dict[str, list[str]] = {}
    # In the model's order, in which states are saved too: whoever has the factors comes first there.
    for name in layers:
        members.setdefault(groups.get(name, name), []).append(name)
    linked: dict[str, str] = {}
    for group in members.values():
        owners: list[str] = []
        for name in group:
            owner = next((other for other in owners if _same(layers[name], layers[other])), None)
            if owner is None:
                owners += [name] if layers[name]._lance_owner is None else []
            else:
                layers[name].lance_use_factors_of(layers[owner], relative_name(owner, name))
                linked[name] = owner
    prepare_loading(model)
    return linked


def prepare_loading(model: nn.Module) -> None:
    """Lets the model and its parts check a state before they load any of it; keeps factors out of DDP's broadcasts.

    Args:
        model: the root that names in states are relative to.
    """
    forget_loading(model)
    for module in model.modules():
        if _layers(module):
            module.register_load_state_dict_pre_hook(_check_state if module is model else _check_part)
            module.register_load_state_dict_post_hook(_finish_loading if module is model else _link_loaded)
    if _layers(model):
        _ignore_in_ddp(model)


def forget_loading(model: nn.Module) -> None:
    """Undoes `prepare_loading`."""
    for module in model.modules():
        before: dict[int, Any] = module._load_state_dict_pre_hooks
        for key in [key for key, hook in before.items() if getattr(hook, "hook", hook) in (_check_state, _check_part)]:
            del before[key]
        after: dict[int, Any] = module._load_state_dict_post_hooks
        for key in [key for key, hook in after.items() if hook in (_link_loaded, _finish_loading)]:
            del after[key]
    vars(model).pop("_ddp_params_and_buffers_to_ignore", None)


def _check_part(model: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """The same for a part of the model that is loaded by itself."""
    if not prefix:
        _check_state(model, state_dict, prefix, *arguments)


def _check_state(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuses a state whose factors do not fit before any tensor of the model is overwritten."""
    layers = _layers(model)
    _give_to_users(layers, state_dict, prefix)
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
            owner_of = absolute_name(found.owner, name)
            owner = by_layer.get(owner_of or "")
            if owner_of in (None, name) or owner_of not in layers or owner is None:
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


def _give_to_users(layers: Mapping[str, CompressedLayer], state_dict: dict[str, Any], prefix: str) -> None:
    """Has factors whose layer is plain in this model stored by the first layer that uses them."""
    first: dict[str, str] = {}
    for name in layers:
        key = f"{prefix}{name}.lance_owner"
        relative = owner_name(state_dict.get(key))
        owner = absolute_name(relative, name) if relative else None
        if owner is None or owner in layers:
            continue
        if owner in first:
            state_dict[key] = owner_tensor(relative_name(first[owner], name))
            continue
        for other in [other for other in state_dict if other.startswith(f"{prefix}{owner}.") and is_own(other)]:
            first[owner] = name
            state_dict[f"{prefix}{name}.{other.rpartition('.')[2]}"] = state_dict[other]
        if owner in first:
            del state_dict[key]


def _link_loaded(model: nn.Module, incompatible_keys: Any) -> None:
    layers = _layers(model)
    for name, layer in layers.items():
        owner = vars(layer).get("_lance_pending_owner")
        found = absolute_name(owner, name) if owner else None
        if owner and found in layers:
            del vars(layer)["_lance_pending_owner"]
            layer.lance_use_factors_of(layers[found], owner)


def _finish_loading(model: nn.Module, incompatible_keys: Any) -> None:
    _link_loaded(model, incompatible_keys)
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


def _same(mine: CompressedLayer, theirs: CompressedLayer) -> bool:
    pairs = list(zip([*mine.factors, mine.lance_source.lance_lengths], [*theirs.factors, theirs.lance_lengths]))
    return (
        len(mine.factors) > 0
        and mine.lance_core_bits == theirs.lance_core_bits
        and len(mine.factors) == len(theirs.factors)
        and all(
            a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
        )
    )
