"""What becomes of the parameters that no null space protects, and of running statistics."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from lance_kernels.config import matches

After = Literal["freeze", "train"]
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Policy:
    """Freezes, after the first task, what cannot be kept from changing earlier tasks.

    Args:
        model: the model.
        heads: patterns of the modules that belong to one task each, as `LanceConfig` defines patterns.
        after: "freeze" or "train".
    """

    def __init__(self, model: nn.Module, heads: Sequence[str], after: After) -> None:
        self.model, self.heads, self.after = model, heads, after
        self.frozen: list[str] = []
        self.trained_heads: list[str] = []
        self.still = False
        self._handles: list[RemovableHandle] = []

    def head_modules(self) -> dict[str, nn.Module]:
        """Modules with parameters of their own that are a head or part of one, by name."""
        found = {}
        for name, module in self.model.named_modules():
            parts = name.split(".")
            owners = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
            if any(True for _ in module.parameters(recurse=False)) and any(matches(o, self.heads) for o in owners):
                found[name] = module
        return found

    def look_at_heads(self) -> None:
        """Notes the heads that got a gradient since the step before."""
        for name, module in self.head_modules().items():
            if name not in self.trained_heads and _has_gradient(module):
                self.trained_heads.append(name)

    def end_task(self, protected: Collection[torch.Tensor]) -> None:
        """Freezes everything but protected weights and the heads that no task has trained yet.

        Args:
            protected: weights that stay trainable.
        """
        if self.after == "train":
            return
        spared = {id(parameter) for parameter in protected}
        heads = {
            id(parameter)
            for name, module in self.head_modules().items()
            if name not in self.trained_heads
            for parameter in module.parameters(recurse=False)
        }
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in spared | heads:
                self.freeze(name, parameter)
        self.keep_statistics()

    def freeze(self, name: str, parameter: torch.Tensor) -> None:
        """Takes a parameter out of training; without a gradient, no optimizer moves it."""
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            self.frozen.append(name)
        parameter.grad = None

    def keep_statistics(self) -> None:
        """Lets norms with running statistics compute in eval mode from now on, whatever `train()` says."""
        self.still = True
        self._remove_handles()
        for module in self._with_statistics():
            self._handles.append(module.register_forward_pre_hook(_enter_eval_mode))
            self._handles.append(module.register_forward_hook(_leave_eval_mode, always_call=True))

    def thaw(self) -> None:
        """Undoes everything."""
        parameters = dict(self.model.named_parameters())
        for name in self.frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)
        self.frozen = []
        self._remove_handles()

    def describe(self, protected: Collection[torch.Tensor]) -> dict[str, str]:
        """What happens to each kind of parameter that the model has, and to running statistics."""
        spared = {id(parameter) for parameter in protected}
        heads = {id(p) for module in self.head_modules().values() for p in module.parameters(recurse=False)}
        counts: dict[str, int] = {}
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in spared:
                    kind = "heads" if id(parameter) in heads else _kind(module, name)
                    counts[kind] = counts.get(kind, 0) + 1
        then = "frozen after the first task" if self.after == "freeze" else "trained in every task, unprotected"
        described = {kind: f"{count} parameters, {then}" for kind, count in sorted(counts.items())}
        if "heads" in counts:
            trained = f"; trained so far: {', '.join(self.trained_heads) or 'none'}"
            each = "each frozen after the first task that trains it" if self.after == "freeze" else "always trained"
            described["heads"] = f"{counts['heads']} parameters, {each}{trained}"
        norms = sum(1 for _ in self._with_statistics())
        if norms:
            moving = "kept after the first task (eval mode)" if self.after == "freeze" else "updated in every task"
            described["running statistics"] = f"{norms} modules, {moving}"
        return described

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"frozen": list(self.frozen), "trained_heads": list(self.trained_heads), "still": self.still}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses what `state_dict` of another model's gave.

        Raises:
            ValueError: the model lacks a parameter, or an entry is no such value.
        """
        lists = isinstance(state["frozen"], list) and isinstance(state["trained_heads"], list)
        if not lists or not all(isinstance(name, str) for name in state["trained_heads"]):
            raise ValueError(f"policy is {state!r}; expected lists of names")
        if not isinstance(state["still"], bool):
            raise ValueError(f"policy's still is {state['still']!r}; expected True or False")
        parameters = dict(self.model.named_parameters())
        missing = [name for name in state["frozen"] if name not in parameters]
        if missing:
            raise ValueError(f"the model has no parameters {missing}, which the state has frozen")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave and `check_state` found right."""
        parameters = dict(self.model.named_parameters())
        self.thaw()
        for name in state["frozen"]:
            self.freeze(name, parameters[name])
        self.trained_heads = list(state["trained_heads"])
        self.still = bool(state["still"])
        if self.still:
            self.keep_statistics()

    def _with_statistics(self) -> Iterator[nn.Module]:
        heads = self.head_modules()
        for name, module in self.model.named_modules():
            if isinstance(module, _NormBase) and module.running_mean is not None and name not in heads:
                yield module

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _enter_eval_mode(module: nn.Module, args: Any) -> None:
    module.lance_mode = module.training  # type: ignore[assignment]
    module.training = False


def _leave_eval_mode(module: nn.Module, args: Any, output: Any) -> None:
    module.training = vars(module).pop("lance_mode", module.training)


def _has_gradient(module: nn.Module) -> bool:
    grads = [parameter.grad for parameter in module.parameters(recurse=False)]
    return any(grad is not None and bool(grad.any()) for grad in grads)


def _kind(module: nn.Module, name: str) -> str:
    if isinstance(module, NORMS):
        return "norms"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embeddings"
    if name == "bias":
        return "biases"
    return "other parameters"
