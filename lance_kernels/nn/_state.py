"""What a compressed layer adds to a state dictionary, and what may come back from one.

A calibrated layer's entries beside its parameters, after its prefix: `lance_factor_<mode>of<modes>`, float matrices;
`lance_form`, number of modes and bits a value of the core; `lance_lengths`, how many values of the
core's rows are kept, where not all are; and, in place of the factors, `lance_owner`, the bytes of
the name of the layer whose factors it uses. That name is relative, so that it holds whatever wraps the model: one dot
for each part to drop from the end of the layer's own name, then what follows (".query", "..shortcut.0").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lance_kernels.ops._checks import FLOATING
from lance_kernels.ops.pack_core import BITS

if TYPE_CHECKING:
    from lance_kernels.nn._compressed import CompressedLayer

_FACTOR = re.compile(r"lance_factor_(\d{1,2})of(\d{1,2})")
_OWN = re.compile(r"(?:.*\.)?(lance_factor_\d+of\d+|lance_form|lance_lengths|lance_owner)")
MOST_MODES = 16
# Rounding to bfloat16 moves an entry of `U^T U` by less than this.
ORTHONORMALITY = 0.05


@dataclass
class LayerState:
    """One layer's entries in a state dictionary.

    Attributes:
        keys: their keys.
        factors: one `(size, rank)` matrix or None a mode; empty where an owner has them.
        core_bits: bits a value of the core, 0 for the dtype of the input.
        owner: relative name of the layer that has the factors, or "".
        lengths: how many leading values of each row of a sample's core are kept; None for all.
    """

    keys: list[str]
    factors: list[torch.Tensor | None]
    core_bits: int
    owner: str
    lengths: torch.Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether there are factors to store."""
        return len(self.factors) > 0


def factor_name(mode: int, modes: int) -> str:
    """Name of the buffer that holds a mode's factor."""
    return f"lance_factor_{mode}of{modes}"


def is_own(key: str) -> bool:
    """Whether a key of a state dictionary is one that a compressed layer added."""
    return _OWN.fullmatch(key) is not None


def owner_tensor(name: str) -> torch.Tensor:
    """A name as a saved state holds it, `(bytes,)` uint8."""
    return torch.tensor(list(name.encode()), dtype=torch.uint8)


def owner_name(value: object) -> str | None:
    """The name in what `owner_tensor` gave; None for anything else."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or value.is_meta:
        return None
    try:
        return bytes(value.tolist()).decode() if value.numel() <= 4096 else None
    except UnicodeDecodeError:
        return None


def relative_name(name: str, own: str) -> str:
    """A module's name as seen from another module, both in one model."""
    parts, mine = name.split("."), own.split(".")
    common = 0
    while common < min(len(parts), len(mine)) - 1 and parts[common] == mine[common]:
        common += 1
    return "." * (len(mine) - common) + ".".join(parts[common:])


def absolute_name(relative: str, own: str) -> str | None:
    """The name that `relative_name` was given; None where it leads out of the model."""
    rest = relative.lstrip(".")
    dots, mine = len(relative) - len(rest), own.split(".")
    return ".".join([*mine[: len(mine) - dots], rest]) if 1 <= dots <= len(mine) and rest else None


def layer_state(layer: CompressedLayer, state: Mapping[str, Any], prefix: str) -> tuple[LayerState | None, list[str]]:
    """Reads one layer's entries.

    Args:
        layer: the layer they are meant for; it is not changed.
        state: a state dictionary of any origin.
        prefix: the layer's name in it, ending in a dot, or "".

    Returns:
        The entries, or None where there are none; and what is wrong with them, one message an entry.
    """
    found: dict[int, torch.Tensor] = {}
    keys: list[str] = []
    problems: list[str] = []
    modes, core_bits, owner = 0, layer.lance_core_bits, ""
    lengths: torch.Tensor | None = None
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or "." in name or not is_own(name):
            continue
        keys.append(key)
        if not isinstance(value, torch.Tensor):
            problems.append(f"{key} is a {type(value).__name__}; expected a tensor")
            continue
        match = _FACTOR.fullmatch(name)
        if match is not None:
            mode, named = int(match[1]), int(match[2])
            problem = _factor_problem(layer, value, mode, named)
            if problem is None and modes not in (0, named):
                problem = f"is of {named} modes, other entries of {modes}"
            if problem is not None:
                problems.append(f"{key} {problem}")
            found[mode], modes = value, modes or named
        elif name == "lance_form":
            form = _form(value)
            if form is None:
                problems.append(f"{key} is {_describe(value)}; expected two integers: modes, and 0, 2, 4 or 8 bits")
            else:
                if modes not in (0, form[0]):
                    problems.append(f"{key} says {form[0]} modes, other entries {modes}")
                modes, core_bits = modes or form[0], form[1]
        elif name == "lance_lengths":
            lengths = value
        elif name == "lance_owner":
            named_owner = owner_name(value)
            if named_owner is None:
                problems.append(f"{key} is {_describe(value)}; expected a layer's name in UTF-8, uint8")
            owner = named_owner or ""
        else:
            problems.append(f"{key} is no name of a factor")
    if not keys:
        return None, []
    factors = [found.get(mode) for mode in range(modes)] if not owner else []
    if lengths is not None and not problems and (problem := _lengths_problem(lengths, factors)):
        problems.append(f"{prefix}lance_lengths {problem}")
    return LayerState(keys, factors, core_bits, owner, lengths), problems


def _factor_problem(layer: CompressedLayer, factor: torch.Tensor, mode: int, modes: int) -> str | None:
    dimensions = getattr(layer, "batched_dim", None)
    if not mode < modes <= MOST_MODES or dimensions not in (None, modes):
        return (
            f"is for mode {mode} of {modes}; expected modes of {dimensions or 'at most 16'} for {type(layer).__name__}"
        )
    if factor.dtype not in FLOATING or factor.dim() != 2 or not 1 <= factor.shape[1] <= factor.shape[0]:
        return f"is {_describe(factor)}; expected a floating (size, rank) matrix with 1 <= rank <= size"
    features = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    feature_mode = modes - 1 if dimensions is None else 1
    if mode == feature_mode and factor.shape[0] != features:
        return f"is {_describe(factor)}; expected size {features}, the layer's input features"
    if factor.is_meta:
        return None
    wide = factor.detach().float()
    if not bool(wide.isfinite().all()):
        return "holds NaN or infinity"
    error = float((wide.mT @ wide - torch.eye(wide.shape[1], device=wide.device)).abs().max())
    return None if error <= ORTHONORMALITY else f"has columns that are not orthonormal (off by {error:.2g})"


def _lengths_problem(lengths: torch.Tensor, factors: list[torch.Tensor | None]) -> str | None:
    ranks = [factor.shape[1] for factor in factors[1:] if factor is not None]
    if len(factors) < 2 or factors[0] is not None or len(ranks) != len(factors) - 1:
        return "is given with factors that keep a mode; expected one for every mode but the first"
    if lengths.dtype != torch.int32 or list(lengths.shape) != ranks[:-1]:
        return f"is {_describe(lengths)}; expected int32 of shape {tuple(ranks[:-1])}"
    if lengths.is_meta:
        return None
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= ranks[-1]:
        return f"has entries outside 0 to {ranks[-1]}"
    return None if int(lengths.sum()) else "keeps no value"


def _form(value: torch.Tensor) -> tuple[int, int] | None:
    if value.dtype != torch.int64 or tuple(value.shape) != (2,) or value.is_meta:
        return None
    modes, bits = value.tolist()
    return (modes, bits) if 1 <= modes <= MOST_MODES and bits in (0, *BITS) else None


def _describe(value: torch.Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
