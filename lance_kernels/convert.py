"""Turning a model's layers into compressed ones in place, and back: `compress_`, `revert_`, `exact`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

import lance_kernels.nn as lance_nn
from lance_kernels.config import LanceConfig, matches
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.nn.companions import (
    apply_companions,
    become,
    companions_suspended,
    reason_to_leave,
    remove_companions,
    without,
)
from lance_kernels.state import forget_loading, prepare_loading

COMPRESSED: dict[type[nn.Module], type[CompressedLayer]] = {
    layer.plain_type: layer for layer in (lance_nn.Linear, lance_nn.Conv1d, lance_nn.Conv2d, lance_nn.Conv3d)
}


@dataclass
class Summary:
    """What `compress_` did.

    Attributes:
        compressed: names of the layers that are compressed now, with their type's name.
        left: names of the linear and convolution layers left alone, with the reason.
        companions: names of the other modules that hold less now, or could not be made to, with what was done.
    """

    compressed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.compressed)} layers compressed, {len(self.left)} left alone"]
        lines += [f"  {name or '(root)'}: {kind}" for name, kind in self.compressed.items()]
        lines += [f"  {name or '(root)'}: {done}" for name, done in self.companions.items()]
        lines += [f"  {name or '(root)'}: left alone, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def compress_(
    model: nn.Module,
    config: LanceConfig | None = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Summary:
    """Swaps a model's linear and convolution layers, in place, for layers that can keep a core of their input.

    A layer's class changes and nothing else: parameters, hooks, names and an optimizer that holds the parameters stay
    valid. Until `calibrate` gives it factors, a swapped layer computes and holds what its plain namesake does. The
    modules between the layers become companions that hold less, as `config.companions` says.

    Args:
        model: the model; its root may itself be a layer.
        config: which layers, and how far; `LanceConfig()` by default. `calibrate` reads it again.
        filter_fn: called with every candidate and its name; False leaves the layer alone.

    Returns:
        What was compressed, and what was left alone and why.

    Raises:
        TypeError: `model` is not a module, or `config` not a `LanceConfig`.
        ValueError: the model is compressed already.

    Warns:
        UserWarning: `config.target_modules` matches no layer.
    """
    config = LanceConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress_: model is a {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(config, LanceConfig):
        raise TypeError(f"compress_: config is a {type(config).__name__}; expected a LanceConfig")
    if any(True for _ in compressed_layers(model)):
        raise ValueError("compress_: model has compressed layers already; expected a plain model (call revert_ first)")
    summary = Summary()
    excluded, targets = config.exclude_modules, config.target_modules
    candidates = {name: module for name, module in model.named_modules() if _is_candidate(module)}
    if targets and not any(matches(name, targets) for name in candidates):
        warnings.warn(
            f"compress_: target_modules is {targets!r}, which matches no linear or convolution layer", stacklevel=2
        )
    chosen: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        reason = _reason_to_leave(module, name, config, filter_fn)
        if reason is None and is_dtensor(module.weight) and not fully_sharded(model):
            reason = "tensor parallel (its weight is a DTensor)"
        if reason is None:
            chosen[name] = module
        else:
            summary.left[name] = reason
    for name, module in chosen.items():
        layer = COMPRESSED[type(module)]
        module.__class__ = layer
        assert isinstance(module, CompressedLayer)
        module.lance_initialize(config)
        summary.compressed[name] = layer.__name__
    for name, kind, done in apply_companions(model, config.companions, lambda _, name: matches(name, excluded)):
        summary.companions[name] = f"{kind} {done}"
    prepare_loading(model)
    return summary


def revert_(model: nn.Module) -> nn.Module:
    """Gives back plain `torch.nn` modules, in place; factors are dropped, parameters stay.

    Args:
        model: a model that `compress_` changed; a plain one stays as it is.

    Returns:
        `model`.
    """
    remove_companions(model)
    forget_loading(model)
    for _, layer in list(compressed_layers(model)):
        layer.lance_clear_factors()
        del layer.lance_lengths
        for attribute in [name for name in vars(layer) if name.startswith(("lance_", "_lance_"))]:
            delattr(layer, attribute)
        become(layer, without(type(layer), lambda kind: vars(kind).get("plain_type")))
    return model


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Within this context the model gives dense gradients: layers keep their whole input, companions are plain.

    Args:
        model: a model that `compress_` changed.
    """
    layers = [layer for _, layer in compressed_layers(model)]
    before = [layer.lance_exact for layer in layers]
    for layer in layers:
        layer.lance_exact = True
    try:
        with companions_suspended(model):
            yield
    finally:
        for layer, value in zip(layers, before):
            layer.lance_exact = value


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLayer]]:
    """The model's compressed layers with their names, each once."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLayer):
            yield name, module


def fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2's `fully_shard` has any of the model's parameters, which it gathers for every call."""
    return any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a `DTensor`, told by its name: `torch.distributed.tensor` is not imported for it."""
    return type(tensor).__name__ == "DTensor"


def _is_candidate(module: nn.Module) -> bool:
    # Quantized layers of torch.ao are no subclasses of the plain ones, but a reader expects to see them named.
    layer = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return layer or (type(module).__module__.startswith("torch.ao.") and hasattr(module, "weight"))


def _reason_to_leave(
    module: nn.Module, name: str, config: LanceConfig, filter_fn: Callable[[nn.Module, str], bool] | None
) -> str | None:
    if type(module).__module__.startswith("torch.ao."):
        return f"quantized ({type(module).__name__})"
    reason = reason_to_leave(module)
    if reason is not None:
        return reason
    if type(module) not in COMPRESSED:
        return f"subclassed or of another kind ({type(module).__name__})"
    if config.target_modules is not None and not matches(name, config.target_modules):
        return "not in target_modules"
    if matches(name, config.exclude_modules):
        return "excluded"
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn said no"
    if not isinstance(module.weight, torch.Tensor) or not module.weight.is_floating_point():
        return "quantized weight"
    if not module.weight.requires_grad:
        return "frozen weight"
    return None
