"""ASI's choice of ranks (arXiv 2505.05086, section 3.3): least summed perplexity within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.methods.tucker import Tucker, hosvd_factors
from lance_kernels.ops.pack_core import core_bytes
from lance_kernels.ops.tucker import tucker_project

ENERGIES = tuple(step / 20 for step in range(4, 20))
Option = tuple[int, float, list[int]]


def choose_ranks(
    model: nn.Module, names: Sequence[str], images: torch.Tensor, labels: torch.Tensor, budget: int, bits: int
) -> dict[str, list[int]]:
    """Ranks by layer, one of the HOSVD's at some energies for each.

    A layer's perplexity at an energy is the Frobenius norm of the difference between its weight gradient and the one
    from the HOSVD of its input at that energy.

    Args:
        model: the plain model.
        names: its layers.
        images: one batch.
        labels: its labels.
        budget: most bytes of all cores and factors.
        bits: bits a value of them; 0 for the input's dtype.

    Raises:
        ValueError: no choice fits the budget.
    """
    inputs, grads = {}, {}
    handles = []
    for name in names:

        def hook(layer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda grad: grads.__setitem__(name, grad))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    weights = [model.get_submodule(name).weight for name in names]
    try:
        true = torch.autograd.grad(cross_entropy(model(images), labels), weights)
    finally:
        for handle in handles:
            handle.remove()
    options: list[list[Option]] = []
    for name, gradient in zip(names, true):
        layer, x = model.get_submodule(name), inputs[name]
        found = []
        for energy in ENERGIES:
            factors = hosvd_factors(x, energy)
            core = tucker_project(x, factors)
            error = (Tucker().from_core(core, factors, grads[name], layer) - gradient).norm().item()
            kept = [core, *factors]
            size = sum(core_bytes(t.shape, bits, t.element_size()) for t in kept)
            found.append((size, error, [factor.shape[1] for factor in factors]))
        options.append(found)
    return dict(zip(names, least_error(options, budget)))


def least_error(options: Sequence[Sequence[Option]], budget: int) -> list[list[int]]:
    """One option a layer with the least sum of errors whose bytes fit, found exactly.

    Args:
        options: by layer, bytes, error and ranks of each option.
        budget: most bytes of all layers.

    Raises:
        ValueError: even the smallest options take more.
    """
    partial: list[tuple[int, float, list[list[int]]]] = [(0, 0.0, [])]
    for layer in options:
        extended = sorted(
            ((size + more, error + worse, [*chosen, ranks]) for size, error, chosen in partial
             for more, worse, ranks in layer if size + more <= budget),
            key=lambda entry: entry[:2],
        )  # fmt: skip
        partial, best = [], float("inf")
        for entry in extended:  # larger and no better can be left out
            if entry[1] < best:
                partial.append(entry)
                best = entry[1]
    if not partial:
        least = sum(min(size for size, _, _ in layer) for layer in options)
        raise ValueError(f"choose_ranks: budget is {budget} bytes; the smallest options take {least}")
    return partial[-1][2]
