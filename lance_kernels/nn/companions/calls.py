"""Functional calls inside a model's own modules: which function is replaced by what, and how the calls are caught.

A module with a `forward` of its own gets, in place, a subclass whose `forward` runs within a `CompanionMode`, which
replaces the calls of the functions in its table. The mode is entered anew by every such module, so what
`torch.utils.checkpoint` runs again in backward enters it again. A checkpointed function that is no module's `forward`
(a closure, say) is run again outside of any mode; its direct calls are left as they are, both times.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lance_kernels.nn.companions import functional as companion
from lance_kernels.nn.companions import functional_quantized as quantized
from lance_kernels.ops import activation_of

Table = Mapping[Any, Callable[..., Any]]


def _relu_(input: torch.Tensor) -> torch.Tensor:
    return companion.relu(input, inplace=True)


def _relu(input: torch.Tensor) -> torch.Tensor:
    return companion.relu(input)


def _hardtanh_(input: torch.Tensor, min_val: float = -1.0, max_val: float = 1.0) -> torch.Tensor:
    return companion.hardtanh(input, min_val, max_val, inplace=True)


def _leaky_relu_(input: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    return companion.leaky_relu(input, negative_slope, inplace=True)


def _torch_dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return companion.dropout(input, p, train)


def _torch_max_pool2d(input: torch.Tensor, kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any) -> Any:
    return companion.max_pool2d(input, kernel_size, stride, *args, **kwargs)


EXACT_CALLS: dict[Any, Callable[..., Any]] = {
    F.relu: companion.relu,
    torch.relu: _relu,
    torch.Tensor.relu: _relu,
    torch.relu_: _relu_,
    torch.Tensor.relu_: _relu_,
    F.relu6: companion.relu6,
    F.hardtanh: companion.hardtanh,
    F.hardtanh_: _hardtanh_,
    F.leaky_relu: companion.leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.dropout: companion.dropout,
    torch.dropout: _torch_dropout,
    F.batch_norm: companion.batch_norm,
    F.max_pool1d: companion.max_pool1d,
    F.max_pool2d: companion.max_pool2d,
    F.max_pool3d: companion.max_pool3d,
    torch.max_pool1d: companion.max_pool1d,
    torch.max_pool2d: companion.max_pool2d,
    torch.max_pool3d: companion.max_pool3d,
    F.avg_pool1d: companion.avg_pool1d,
    F.avg_pool2d: companion.avg_pool2d,
    F.avg_pool3d: companion.avg_pool3d,
    F.adaptive_avg_pool1d: companion.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d: companion.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d: companion.adaptive_avg_pool3d,
    F.conv1d: companion.conv1d,
    F.conv2d: companion.conv2d,
    F.conv3d: companion.conv3d,
    F.conv_transpose1d: companion.conv_transpose1d,
    F.conv_transpose2d: companion.conv_transpose2d,
    F.conv_transpose3d: companion.conv_transpose3d,
}


def _torch_layer_norm(
    input: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    return quantized.layer_norm(input, normalized_shape, weight, bias, eps)


def _torch_group_norm(
    input: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    return quantized.group_norm(input, num_groups, weight, bias, eps)


def _torch_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> torch.Tensor:
    return quantized.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _quantized_calls(bits: int) -> dict[Any, Callable[..., Any]]:
    silu = functools.partial(quantized.silu, bits=bits)
    sigmoid = functools.partial(quantized.sigmoid, bits=bits)
    tanh = functools.partial(quantized.tanh, bits=bits)
    return {
        **EXACT_CALLS,
        F.gelu: functools.partial(quantized.gelu, bits=bits),
        F.silu: silu,
        F.hardswish: functools.partial(quantized.hardswish, bits=bits),
        F.hardsigmoid: functools.partial(quantized.hardsigmoid, bits=bits),
        F.sigmoid: sigmoid,
        torch.sigmoid: sigmoid,
        torch.Tensor.sigmoid: sigmoid,
        F.tanh: tanh,
        torch.tanh: tanh,
        torch.Tensor.tanh: tanh,
        F.layer_norm: quantized.layer_norm,
        torch.layer_norm: _torch_layer_norm,
        F.rms_norm: quantized.rms_norm,
        torch.rms_norm: quantized.rms_norm,
        F.group_norm: quantized.group_norm,
        torch.group_norm: _torch_group_norm,
        F.batch_norm: quantized.batch_norm,
        torch.batch_norm: _torch_batch_norm,
        F.scaled_dot_product_attention: quantized.scaled_dot_product_attention,
    }


# The body of the library's function alone: the function hands a call to the mode before it makes any of its own.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

CALLS: dict[str, dict[Any, Callable[..., Any]]] = {
    "exact": EXACT_CALLS,
    "quantized": _quantized_calls(8),
    "smallest": _quantized_calls(4),
}


def _saving_hook() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


class CompanionMode(TorchFunctionMode):
    """Replaces the calls of one level's table while it is active.

    Args:
        level: the level of companions, a key of `CALLS`.
    """

    def __init__(self, level: str) -> None:
        super().__init__()
        self.level = level
        self.table = CALLS[level]
        self.hook = None if torch.compiler.is_compiling() else _saving_hook()

    def __torch_function__(
        self, func: Any, overloaded: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Dynamo cannot trace the body of this method, which is what a mode is handed; nothing else changes.
        if func is torch.Tensor.unflatten:
            return torch.unflatten(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward and all(kind in (torch.Tensor, nn.Parameter) for kind in overloaded):
            with self:
                return _multi_head_attention(*args, **(kwargs or {}))
        replacement = self.table.get(func)
        if replacement is None or self.in_foreign_checkpoint() or (kwargs and "out" in kwargs):
            return func(*args, **(kwargs or {}))
        return replacement(*args, **(kwargs or {}))

    def in_foreign_checkpoint(self) -> bool:
        """Whether a checkpointed function was entered since, which will be run again outside of this mode."""
        if torch.compiler.is_compiling():
            return False
        hook = _saving_hook()
        return hook is not self.hook and getattr(hook, "__module__", None) == "torch.utils.checkpoint"


def companion_calls(level: str) -> AbstractContextManager[Any]:
    """A `CompanionMode` of `level`, or nothing where one that serves is already active."""
    active = _innermost()
    if active is not None and active.level == level and active.hook is _saving_hook():
        return nullcontext()
    return CompanionMode(level)


def _innermost() -> CompanionMode | None:
    """The innermost mode, if it is a `CompanionMode`; a compiler is not asked for its own."""
    if torch.compiler.is_compiling() or not (depth := torch._C._len_torch_function_stack()):
        return None
    mode = torch._C._get_function_stack_at(depth - 1)
    return mode if isinstance(mode, CompanionMode) else None


class OutsideCompanionCalls:
    """Context in which the innermost mode is not asked about each call, if it is a `CompanionMode`.

    For what our own modules do, which it would leave as it is: looking at a tensor's shape is a call too.
    """

    _mode: CompanionMode | None = None

    def __enter__(self) -> None:
        self._mode = _innermost()
        if self._mode is not None:
            torch._C._pop_torch_function_stack()

    def __exit__(self, *raised: object) -> None:
        if self._mode is not None:
            torch._C._push_on_torch_function_stack(self._mode)


class WithCompanionCalls:
    """Marks the subclasses that `with_companion_calls` makes.

    Attributes:
        lance_plain_type: the class before.
        lance_level: the level of companions.
    """

    lance_plain_type: type[nn.Module]
    lance_level: str


def _rebuild(plain_type: type[nn.Module], level: str) -> nn.Module:
    subclass = with_companion_calls(plain_type, level)
    return subclass.__new__(subclass)


# Activations that another package's modules compose of several operations, each of which would hold a tensor.
COMPOSED = {
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}
_BITS = {"quantized": 8, "smallest": 4}

_SUBCLASSES: dict[Any, type[nn.Module]] = {}


def with_companion_calls(plain_type: type[nn.Module], level: str) -> type[nn.Module]:
    """The subclass of `plain_type` whose `forward` runs within a `CompanionMode` of `level`, made once."""
    key = (plain_type, level)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = _make_subclass(plain_type, level)
    return _SUBCLASSES[key]


def _make_subclass(plain_type: type[nn.Module], level: str) -> type[nn.Module]:
    kind = COMPOSED.get(f"{plain_type.__module__}.{plain_type.__qualname__}") if level in _BITS else None

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # An instance may hold this function as its own forward when it has its plain class again.
        if not isinstance(self, WithCompanionCalls) or not torch.is_grad_enabled():
            return plain_type.forward(self, *args, **kwargs)
        if kind is not None and not torch.compiler.is_compiling() and companion.takes(args[0] if args else None):
            return activation_of(functools.partial(plain_type.forward, self), args[0], kind, _BITS[level])
        with companion_calls(level):
            return plain_type.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, plain_type.forward)
    # Accelerate follows __wrapped__ to the function that it takes for the model's own.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(plain_type.forward)  # type: ignore[attr-defined]

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        # Pickle finds a class by its name, which is the plain one's; copies are made the same way.
        reduced = plain_type.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return (_rebuild, (plain_type, level), *reduced[2:])

    members = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "lance_plain_type": plain_type,
        "lance_level": level,
        "__module__": plain_type.__module__,
        "__qualname__": plain_type.__qualname__,
        "__doc__": plain_type.__doc__,
    }
    metaclass: Any = type(plain_type)
    subclass: type[nn.Module] = metaclass(plain_type.__name__, (plain_type, WithCompanionCalls), members)
    return subclass
