"""What is measured of a method: bytes, operations, and the error of its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import lance_kernels as lance
from benchmarks.finetune import loss_of
from benchmarks.methods.interface import Batch
from benchmarks.methods.kept import kept_layers
from lance_kernels.convert import compressed_layers


def eigh_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Eigenvalues and eigenvectors of a symmetric `n x n` matrix: `9 n^3` (Golub and Van Loan, section 8.3)."""
    return 9 * int(shape[-1]) ** 3


def qr_flops(shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Thin QR of an `m x n` matrix, `Q` formed: `4 m n^2 - 4/3 n^3` (Golub and Van Loan, section 5.2)."""
    rows, columns = int(shape[-2]), int(shape[-1])
    return 4 * rows * columns**2 - 4 * columns**3 // 3


DECOMPOSITIONS: Mapping[Any, Any] = {
    torch.ops.lance.gram_eigh: eigh_flops,
    torch.ops.aten.linalg_qr: qr_flops,
}


def flops(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Floating point operations of a step's forward and backward pass, decompositions included.

    What a method does to compress is in its forward pass, so that decomposition is the forward pass over plain's.
    """
    images, labels = batch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS) as forward:
        loss = cross_entropy(model(images), labels)
    with FlopCounterMode(display=False, custom_mapping=DECOMPOSITIONS) as backward:
        torch.autograd.grad(loss, trained)
    return {"forward": int(forward.get_total_flops()), "backward": int(backward.get_total_flops())}


def inputs_of(model: nn.Module, names: Sequence[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The named layers' inputs for a batch."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda layer, args: found.__setitem__(name, args[0].detach())

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def dense_bytes(model: nn.Module, names: Sequence[str], batch: Batch) -> int:
    """Bytes of the named layers' inputs, which a plain step keeps."""
    return sum(x.numel() * x.element_size() for x in inputs_of(model, names, batch[0]).values())


def counted_bytes(model: nn.Module, names: Sequence[str], batch: Batch) -> int:
    """Bytes kept in place of the named layers' inputs, as papers count: cores, and factors that are new at every step.

    Args:
        model: what a method made; with layers that no method compressed, their inputs are counted.
        names: the layers.
        batch: one step's.
    """
    if any(True for _ in compressed_layers(model)):
        return lance.report(model, batch[0], loss_of(batch[1])).counted_bytes
    kept = kept_layers(model)
    if not kept:
        return dense_bytes(model, names, batch)
    model(batch[0])
    return sum(layer.kept_bytes for layer in kept.values())


def factor_bytes(model: nn.Module) -> int:
    """Bytes of factors from calibration, which all steps share and no paper counts."""
    tensors = [factor for _, layer in compressed_layers(model) for factor in layer.factors if factor is not None]
    for layer in kept_layers(model).values():
        tensors += getattr(layer.compression, "factors", [])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_and_peak(model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Bytes that autograd holds between forward and backward, and the step's peak above its start."""
    report = lance.report(model, batch[0], loss_of(batch[1]))
    return report.held_bytes, report.peak_bytes


def gradients(model: nn.Module, names: Sequence[str], batch: Batch) -> list[torch.Tensor]:
    """Weight gradients of the named layers."""
    weights = [model.get_submodule(name).weight for name in names]
    return list(torch.autograd.grad(cross_entropy(model(batch[0]), batch[1]), weights))


def errors(model: nn.Module, reference: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> Errors:
    """Cosine and relative error of the weight gradients of a method, each layer's mean over batches.

    Args:
        model: what the method made.
        reference: the plain model.
        names: the layers.
        batches: images and labels.

    Returns:
        By layer, the cosine to the plain gradient, and the norm of the difference over the plain gradient's norm.
    """
    cosines: dict[str, list[float]] = {name: [] for name in names}
    relative: dict[str, list[float]] = {name: [] for name in names}
    for batch in batches:
        for name, one, true in zip(names, gradients(model, names, batch), gradients(reference, names, batch)):
            cosines[name].append(cosine_similarity(one.flatten().double(), true.flatten().double(), dim=0).item())
            relative[name].append(((one - true).norm() / true.norm()).item())
    return _means(cosines), _means(relative)


Errors = tuple[dict[str, float], dict[str, float]]


def _means(values: dict[str, list[float]]) -> dict[str, float]:
    return {name: sum(found) / len(found) for name, found in values.items()}
