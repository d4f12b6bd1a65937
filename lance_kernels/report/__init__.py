"""What a model's training step holds, computes and gets wrong: `report`.

The one counter of held bytes, for the demo, the tests and the benchmarks.
"""

from __future__ import annotations

import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lance_kernels._batches import run_model, tensors_in, to_device_of
from lance_kernels.convert import compressed_layers, exact
from lance_kernels.drift import tracking_suspended
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops.pack_core import core_bytes

Loss = Callable[[Any], torch.Tensor]


@dataclass
class Held:
    """One storage that the graph holds between forward and backward.

    Attributes:
        module: name of the module in whose forward it was saved first; "" for the model itself.
        operators: autograd nodes that hold it; none for what a checkpoint keeps beside the graph.
        shape: shape of the tensor that was saved first.
        dtype: its dtype.
        bytes: size of the storage.
    """

    module: str
    operators: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass
class LayerReport:
    """One layer's row.

    Attributes:
        name: the module's name.
        kind: its type.
        size: shape of its input, summed over calls in the figures below.
        dense_bytes: the inputs', as a plain layer keeps them.
        counted_bytes: what the layer keeps in their place, scales included: the form papers count.
        held_bytes: storages first saved within this module.
        flops: floating point operations of forward and backward.
        gradient_cosine: between the compressed and the dense weight gradient; None without a weight gradient.
    """

    name: str
    kind: str
    size: tuple[int, ...]
    dense_bytes: int = 0
    counted_bytes: int = 0
    held_bytes: int = 0
    flops: int = 0
    gradient_cosine: float | None = None


@dataclass
class Report:
    """A training step's memory, work and gradient error.

    Attributes:
        layers: one row a compressed layer.
        held: every storage the graph holds, largest first; parameters, buffers and the sample are not counted.
        held_bytes: their sum.
        peak_bytes: largest sum of allocations during forward and backward, above what was there before.
        flops: of forward and backward.
    """

    layers: list[LayerReport] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    held_bytes: int = 0
    peak_bytes: int = 0
    flops: int = 0

    @property
    def dense_bytes(self) -> int:
        """Bytes of the compressed layers' inputs, as plain layers keep them."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def counted_bytes(self) -> int:
        """Bytes the compressed layers keep in place of their inputs, as papers count."""
        return sum(layer.counted_bytes for layer in self.layers)

    @property
    def gradient_cosine(self) -> float | None:
        """Mean over the layers of the cosine between compressed and dense weight gradient."""
        cosines = [layer.gradient_cosine for layer in self.layers if layer.gradient_cosine is not None]
        return sum(cosines) / len(cosines) if cosines else None

    def held_by_module(self) -> dict[str, int]:
        """Held bytes by the module that saved them first, largest first."""
        totals: dict[str, int] = defaultdict(int)
        for entry in self.held:
            totals[entry.module] += entry.bytes
        return dict(sorted(totals.items(), key=lambda item: -item[1]))

    def plot(self, path: str | Path, most: int = 20) -> None:
        """Draws a bar chart of the modules that hold most, and writes it as an image.

        Args:
            path: file to write; its ending chooses the format.
            most: number of bars; what further modules hold is one more.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        totals = list(self.held_by_module().items())
        rest = sum(size for _, size in totals[most:])
        bars = [(name or "(root)", size) for name, size in totals[:most]] + ([("others", rest)] if rest else [])
        figure = Figure(figsize=(8, 1 + 0.3 * max(len(bars), 2)), layout="constrained")
        axes = figure.subplots()
        axes.barh([name for name, _ in bars], [size / 1e6 for _, size in bars])
        axes.invert_yaxis()
        axes.set_xlabel(f"MB held by autograd, {self.held_bytes / 1e6:.3f} in all")
        figure.savefig(path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        totals = {
            "dense_bytes": self.dense_bytes,
            "counted_bytes": self.counted_bytes,
            "gradient_cosine": self.gradient_cosine,
        }
        return {**asdict(self), **totals}

    def __str__(self) -> str:
        header = ("layer", "input", "dense", "counted", "held", "GFLOP", "cosine")
        rows = [
            (
                layer.name or "(root)",
                "x".join(map(str, layer.size)),
                *map(_megabytes, (layer.dense_bytes, layer.counted_bytes, layer.held_bytes)),
                f"{layer.flops / 1e9:.3f}",
                _cosine(layer.gradient_cosine),
            )
            for layer in self.layers
        ]
        within = sum(layer.held_bytes for layer in self.layers)
        rows.append(("elsewhere", "", "", "", _megabytes(self.held_bytes - within), "", ""))
        sums = map(_megabytes, (self.dense_bytes, self.counted_bytes, self.held_bytes))
        rows.append(("total", "", *sums, f"{self.flops / 1e9:.3f}", _cosine(self.gradient_cosine)))
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if not column else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths))
            )
            for row in (header, *rows)
        ]
        return "\n".join([*lines, f"peak of the step above its start: {_megabytes(self.peak_bytes)}"])


def report(
    model: nn.Module,
    sample: Any,
    loss_fn: Loss | None = None,
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
) -> Report:
    """Measures one training step of a model: bytes held, peak, operations, and the gradients' error.

    The model's modes, gradients, buffers and the random number generators are left as they were. Every figure comes
    from a forward and backward pass that really ran; only `counted_bytes` is counted from shapes, as papers do. What a
    compiled model holds, and its peak, are those of its compiled code; other figures are those of eager code.

    Args:
        model: any model; compressed layers get a row each.
        sample: a batch, as `calibrate` takes it.
        loss_fn: scalar loss of the model's output; by default the output's `loss` where it has one, else the mean
            square of its first tensor.
        forward_fn: `forward_fn(model, sample)` runs the model on a sample of any other form.

    Returns:
        The report; `print` shows it as a table.

    Raises:
        ValueError: the loss needs no gradient, so there is no training step to measure; or the sample reaches none of
            the model's compressed layers.
    """
    step = _Step(model, to_device_of(model, sample), loss_fn or default_loss, forward_fn or run_model)
    result = Report()
    with _unchanged(model):
        result.held, result.held_bytes = step.hold()
        result.peak_bytes = step.peak()
        # Hooks that came after compilation run in eager code alone.
        with torch.compiler.set_stance("force_eager"):
            rows = step.count()
            result.flops = step.flops(rows)
            step.compare(rows)
    by_module = result.held_by_module()
    for name, row in rows.items():
        row.held_bytes = by_module.get(name, 0)
    result.layers = list(rows.values())
    return result


def held_bytes(model: nn.Module, sample: Any, loss_fn: Loss | None = None) -> int:
    """Bytes that autograd holds between forward and backward: the `held_bytes` of `report`, without the rest.

    Args:
        model: any model, compiled ones too.
        sample: a batch, as `calibrate` takes it.
        loss_fn: as for `report`.
    """
    with _unchanged(model):
        return _Step(model, to_device_of(model, sample), loss_fn or default_loss, run_model).hold()[1]


def default_loss(output: Any) -> torch.Tensor:
    """The output's `loss` where it has one, else the mean square of its first floating tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    tensor = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
    if tensor is None:
        raise ValueError(f"report: the output, a {type(output).__name__}, has no floating tensor; expected a loss_fn")
    return tensor.float().pow(2).mean()


class _Saved:
    """What a saved-tensor hook puts in the graph in place of a tensor."""

    def __init__(self, tensor: torch.Tensor, module: str) -> None:
        self.tensor, self.module = tensor, module
        self.operators: set[str] = set()


class _Step:
    """One training step of a model on a sample, run once for each thing that is measured."""

    def __init__(
        self, model: nn.Module, sample: Any, loss_fn: Loss, forward_fn: Callable[[nn.Module, Any], Any]
    ) -> None:
        self.model, self.sample, self.loss_fn, self.forward_fn = model, sample, loss_fn, forward_fn
        self.random_state = torch.random.get_rng_state()
        self.cuda_states = {device: torch.cuda.get_rng_state(device) for device in _cuda_devices(model)}

    def forward(self) -> torch.Tensor:
        torch.random.set_rng_state(self.random_state)
        for device, state in self.cuda_states.items():
            torch.cuda.set_rng_state(state, device)
        with torch.enable_grad():
            loss = self.loss_fn(self.forward_fn(self.model, self.sample))
        if not loss.requires_grad:
            raise ValueError("report: the loss needs no gradient; expected a model with trainable parameters")
        return loss

    def backward(self, loss: torch.Tensor) -> dict[torch.Tensor, torch.Tensor | None]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return dict(zip(trained, torch.autograd.grad(loss, trained, allow_unused=True)))

    def count(self) -> dict[str, LayerReport]:
        rows: dict[str, LayerReport] = {}
        layers = dict(compressed_layers(self.model))
        cores: dict[CompressedLayer, tuple[torch.Tensor, int]] = {}
        handles = [
            layer.register_forward_pre_hook(_count_into(rows, name, cores), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            self.forward()
        finally:
            for handle in handles:
                handle.remove()
        if layers and not rows:
            raise ValueError(
                f"report: sample reached none of the {len(layers)} compressed layers; expected at least one"
            )
        return rows

    def hold(self) -> tuple[list[Held], int]:
        own = (*self.model.parameters(), *self.model.buffers(), *tensors_in(self.sample))
        excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
        packed: list[weakref.ref[_Saved]] = []

        def pack(tensor: torch.Tensor) -> _Saved:
            # Detached: a node that saved its own result would hold itself through it, and never be freed.
            saved = _Saved(tensor.detach(), names[-1] if names else "")
            packed.append(weakref.ref(saved))
            return saved

        with (
            _module_names(self.model) as names,
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor),
        ):
            loss = self.forward()
        for node in _graph(loss.grad_fn):
            for entry in _saved_by(node):
                entry.operators.add(node.name())
        # What the forward pass itself dropped is gone; checkpoints hold their inputs in nodes outside of the graph.
        alive = [saved for reference in packed if (saved := reference()) is not None]
        by_storage: dict[int, list[_Saved]] = defaultdict(list)
        for saved in alive:
            pointer = saved.tensor.untyped_storage().data_ptr()
            if pointer and pointer not in excluded:
                by_storage[pointer].append(saved)
        held = [
            Held(
                module=group[0].module,
                operators=tuple(sorted(set().union(*(saved.operators for saved in group)))),
                shape=tuple(group[0].tensor.shape),
                dtype=str(group[0].tensor.dtype).removeprefix("torch."),
                bytes=group[0].tensor.untyped_storage().nbytes(),
            )
            for group in by_storage.values()
        ]
        held.sort(key=lambda entry: -entry.bytes)
        return held, sum(entry.bytes for entry in held)

    def peak(self) -> int:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.backward(self.forward())
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        activities = [torch.profiler.ProfilerActivity.CPU]
        with _quiet_profiler(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            self.backward(self.forward())
        results = profiler.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        total = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            highest = max(highest, total)
        return highest

    def flops(self, rows: dict[str, LayerReport]) -> int:
        root = _Root(self)
        with FlopCounterMode(display=False) as counter:
            self.backward(root())
        for name, counts in counter.get_flop_counts().items():
            row = rows.get(name.removeprefix("_Root.model").removeprefix("."))
            if row is not None:
                row.flops = sum(counts.values())
        return int(counter.get_total_flops())

    def compare(self, rows: dict[str, LayerReport]) -> None:
        layers = {name: layer for name, layer in compressed_layers(self.model) if name in rows}
        if not any(layer.lance_keeps_core() for layer in layers.values()):
            return
        compressed = self.backward(self.forward())
        with exact(self.model):
            dense = self.backward(self.forward())
        for name, layer in layers.items():
            ours, true = compressed.get(layer.weight), dense.get(layer.weight)
            if ours is not None and true is not None:
                pair = ours.flatten().double(), true.flatten().double()
                rows[name].gradient_cosine = torch.nn.functional.cosine_similarity(*pair, dim=0).item()


class _Root(nn.Module):
    """Runs a step as a module around the model: `FlopCounterMode` takes its names from the first module called."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step, self.model = step, step.model

    def forward(self) -> torch.Tensor:
        return self.step.forward()


def _count_into(
    rows: dict[str, LayerReport], name: str, cores: dict[CompressedLayer, tuple[torch.Tensor, int]]
) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, CompressedLayer)
        x = next(tensors_in((args, kwargs)))
        row = rows.setdefault(name, LayerReport(name, type(layer).__name__, tuple(x.shape)))
        itemsize = x.element_size()
        if torch.is_autocast_enabled(x.device.type):
            itemsize = torch.get_autocast_dtype(x.device.type).itemsize
        row.dense_bytes += x.numel() * itemsize
        row.counted_bytes += _counted(layer, x, itemsize, cores)

    return hook


def _counted(
    layer: CompressedLayer, x: torch.Tensor, itemsize: int, cores: dict[CompressedLayer, tuple[torch.Tensor, int]]
) -> int:
    if not layer.weight.requires_grad:
        return 0
    batched_dim = getattr(layer, "batched_dim", x.dim())
    size = x.shape if x.dim() == batched_dim else torch.Size((1, *x.shape))
    core = layer.lance_core_size(size) if layer.lance_keeps_core() else None
    if core is None:
        return x.numel() * itemsize
    if layer.lance_shared(x) is not None:
        # Of layers that share an input, the first that keeps the core counts it.
        known, version = cores.get(layer.lance_source, (None, 0))
        if known is x and version == x._version:
            return 0
        cores[layer.lance_source] = x, x._version
    return core_bytes(core, layer.lance_core_bits, itemsize)


def _graph(root: Any) -> Iterator[Any]:
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def _saved_by(node: Any) -> Iterator[_Saved]:
    """What a node holds, without unpacking it: another hook's unpacking may compute a whole block again."""
    for attribute in dir(node):
        if attribute.startswith("_raw_saved_"):
            entries = getattr(node, attribute)
            for entry in entries if isinstance(entries, list | tuple) else [entries]:
                kept = entry.data if entry is not None else None
                if isinstance(kept, _Saved):
                    yield kept


@contextmanager
def _module_names(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules whose forward is running."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: _push(stack, name)))
        handles.append(module.register_forward_hook(lambda *_: _drop(stack), always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _push(stack: list[str], name: str) -> None:
    # Compiled code would go on doing this after the hook is removed.
    if not torch.compiler.is_compiling():
        stack.append(name)


def _drop(stack: list[str]) -> None:
    if not torch.compiler.is_compiling():
        stack.pop()


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler's library from writing its start and stop to stderr, unless the user chose a level."""
    name = "KINETO_LOG_LEVEL"
    was_chosen = name in os.environ
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if not was_chosen:
            del os.environ[name]


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Puts buffers and random number generators back, without a look for drift; gradients are never touched."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    # A forward pass may also put other tensors in their place.
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    with torch.random.fork_rng(devices=_cuda_devices(model)), tracking_suspended(model):
        try:
            yield
        finally:
            for place, before in places:
                place.clear()
                place.update(before)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    # Through `data`: to a graph that waits for its backward pass the buffer was never written to.
                    buffer.data.copy_(value)


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3f} MB"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
