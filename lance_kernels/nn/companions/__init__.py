"""Companions: the modules around the compressed layers in forms that hold less for backward.

`EXACT`, `QUANTIZED` and `SMALLEST` map exact `torch.nn` types to drop-in subclasses; `apply_companions` swaps a model's
classes in place and catches its functional calls, `remove_companions` undoes both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from lance_kernels.nn.companions.calls import WithCompanionCalls, with_companion_calls
from lance_kernels.nn.companions.exact import EXACT
from lance_kernels.nn.companions.quantized import QUANTIZED, SMALLEST

MODULES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "exact": EXACT,
    "quantized": QUANTIZED,
    "smallest": SMALLEST,
}

__all__ = ["EXACT", "QUANTIZED", "SMALLEST", "apply_companions", "companions_suspended", "remove_companions"]

# Modules of torch.nn whose own forward calls functions of the tables.
_CALLING = (
    nn.MultiheadAttention,
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
        reason = _reason_to_leave(module)
        drop_in = MODULES[level].get(kind)
        if drop_in is not None:
            if reason is None and skip is not None and skip(module, name):
                reason = "excluded"
            if reason is None:
                module.__class__ = drop_in
            rows.append((name, kind.__name__, f"swapped, {level}" if reason is None else f"left alone, {reason}"))
            continue
        if reason is not None or not _has_own_forward(kind) or (skip is not None and skip(module, name)):
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
    for module in model.modules():
        plain = _plain_type(type(module))
        if plain is not None:
            module.__class__ = plain


@contextmanager
def companions_suspended(model: nn.Module) -> Iterator[None]:
    """Within this context the model's companions are the plain modules they came from."""
    swapped = [(module, type(module)) for module in model.modules() if _plain_type(type(module)) is not None]
    remove_companions(model)
    try:
        yield
    finally:
        for module, kind in swapped:
            module.__class__ = kind


def _plain_type(kind: type[nn.Module]) -> type[nn.Module] | None:
    if issubclass(kind, WithCompanionCalls):
        return kind.lance_plain_type
    return _PLAIN.get(kind)


def _has_own_forward(kind: type[nn.Module]) -> bool:
    package = kind.__module__.partition(".")[0]
    if package == "torch":
        return kind in _CALLING
    return package != "lance_kernels" and kind.forward is not nn.Module.forward


def _reason_to_leave(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if parametrize.is_parametrized(module):
        return "parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy, not initialized yet"
    return None


_PLAIN = {drop_in: plain for table in MODULES.values() for plain, drop_in in table.items()}
