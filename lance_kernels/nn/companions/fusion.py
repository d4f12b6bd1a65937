"""Frozen batch norm and the ReLU that consumes it in one pass.

Which ReLU consumes a batch norm's result is read, when companions are applied, from a symbolic trace of the `forward`
of the module that owns the batch norm: the result has to have one consumer, a ReLU or ReLU6. Functions that the
`forward` calls by a global name are not looked into, so only what stands in it has to be traceable. A `forward` that
cannot be traced has no pairs, which `apply_companions` says. At run time the batch norm computes both and notes its
result as pending; the ReLU that is handed exactly that tensor passes it on. So one ReLU module may serve several batch
norms. The pairs of a module count only while its own `forward` runs; a pending result left over at the end is an error,
for the model was changed since.

Under `torch.compile` nothing is paired: the compiler fuses the two itself.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELU_CALLS = {F.relu: None, torch.relu: None, torch.relu_: None, F.relu6: 6.0}
_RELU_METHODS = ("relu", "relu_")

# A batch norm, the module that consumes its result (None for a functional call), and the bound of that ReLU.
Pair = tuple[nn.Module, nn.Module | None, float | None]


class _Tracer(fx.Tracer):
    """Traces one `forward` and nothing that it calls."""

    def __init__(self, module: nn.Module) -> None:
        forward = inspect.unwrap(type(module).forward)
        names = getattr(getattr(forward, "__code__", None), "co_names", ())
        called = [getattr(forward, "__globals__", {}).get(name) for name in names]
        super().__init__(autowrap_functions=tuple(f for f in called if isinstance(f, types.FunctionType)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        # The graph is read and never run.
        return None if isinstance(a, nn.Module) else super().create_arg(a)


def find_pairs(module: nn.Module) -> tuple[tuple[Pair, ...], str | None]:
    """The batch norms among a module's children whose result goes to one ReLU and nowhere else.

    Args:
        module: any module.

    Returns:
        The pairs, and why there are none where the `forward` of a module with batch norms cannot be traced.
    """
    children = dict(module.named_children())
    if not any(type(child) in _BATCH_NORMS for child in children.values()):
        return (), None
    try:
        nodes = list(_Tracer(module).trace(module).nodes)
    except Exception as error:  # any Python may stand in a forward
        reason = str(error).partition("\n")[0]
        return (), f"its batch norms are not fused with ReLUs, torch.fx cannot trace its forward ({reason})"
    calls = [node.target for node in nodes if node.op == "call_module"]
    pairs = []
    for node in nodes:
        norm = children.get(str(node.target)) if node.op == "call_module" else None
        if norm is None or type(norm) not in _BATCH_NORMS or calls.count(node.target) > 1 or len(node.users) != 1:
            continue
        found = _relu_of(next(iter(node.users)), node, children)
        if found is not None:
            pairs.append((norm, *found))
    return tuple(pairs), None


def _relu_of(
    user: fx.Node, node: fx.Node, children: dict[str, nn.Module]
) -> tuple[nn.Module | None, float | None] | None:
    if not user.args or user.args[0] is not node:
        return None
    if user.op == "call_module":
        relu = children.get(str(user.target))
        if type(relu) is nn.ReLU:
            return relu, None
        return (relu, 6.0) if type(relu) is nn.ReLU6 else None
    if user.op == "call_function" and user.target in _RELU_CALLS:
        return None, _RELU_CALLS[user.target]
    return (None, None) if user.op == "call_method" and user.target in _RELU_METHODS else None


class _Frame:
    """One running `forward` with pairs: the batch norms' partners, and results that wait for their ReLU."""

    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self.partners = {id(norm): (relu, high) for norm, relu, high in pairs}
        self.pending: list[tuple[torch.Tensor, float | None]] = []


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Frame] = []


_frames = _Frames()


@contextmanager
def fusing(module: nn.Module) -> Iterator[None]:
    """Within this context the pairs found for a module count."""
    pairs: tuple[Pair, ...] = vars(module).get("lance_pairs", ())
    frame = _Frame(pairs)
    _frames.stack.append(frame)
    try:
        yield
    finally:
        _frames.stack.pop()
    if frame.pending:
        raise RuntimeError(
            f"{type(module).__name__}: a frozen batch norm's result, computed together with its ReLU, did not reach "
            "that ReLU; the model was changed after its companions were applied: revert and apply them again"
        )


def _without_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def partner_bound(norm: nn.Module) -> tuple[bool, float | None]:
    """Whether a batch norm's result goes to a ReLU now, and that ReLU's upper bound."""
    if torch.compiler.is_compiling() or not _frames.stack:
        return False, None
    found = _frames.stack[-1].partners.get(id(norm))
    if found is None or nn.modules.module._has_any_global_hook():
        return False, None
    relu, high = found
    return _without_hooks(norm) and (relu is None or _without_hooks(relu)), high


def note_activated(y: torch.Tensor, high: float | None) -> None:
    """Notes that a result has gone through its ReLU already."""
    _frames.stack[-1].pending.append((y, high))


def already_activated(x: Any, high: float | None) -> bool:
    """Whether a ReLU with this bound was handed a result that has gone through it already."""
    if torch.compiler.is_compiling() or not _frames.stack:
        return False
    pending = _frames.stack[-1].pending
    for position, (y, bound) in enumerate(pending):
        if y is x and bound == high:
            del pending[position]
            return True
    return False
