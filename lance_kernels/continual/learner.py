"""Learning tasks one after the other in orthogonal subspaces: `NullSpaceLearner`."""

from __future__ import annotations

import math
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lance_kernels.calibrate import Runner
from lance_kernels.config import LanceConfig, is_count, is_fraction, is_pattern
from lance_kernels.continual.factors import check_factors, factors_state, load_factors
from lance_kernels.continual.gather import Found, Gatherer, protected_directions
from lance_kernels.continual.layers import PatchConvolution, keep_patches_
from lance_kernels.continual.policy import After, Policy
from lance_kernels.continual.protection import Protection
from lance_kernels.continual.summary import Capacity, LayerMemory, LearnerSummary, Memory
from lance_kernels.convert import compress_, compressed_layers, is_dtensor, revert_
from lance_kernels.distributed import Ranks
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops._checks import FLOATING
from lance_kernels.state import atomic_save, share_factors

FORMAT = 2


class NullSpaceLearner:
    """Trains tasks one after the other so that later ones leave alone what earlier ones use.

    The model's linear and convolution layers keep cores of their inputs from the first task on (`compress_`). At the
    end of a task, the directions that carry a share of the energy of every layer's input are protected (features of a
    linear layer, patches of a convolution). The cores of later tasks hold only what is free of these, so weight
    gradients are orthogonal to them; and after every optimizer step, a weight that has moved along a protected
    direction all the same (by momentum, Adam's scaling, weight decay) is brought back. Outputs of the forward pass are
    exact.

    Args:
        model: a plain model; changed in place. A `DistributedDataParallel` wrapper is looked through.
        optimizer: trains the model; any of `torch.optim`, or all of them where there are several.
        energy: share of a task's energy that the protected directions carry, in (0, 1].
        config: how far inputs are compressed; `LanceConfig()` by default.
        forward_fn: `forward_fn(model, batch)` runs the model on a batch, as for `calibrate`.
        heads: patterns of modules that belong to one task each; their weights are not protected.
        after_first_task: "freeze" takes biases, norms, embeddings and all else that no null space protects out of
            training once the first task has ended, keeps running statistics, and freezes a head after the first task
            that trains it; "train" trains them in every task.
        max_batches: batches of a loader that are looked at; None for all.
        basis_dtype: dtype of the stored directions; narrower than float32 they take less and are protected less well.
        basis_device: device of the stored directions and remembered products; None for that of the weights.
        progress: show progress bars.

    Raises:
        TypeError: `model`, `optimizer`, `config` or `forward_fn` is something else.
        ValueError: another argument is out of its range, no optimizer holds the weight of a layer to protect, or the
            model is compressed already, has no layer to protect or is tensor parallel.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        energy: float = 0.97,
        *,
        config: LanceConfig | None = None,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        heads: Sequence[str] = (),
        after_first_task: After = "freeze",
        max_batches: int | None = 50,
        basis_dtype: torch.dtype = torch.float32,
        basis_device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        config = LanceConfig() if config is None else config
        if forward_fn is not None and not callable(forward_fn):
            raise TypeError(
                f"NullSpaceLearner: forward_fn is a {type(forward_fn).__name__}; expected a function or None"
            )
        _check_arguments(energy, config, heads, after_first_task, max_batches, basis_dtype, basis_device)
        self.optimizers = _optimizers(optimizer)
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        _check_local(self.model)
        self.energy, self.max_batches, self.progress = energy, max_batches, progress
        self.forward_fn = forward_fn
        self.tasks = 0
        self.in_task = False
        self.closed = False
        self.restored = False  # whether a state was loaded, and no task has begun or gone on since
        self._protected: dict[str, Protection] = {}
        self._next_rank: dict[str, int] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self.policy = Policy(self.model, heads, after_first_task)
        self._compression = compress_(self.model, config)
        self._layers = dict(compressed_layers(self.model))
        try:
            self._protect_layers(basis_dtype, None if basis_device is None else torch.device(basis_device))
            self._check_trained(self.optimizers)
        except BaseException:
            revert_(self.model)
            raise
        self._step_handles = [one.register_step_post_hook(self._after_step) for one in self.optimizers]

    def begin_task(self, loader: Iterable[Any]) -> None:
        """Finds the factors with which a new task's inputs are compressed, free of what is protected.

        Under `torch.distributed`, every rank calls this with its share of the data.

        Args:
            loader: the task's batches, as for `calibrate`; iterated up to twice (an iterator's are kept).

        Raises:
            RuntimeError: a task has begun already, the learner is closed, a protected layer was replaced, an input or
                a protected weight holds NaN or infinity, or a state was loaded that is not of the model's weights.
            ValueError: the loader gave no batch, no optimizer holds the weight of a protected layer, or the model was
                made tensor parallel.
        """
        self._check_usable()
        if self.in_task:
            raise RuntimeError("NullSpaceLearner.begin_task: a task has begun; call end_task first")
        self._check_trained(self.optimizers)
        changed = self._bring_back()
        if changed and self.restored:
            raise RuntimeError(
                f"NullSpaceLearner.begin_task: weights are not those of the state that was loaded in {_listed(changed)}"
                "; expected the model's own state to be loaded, too, before a task begins"
            )
        full = {name for name, protection in self._protected.items() if protection.full}
        layers = {name: layer for name, layer in self._layers.items() if name not in full}
        protected = {name: protection for name, protection in self._protected.items() if name not in full}
        found = self._gatherer(loader).factors(layers, protected)
        frozen = self._freeze_full()
        for layer in self._layers.values():
            layer.lance_clear_factors()
        for name, factors in found.tucker.items():
            layers[name].set_factors(factors)
        for name, patch in found.patches.items():
            layer = layers[name]
            assert isinstance(layer, PatchConvolution)
            layer.set_patch_factors(patch)
        share_factors(self.model, {n: o for n, o in found.shared.items() if not {n, o} & set(found.patches)})
        self._set_next_ranks(found)
        for name in changed:
            self._protected[name].remember()
        self._hook_gradients()
        self.in_task, self.restored = True, False
        unreached = [name for name in found.uncalled if name in protected]
        _warn_of(frozen, unreached, "these layers stay plain in this task", changed)

    def end_task(self, loader: Iterable[Any]) -> None:
        """Protects what the task that was trained uses of every layer's input.

        Args:
            loader: the task's batches, as for `begin_task`.

        Raises:
            RuntimeError: no task has begun, the learner is closed, a protected layer was replaced, an input holds NaN
                or infinity, or a weight changed along protected directions, as in steps of an optimizer that the
                learner does not watch.
            ValueError: the loader gave no batch.
        """
        self._check_usable()
        if not self.in_task:
            raise RuntimeError("NullSpaceLearner.end_task: no task has begun; call begin_task first")
        if changed := self._bring_back():
            raise RuntimeError(
                f"NullSpaceLearner.end_task: weights changed along protected directions in {_listed(changed)} in "
                "steps that were not seen; expected steps of the learner's optimizers (use_optimizer gives it others)"
            )
        layers = {name: p.layer for name, p in self._protected.items() if not p.full}
        grams = self._gatherer(loader).features(layers)
        found = {
            name: protected_directions(gram, self._protected[name].basis, self.energy, layers[name], name)
            for name, gram in grams.items()
        }
        for index, (name, (directions, self._next_rank[name])) in enumerate(found.items()):
            self._protected[name].protect(directions, seed=1000 * (self.tasks + 1) + index)
        for layer in self._layers.values():
            layer.lance_clear_factors()
        self.tasks += 1
        self.in_task = self.restored = False
        frozen = self._freeze_full()
        self.policy.end_task(self._weights())
        self._hook_gradients()
        _warn_of(frozen, [name for name in layers if name not in grams], "nothing more is protected there")

    def drop_task(self) -> None:
        """Forgets that a task has begun, as after a loop that failed, so that `begin_task` can be called again.

        Weights stay as they are; what earlier tasks use stays protected.

        Raises:
            RuntimeError: no task has begun, or the learner is closed.
        """
        self._check_usable()
        if not self.in_task:
            raise RuntimeError("NullSpaceLearner.drop_task: no task has begun; call begin_task first")
        self.in_task = False

    def use_optimizer(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Watches the steps of other optimizers of the same model from now on, and no longer those before's.

        Raises:
            TypeError: `optimizer` is something else.
            ValueError: no optimizer holds the weight of a layer that is protected and in training, or the model was
                made tensor parallel.
            RuntimeError: the learner is closed, or a protected layer was replaced.
        """
        self._check_usable()
        optimizers = _optimizers(optimizer)
        self._check_trained(optimizers)
        for handle in self._step_handles:
            handle.remove()
        self.optimizers = optimizers
        self._step_handles = [one.register_step_post_hook(self._after_step) for one in optimizers]

    def capacity(self) -> dict[str, Capacity]:
        """How much of each protected layer's input is used and free, by layer name."""
        return {
            name: Capacity(
                size=protection.groups * protection.size,
                used=protection.basis.used,
                free=protection.basis.free,
                next_rank=min(self._next_rank[name], protection.basis.free),
                full=protection.full,
            )
            for name, protection in self._protected.items()
        }

    def memory(self) -> Memory:
        """Bytes that the tasks so far have left behind, by layer and in all."""
        return Memory({n: LayerMemory(*p.stored_bytes(), p.working_bytes()) for n, p in self._protected.items()})

    def summary(self) -> LearnerSummary:
        """What is protected, and the policy for everything else; `print` shows it."""
        return LearnerSummary(self.tasks, self.capacity(), self.policy.describe(self._weights()), self._compression)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the model's and the optimizer's own states, as plain values and tensors.

        Raises:
            RuntimeError: the learner is closed.
        """
        self._check_open()
        return {
            "format": FORMAT,
            "tasks": self.tasks,
            "in_task": self.in_task,
            "next_rank": dict(self._next_rank),
            "policy": self.policy.state_dict(),
            "protected": {name: protection.state_dict() for name, protection in self._protected.items()},
            "factors": factors_state(self._layers),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another learner of the same model and arguments was; the model's own state is loaded beside it.

        Args:
            state: what `state_dict` gave.

        Raises:
            ValueError: the state is of another format, or does not fit the model; the learner is left as it was.
            RuntimeError: the learner is closed.
        """
        self._check_usable()
        try:
            self._check_state(state)
        except ValueError as error:
            raise ValueError(f"NullSpaceLearner.load_state_dict: {error}") from error
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"NullSpaceLearner.load_state_dict: state is damaged ({reason})") from error
        for name, protection in self._protected.items():
            protection.load_state_dict(state["protected"][name])
        self.policy.load_state_dict(state["policy"])
        self.tasks, self.in_task = int(state["tasks"]), bool(state["in_task"])
        self._next_rank = dict(state["next_rank"])
        load_factors(self._layers, state["factors"])
        self._hook_gradients()
        self.restored = True

    def save(self, path: str | Path) -> None:
        """Writes `state_dict` to a file; one that is there stays whole until the new one is complete."""
        atomic_save(self.state_dict(), path)

    def load(self, path: str | Path) -> None:
        """Takes what `save` wrote, without running code from the file.

        Raises:
            ValueError: the file is damaged, no learner's, or does not fit.
        """
        self.load_state_dict(read_state(path))

    def close(self) -> None:
        """Removes every hook and leaves a plain model in which all is trainable that was before; cannot be undone."""
        if self.closed:
            return
        self.closed = True
        for handle in (*self._step_handles, *self._handles.values()):
            handle.remove()
        self._handles = {}
        self.policy.thaw()
        revert_(self.model)

    def _protect_layers(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Finds the layers to protect."""
        shared, head_modules = _shared_weights(self.model), self.policy.head_modules()
        for name, layer in self._layers.items():
            if name in head_modules:
                self._compression.left[name] = "a head"
            elif id(layer.weight) in shared:
                self._compression.left[name] = "its weight is used elsewhere too"
            else:
                keep_patches_(layer)
                self._protected[name] = Protection(layer, dtype, device)
                self._next_rank[name] = layer.weight[0].numel() * self._protected[name].groups
        if not self._protected:
            raise ValueError("NullSpaceLearner: model has no trainable linear or convolution layer to protect")

    def _check_trained(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuses optimizers without one of the protected weights: steps of another's would go unnoticed."""
        _check_local(self.model)
        held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
        weights = {name: p.layer.weight for name, p in self._protected.items() if p.layer.weight.requires_grad}
        missing = [name or "(root)" for name, weight in weights.items() if id(weight) not in held]
        if missing:
            raise ValueError(
                f"NullSpaceLearner: no optimizer holds the weights of {', '.join(missing)}; expected every optimizer "
                "of the model, and requires_grad=False where a weight is not trained"
            )

    def _check_state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"state is no learner's of format {FORMAT}")
        for entry in ("protected", "next_rank"):
            if different := sorted(set(state[entry]) ^ set(self._protected)):
                raise ValueError(f"layers {different} are protected in the state or in the model, not in both")
        for name, protection in self._protected.items():
            try:
                protection.check_state(state["protected"][name])
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        self.policy.check_state(state["policy"])
        check_factors(self._layers, state["factors"])
        numbers = {"tasks": state["tasks"], "in_task": state["in_task"], **state["next_rank"]}
        if wrong := [name for name, number in numbers.items() if not isinstance(number, int)]:
            raise ValueError(f"{wrong} are no numbers")

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled optimizer or weight has no hooks.
        return {**vars(self), "_step_handles": [], "_handles": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self.closed:
            self._step_handles = [one.register_step_post_hook(self._after_step) for one in self.optimizers]
            self._hook_gradients()

    def __copy__(self) -> NullSpaceLearner:
        raise TypeError("NullSpaceLearner: a shallow copy would watch the same optimizers; use copy.deepcopy")

    def _bring_back(self) -> list[str]:
        """Brings back weights that rounded; returns the layers whose weights changed, on any rank.

        Raises:
            RuntimeError: a weight holds NaN or infinity.
        """
        found, error = [], None
        for name, protection in self._protected.items():
            if protection.product is None:
                continue
            protection.make_probes()  # the model may be on another device than they were made for
            distance = float(protection.moved())
            if not math.isfinite(distance):
                error = RuntimeError(f"NullSpaceLearner: layer {name!r}: its weight holds NaN or infinity")
            elif distance > protection.tolerance:
                found.append(name)
            elif distance > 1:
                protection.restore_(distance)
        everywhere = {name for names in Ranks().exchange(found, error) for name in names}
        return [name for name in self._protected if name in everywhere]

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            self.policy.look_at_heads()
            guarding = [protection for protection in self._protected.values() if protection.guards]
            if not guarding:
                return
            moved = torch.stack([protection.moved().to(guarding[0].layer.weight.device) for protection in guarding])
            for protection, distance in zip(guarding, moved.tolist()):
                if not distance <= 1:
                    protection.restore_(distance)

    def _hook_gradients(self) -> None:
        """Lets only the free part of a gradient through, where it does not come from factors that are free anyway."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {
            name: protection.layer.weight.register_hook(protection.project)
            for name, protection in self._protected.items()
            if protection.guards and not _keeps_free_core(protection.layer)
        }

    def _freeze_full(self) -> list[str]:
        """Freezes the layers without free directions; returns the names of those that were trained until now."""
        names = [name for name, p in self._protected.items() if p.full and p.layer.weight.requires_grad]
        for name in names:
            self.policy.freeze(f"{name}.weight" if name else "weight", self._protected[name].layer.weight)
        return names

    def _set_next_ranks(self, found: Found) -> None:
        for name, protection in self._protected.items():
            layer = protection.layer
            if name in found.patches:
                self._next_rank[name] = int(found.patches[name].factor.shape[2]) * protection.groups
            elif name in found.tucker and not isinstance(layer, PatchConvolution):
                last = found.tucker[name][-1]
                self._next_rank[name] = protection.size if last is None else int(last.shape[1])
            else:
                self._next_rank[name] = protection.basis.free

    def _gatherer(self, loader: Iterable[Any]) -> Gatherer:
        batches = list(islice(loader, self.max_batches)) if isinstance(loader, Iterator) else loader
        return Gatherer(Runner(self.model, batches, self.max_batches, self.forward_fn, self.progress))

    def _weights(self) -> list[torch.Tensor]:
        return [protection.layer.weight for protection in self._protected.values()]

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("NullSpaceLearner: closed; make a new one")

    def _check_usable(self) -> None:
        self._check_open()
        modules = dict(self.model.named_modules(remove_duplicate=False))
        replaced = [name or "(root)" for name, p in self._protected.items() if modules.get(name) is not p.layer]
        if replaced:
            raise RuntimeError(
                f"NullSpaceLearner: another module is in the place of {', '.join(replaced)}; expected the layers that "
                "are protected (what is replaced between tasks belongs into heads)"
            )
        self._layers = {name: layer for name, layer in self._layers.items() if modules.get(name) is layer}


def read_state(path: str | Path) -> dict[str, Any]:
    """What `NullSpaceLearner.save` wrote.

    Raises:
        ValueError: the file is damaged or no learner's.
    """
    with Path(path).open("rb") as file:
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"NullSpaceLearner.load: {path} is damaged or no learner's state ({reason})") from error
    return state


def _optimizers(optimizer: object) -> tuple[torch.optim.Optimizer, ...]:
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"NullSpaceLearner: optimizer is a {type(one).__name__}; expected a torch.optim.Optimizer or several"
            )
    return optimizers


def _check_arguments(
    energy: object,
    config: object,
    heads: Sequence[str],
    after_first_task: str,
    max_batches: object,
    basis_dtype: torch.dtype,
    basis_device: torch.device | str | None,
) -> None:
    if not isinstance(config, LanceConfig):
        raise TypeError(f"NullSpaceLearner: config is a {type(config).__name__}; expected a LanceConfig")
    if config.budget_bytes is not None:
        raise ValueError(
            f"NullSpaceLearner: config.budget_bytes is {config.budget_bytes}; expected None, ranks follow energy here"
        )
    if not is_fraction(energy):
        raise ValueError(f"NullSpaceLearner: energy is {energy!r}; expected a number in (0, 1]")
    if isinstance(heads, str) or not all(map(is_pattern, heads)):
        raise ValueError(
            f"NullSpaceLearner: heads is {heads!r}; expected a sequence of module names or regular expressions"
        )
    if after_first_task not in ("freeze", "train"):
        raise ValueError(f'NullSpaceLearner: after_first_task is {after_first_task!r}; expected "freeze" or "train"')
    if max_batches is not None and not is_count(max_batches):
        raise ValueError(
            f"NullSpaceLearner: max_batches is {max_batches!r}; expected an integer of at least 1, or None"
        )
    if basis_dtype not in FLOATING:
        raise ValueError(f"NullSpaceLearner: basis_dtype is {basis_dtype}; expected one of {FLOATING}")
    try:
        torch.empty(0, device=basis_device)
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"NullSpaceLearner: basis_device is {basis_device!r}; expected a device of this machine, or None"
        ) from error


def _check_local(model: nn.Module) -> None:
    sharded = [name for name, parameter in model.named_parameters() if is_dtensor(parameter)]
    if sharded:
        raise ValueError(f"NullSpaceLearner: the parameter {sharded[0]!r} is a DTensor; expected a local tensor")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name or "(root)" for name in names)


def _warn_of(frozen: Sequence[str], unreached: Sequence[str], consequence: str, changed: Sequence[str] = ()) -> None:
    """Warns at the end of `begin_task` and `end_task`, whose work is then done where warnings are made errors."""
    for names, said, then in (
        (frozen, "no direction is free in", "frozen from now on"),
        (unreached, "no batch reached", consequence),
        (changed, "since the last task, weights changed along protected directions in", "they are kept as they are"),
    ):
        if names:
            warnings.warn(f"NullSpaceLearner: {said} {_listed(names)}; {then}", stacklevel=3)


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of the parameters that more than one module has."""
    counts = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {identity for identity, count in counts.items() if count > 1}


def _keeps_free_core(layer: CompressedLayer) -> bool:
    """Whether the layer's factors alone keep its gradient to free directions."""
    if isinstance(layer, PatchConvolution):
        return layer.lance_patch is not None
    return layer.is_calibrated
