"""Frozen batch norm and the ReLU that consumes it in one pass.

A batch norm that runs looks at the source of the call that it is in: where the result goes to a ReLU and to nothing
else, and nothing else happens before, it computes both and notes the result; a ReLU that is handed exactly that tensor
passes it on. That is so in `relu(norm(x))`, in two statements that follow each other,

    y = norm(x)
    y = relu(y)  # or return relu(y), or either within `if relu is not None:`

and between neighbours in an `nn.Sequential`. The model is neither run for it nor changed, and the call decides anew
each time, so flags and modules may change. A `forward` without its source has no pairs, and none has in Python 3.10,
which does not say which call of a line runs.

Under `torch.compile` nothing is paired: the compiler fuses the two itself.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_RELU_CALLS = {F.relu: None, torch.relu: None, torch.relu_: None, F.relu6: 6.0}
# The files between a call of a batch norm and its companion's forward.
_BETWEEN = (nn.modules.module.__name__, "lance_kernels.nn.companions.exact", "lance_kernels.nn.companions.quantized")

Names = tuple[str, ...]  # of a dotted expression; empty for a method of the tensor
Place = tuple[int | None, int | None, int | None, int | None]  # of a call: lines and columns, first and last
Pair = tuple[Names, Names]  # what is called, and what is called with its result


def consuming_relu(norm: nn.Module) -> tuple[bool, float | None]:
    """Whether the result of a batch norm that runs now goes to a ReLU alone and next, and that ReLU's upper bound."""
    if torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook() or not _untouched(norm):
        return False, None
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    if frame is None:
        return False, None
    if frame.f_code is nn.Sequential.forward.__code__:
        children = [*frame.f_locals["self"], None]
        places = [place for place, child in enumerate(children) if child is norm]
        return _bound(children[places[0] + 1]) if len(places) == 1 else (False, None)
    callee, consumer = _pairs(frame.f_code).get(frame.f_lasti, (None, ()))
    # Another function, `map` say, may call the batch norm within the call.
    if callee is None or _value(frame, callee) is not norm:
        return False, None
    return _bound(_value(frame, consumer)) if consumer else (True, None)


def _untouched(module: nn.Module) -> bool:
    """Whether nothing but the forward of the module's class sees its input and result."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _bound(consumer: Any) -> tuple[bool, float | None]:
    if isinstance(consumer, nn.Module):
        own = vars(type(consumer))
        return "lance_bound" in own and _untouched(consumer), own.get("lance_bound")
    return next(((True, high) for call, high in _RELU_CALLS.items() if call is consumer), (False, None))


def _value(frame: types.FrameType, names: Names) -> Any:
    """A dotted expression's value, found without running any code."""
    value = frame.f_locals.get(names[0], frame.f_globals.get(names[0]))
    for name in names[1:]:
        if isinstance(value, nn.Module) and not hasattr(type(value), name):
            value = value._modules.get(name, vars(value).get(name))
        else:
            value = vars(value).get(name) if isinstance(value, types.ModuleType) else None
    return value


@functools.lru_cache(maxsize=4096)
def _pairs(code: types.CodeType) -> dict[int, Pair]:
    """What is called, and what is called with its result alone and next, by the first call's instruction."""
    if sys.version_info < (3, 11):
        return {}
    try:
        found, codes = _read("".join(inspect.findsource(code)[0]), code.co_filename)
    except (OSError, SyntaxError, ValueError):
        return {}
    # A file may have been edited since it was imported.
    if _identity(code) not in codes:
        return {}
    pairs = {}
    for position, place in enumerate(code.co_positions()):
        pair, variable = found.get(place, (None, None))
        local = variable is None or (variable in code.co_varnames and variable not in code.co_cellvars)
        if pair is not None and local:
            pairs[2 * position] = pair
    return pairs


@functools.lru_cache(maxsize=64)
def _read(source: str, filename: str) -> tuple[dict[Place, tuple[Pair, str | None]], set[Any]]:
    """A file's pairs, with the variable that holds the result between, and what its functions compile to."""
    tree = ast.parse(source)
    found: dict[Place, tuple[Pair, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            consumer, inner = _relu_call(node)
            callee = _dotted(inner.func) if isinstance(inner, ast.Call) else None
            if inner is not None and callee is not None and consumer is not None:
                found[_place(inner)] = ((callee, consumer), None)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _read_block(node.body, None, found)
    return found, {_identity(code) for code in _codes(compile(tree, filename, "exec", dont_inherit=True))}


def _read_block(block: list[ast.stmt], after: ast.stmt | None, found: dict[Place, tuple[Pair, str | None]]) -> None:
    for statement, following in zip(block, [*block[1:], after]):
        match statement:
            case ast.If():
                _read_block(statement.body, following, found)
                _read_block(statement.orelse, following, found)
            case ast.For() | ast.While() | ast.With():
                _read_block(statement.body, None, found)
            case ast.Assign(targets=[ast.Name(id=variable)], value=ast.Call() as call):
                callee, consumer = _dotted(call.func), _last_reader(variable, following)
                if callee is not None and consumer is not None:
                    found[_place(call)] = ((callee, consumer), variable)


def _last_reader(variable: str, statement: ast.stmt | None) -> Names | None:
    """What a statement calls with a local variable that nothing reads after it."""
    match statement:
        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call() as call) if target == variable:
            names, argument = _relu_call(call)
        case ast.Return(value=ast.Call() as call):
            names, argument = _relu_call(call)
        case ast.If(
            test=ast.Compare(left=guard, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]), body=[first, *_]
        ):
            names = _last_reader(variable, first)
            return names if names and names == _dotted(guard) else None
        case _:
            return None
    return names if isinstance(argument, ast.Name) and argument.id == variable else None


def _relu_call(call: ast.Call) -> tuple[Names | None, ast.expr | None]:
    """What a call that may be a ReLU's calls, and its argument."""
    match call:
        case ast.Call(func=ast.Attribute(value=tensor, attr="relu" | "relu_"), args=[], keywords=[]):
            return (), tensor
        case ast.Call(args=[argument, *rest]):
            settings = [*rest, *(keyword.value for keyword in call.keywords)]
            return _dotted(call.func) if all(isinstance(each, ast.Constant) for each in settings) else None, argument
    return None, None


def _dotted(expression: ast.expr) -> Names | None:
    match expression:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            owner = _dotted(value)
            return None if owner is None else (*owner, name)
    return None


def _place(node: ast.expr) -> Place:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _identity(code: types.CodeType) -> Any:
    return code.co_name, code.co_firstlineno, code.co_code, code.co_names, code.co_varnames, code.co_linetable


class _Last(threading.local):
    """The result of the thread's last pair, its version and the ReLU's bound, until the ReLU has it."""

    noted: tuple[weakref.ref[torch.Tensor], int, float | None] | None = None


_last = _Last()


def note_activated(y: torch.Tensor, high: float | None) -> None:
    """Notes that a result has gone through its ReLU already."""
    _last.noted = weakref.ref(y), y._version, high


def already_activated(x: Any, high: float | None) -> bool:
    """Whether a ReLU with this bound was handed a result that has gone through it already."""
    if torch.compiler.is_compiling() or _last.noted is None or not isinstance(x, torch.Tensor):
        return False
    tensor, version, bound = _last.noted
    if tensor() is not x or bound != high or x._version != version:
        return False
    _last.noted = None
    return True
