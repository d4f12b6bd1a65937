"""Holding less by computing again: checkpoints of every block, and the compiler's budget for activations."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Recomputes every block: the modules of a list of modules, or of a sequence of residual layers."""
    blocks = [
        block
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
        for block in module
        if any(True for _ in block.children()) and not isinstance(block, nn.ModuleList)
    ]
    nested = {id(inner) for block in blocks for inner in block.modules() if inner is not block}
    for block in blocks:
        if id(block) not in nested:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def compile_with_budget(model: nn.Module, budget: float = 0.5) -> nn.Module:
    """Compiles with a share of the activations' memory as the budget of the partitioner.

    Args:
        model: the model.
        budget: share of what the compiled backward pass would keep, in 0 to 1.
    """
    import torch._functorch.config as settings

    settings.activation_memory_budget = budget
    torch._dynamo.reset()
    return torch.compile(model)
