"""Companions: the modules around the compressed layers in forms that hold less for backward.

`EXACT`, `QUANTIZED` and `SMALLEST` map exact `torch.nn` types to drop-in subclasses; `apply_companions` swaps a model's
classes in place and catches its functional calls, `remove_companions` undoes both.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from lance_kernels.nn.companions.calls import with_companion_calls
from lance_kernels.nn.companions.exact import EXACT
from lance_kernels.nn.companions.quantized import QUANTIZED, SMALLEST

MODULES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "exact": EXACT,
    "quantized": QUANTIZED,
    "smallest": SMALLEST,
}

__all__ = [
    "EXACT",
    "QUANTIZED",
    "SMALLEST",
    "apply_companions",
    "companions_suspended",
    "reason_to_leave",
    "remove_companions",
    "without",
]

# Modules of torch.nn whose own forward calls functions of the tables.
_CALLING = (
    nn.MultiheadAttention,
    nn.TransformerEncoder,  # makes nested tensors where no mode is active, which its layers take under none
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def apply_companions(
    model: nn.Module, level: str, skip: Callable[[nn.Module, str], bool] | None = None
) -> list[tuple[str, str, str]]:
    """Swaps a model's modules, in place, for their companions of one level.

    A module's class changes and nothing else, so parameters, hooks, names and saved states stay valid.

    Args:
        model: the model; its root may itself be a companion's type.
        level: "none", "exact" (those with exact gradients), "quantized" (all, 8 bits) or "smallest" (derivatives of
            activations in 4 bits).
        skip: called with every module and its name; True leaves it alone. The functional calls in a skipped module's
            `forward` stay plain only where no module around it has its calls replaced.

    Returns:
        `(name, type, what was done or why it was left)` of every module that was swapped, whose functional calls are
        replaced, or that was left though its type has a companion.

    Raises:
        ValueError: `level` is unknown.
    """
    if level == "none":
        return []
    if level not in MODULES:
        raise ValueError(f"apply_companions: level is {level!r}; expected 'none' or one of {sorted(MODULES)}")
    rows = []
    for name, module in list(model.named_modules()):
        kind = type(module)
        reason = reason_to_leave(module)
        drop_in = MODULES[level].get(kind)
        if drop_in is not None:
            if reason is None and skip is not None and skip(module, name):
                reason = "excluded"
            if reason is None:
                module.__class__ = drop_in
            rows.append((name, kind.__name__, f"swapped, {level}" if reason is None else f"left alone, {reason}"))
            continue
        if not _has_own_forward(kind) or (skip is not None and skip(module, name)):
            continue
        if reason is not None:
            rows.append((name, kind.__name__, f"left alone, {reason}"))
            continue
        try:
            module.__class__ = with_companion_calls(kind, level)
        except TypeError as error:
            rows.append((name, kind.__name__, f"left alone, its class takes no subclass ({error})"))
            continue
        rows.append((name, kind.__name__, f"functional calls replaced, {level}"))
    return rows


def remove_companions(model: nn.Module) -> None:
    """Gives the model's companions back the classes they had before `apply_companions`."""
    for module, plain in _companions(model):
        become(module, plain)


@contextmanager
def companions_suspended(model: nn.Module) -> Iterator[None]:
    """Within this context the model's companions are the plain modules they came from."""
    swapped = [(module, type(module)) for module, _ in _companions(model)]
    remove_companions(model)
    try:
        yield
    finally:
        for module, kind in swapped:
            become(module, kind)


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Gives a module another class, and its `forward` to attributes that are bound to the old one's, as hooks are."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__self__", None) is module and getattr(value, "__func__", None) is type(module).forward:
            vars(module)[name] = types.MethodType(kind.forward, module)
    module.__class__ = kind


def without(kind: type, plain_type: Callable[[type], type | None]) -> type:
    """A module's class with the plain ones in place of ours.

    Args:
        kind: any class; it may have been made from one of ours, as parametrizing and FSDP2 do.
        plain_type: gives the plain class of one of ours, None for any other.

    Returns:
        The plain class, the same class made from the plain one, or `kind` itself if none of ours is among its bases.
    """
    plain = plain_type(kind)
    if plain is not None:
        return plain
    bases = tuple(without(base, plain_type) for base in kind.__bases__)
    if bases == kind.__bases__:
        return kind
    members = {name: member for name, member in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    made: type = type(kind)(kind.__name__, bases, members)
    return made


def _companions(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The model's companions and the classes that they are without."""
    plain = [(module, without(type(module), _plain_type)) for module in model.modules()]
    return [(module, kind) for module, kind in plain if kind is not type(module)]


def _plain_type(kind: type) -> type | None:
    return vars(kind).get("lance_plain_type") or _PLAIN.get(kind)


def _has_own_forward(kind: type[nn.Module]) -> bool:
    package = kind.__module__.partition(".")[0]
    if package == "torch":
        return kind in _CALLING
    return package != "lance_kernels" and kind.forward is not nn.Module.forward


def reason_to_leave(module: nn.Module) -> str | None:
    """Why a module's class is not swapped, whatever it is."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if parametrize.is_parametrized(module):
        return "parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy, not initialized yet"
    # It hides the class's.
    return "its forward was replaced" if "forward" in vars(module) else None


_PLAIN = {drop_in: plain for table in MODULES.values() for plain, drop_in in table.items()}
