"""The methods, each with its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lance_kernels as lance
from benchmarks.methods.filtering import GradientFilter
from benchmarks.methods.interface import Batch, Method
from benchmarks.methods.kept import Compression, Layer, keep_less
from benchmarks.methods.measure import counted_bytes, inputs_of
from benchmarks.methods.perplexity import choose_ranks
from benchmarks.methods.recompute import checkpoint_blocks, compile_with_budget
from benchmarks.methods.tucker import Fixed, Hosvd, SubspaceIteration, hosvd_factors

Bits = Literal[8, 4, 2, 1] | None
CALIBRATION_BATCHES = 100
# Energies from which a rival's largest within a byte budget is taken.
ENERGIES = tuple(step / 100 for step in range(98, 8, -2))


def plain() -> Method:
    """Backpropagation as PyTorch does it."""
    return Method("plain", lambda model, names, loader: model)


def checkpointed() -> Method:
    """Activation checkpointing by block (Chen et al., arXiv 1604.06174)."""
    return Method("checkpointed by block", lambda model, names, loader: checkpoint_blocks(model))


def compiled(budget: float = 0.5) -> Method:
    """`torch.compile` with a budget for what its backward pass keeps."""
    name = f"compiled, activation budget {budget:g}"
    return Method(name, lambda model, names, loader: compile_with_budget(model, budget), {"budget": budget})


def ours(name: str | None = None, **config: Any) -> Method:
    """This package: `LanceConfig(**config)` on the named layers.

    Args:
        name: name in tables; by default made of the settings.
        **config: fields of `LanceConfig` other than `target_modules`.
    """
    settings = lance.LanceConfig(**config)

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        lance.compress_(model, replace(settings, target_modules=list(names)))
        lance.calibrate(model, loader, max_batches=CALIBRATION_BATCHES, progress=False)
        return model

    size = f"energy {settings.energy:g}" if settings.budget_bytes is None else f"{settings.budget_bytes} bytes"
    chosen = name or f"lance, {size}, {settings.core_bits or 32} bits, companions {settings.companions}"
    details = {"energy": settings.energy, "core_bits": settings.core_bits, "budget_bytes": settings.budget_bytes}
    return Method(chosen, prepare, {**details, "companions": settings.companions})


def published(energy: float = 0.7, bits: Bits = None) -> Method:
    """LANCE in the form and the contraction order of arXiv 2509.21617: batch mode compressed, one energy."""
    config = lance.LanceConfig.published(energy)

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        lance.compress_(model, replace(config, target_modules=list(names)))
        found = lance.calibrate(model, loader, max_batches=CALIBRATION_BATCHES, progress=False)
        factors = {}
        for name, ranks in found.apply(model).items():
            spectrum = found.layers[name]
            # A mode of full rank is kept by the package; the published layer multiplies with its square factor.
            full = [size if rank is None else rank for size, rank in zip(spectrum.size, ranks)]
            factors[name] = [factor for factor in spectrum.factors(full) if factor is not None]
        lance.revert_(model)
        return keep_less(model, names, lambda name, layer: Fixed([f.float() for f in factors[name]]), bits or 0)

    return Method(_named("published", bits), prepare, {"energy": energy, "core_bits": bits})


def hosvd(energy: float = 0.7, bits: Bits = None, budget_bytes: int | None = None) -> Method:
    """HOSVD at every step (arXiv 2411.06346).

    Args:
        energy: of every mode; not used under a budget.
        bits: bits a value of core and factors; None keeps float32.
        budget_bytes: take the largest energy at which four batches keep at most this many bytes on average.
    """

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        compression = Hosvd(energy)
        keep_less(model, names, lambda name, layer: compression, bits or 0)
        if budget_bytes is not None:
            for compression.energy in ENERGIES:
                if _mean_bytes(model, names, loader) <= budget_bytes:
                    return model
            raise ValueError(f"hosvd: budget_bytes is {budget_bytes}; no energy from {ENERGIES[-1]} on fits")
        return model

    details = {"energy": energy, "core_bits": bits, "budget_bytes": budget_bytes}
    return Method(_named("HOSVD every step", bits), prepare, details)


def asi(energy: float = 0.7, bits: Bits = None, budget_bytes: int | None = None) -> Method:
    """Activation subspace iteration with a warm start (ASI, arXiv 2505.05086).

    Args:
        energy: the ranks are those of the first batch's HOSVD at this energy; not used under a budget.
        bits: bits a value of core and factors; None keeps float32.
        budget_bytes: choose the ranks by perplexity so that core and factors take at most this many bytes.
    """

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        images, labels = loader[0]
        if budget_bytes is None:
            inputs = inputs_of(model, names, images)
            ranks = {name: [f.shape[1] for f in hosvd_factors(x, energy)] for name, x in inputs.items()}
        else:
            ranks = choose_ranks(model, names, images, labels, budget_bytes, bits or 0)

        def make(name: str, layer: Layer) -> Compression:
            return SubspaceIteration(ranks[name])

        keep_less(model, names, make, bits or 0)
        # The warm start: without it the first steps of training would project on random subspaces.
        for batch, targets in loader[:4]:
            cross_entropy(model(batch), targets)
        return model

    details = {"energy": energy, "core_bits": bits, "budget_bytes": budget_bytes}
    return Method(_named("ASI", bits), prepare, details)


def gradient_filtering(patch: int = 4, bits: Bits = None) -> Method:
    """Gradient filtering (arXiv 2301.00330) with patches of `patch x patch`."""

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        return keep_less(model, names, lambda name, layer: GradientFilter(patch), bits or 0)

    return Method(_named(f"gradient filtering, R={patch}", bits), prepare, {"patch": patch, "core_bits": bits})


def lora(rank: int = 8) -> Method:
    """LoRA (Hu et al., arXiv 2106.09685) on the named layers, by peft; what else is trained stays trained."""

    def prepare(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        replaced = {id(p) for name in names for p in model.get_submodule(name).parameters()}
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(names)), model)
        for parameter in trained:
            parameter.requires_grad_(id(parameter) not in replaced)
        return model

    return Method(f"LoRA, rank {rank}", prepare, {"rank": rank})


def _named(name: str, bits: Bits) -> str:
    return name if bits is None else f"{name}, {bits} bits"


def _mean_bytes(model: nn.Module, names: Sequence[str], loader: Sequence[Batch]) -> float:
    counts = [counted_bytes(model, names, batch) for batch in loader[:4]]
    return float(torch.tensor(counts, dtype=torch.float64).mean())
