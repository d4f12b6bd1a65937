"""What the drop-in linear and convolution layers share: factors, their state, and when a core is kept."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lance_kernels.config import LanceConfig
from lance_kernels.nn._shared import SharedCore
from lance_kernels.nn._state import factor_name, layer_state, owner_tensor, relative_name
from lance_kernels.ops._checks import accumulation_dtype

Factors = list[torch.Tensor | None]


class CompressedLayer(nn.Module):
    """Mixin of the layers that keep a core of their input in place of the input.

    Until `set_factors` is called, and whenever no weight gradient will be asked for, the layer is its plain namesake.

    Attributes:
        lance_config: how ranks are chosen when factors are made.
        lance_core_bits: bits a value of the core, 0 for the dtype of the input.
        lance_exact: keep the whole input and give dense gradients.
        lance_lengths: of a sample's core, how many leading values of the last mode are kept, by the indices of the
            modes between, int32; None for all.
    """

    plain_type: ClassVar[type[nn.Module]]
    weight: torch.Tensor
    lance_config: LanceConfig
    lance_core_bits: int
    lance_exact: bool
    lance_lengths: torch.Tensor | None
    _lance_factor_names: tuple[str, ...]
    _lance_count: int  # the sum of lance_lengths
    # The layer that stores the factors this one uses too, and its relative name; a tuple hides it from `modules()`.
    _lance_owner: tuple[CompressedLayer, str] | None
    # Where an owner's core is found by the layers that use its factors; only owners have one.
    _lance_shared: SharedCore | None
    _lance_users: list[CompressedLayer]
    # What the last state that holds these factors has for their form, by which other users find them there.
    _lance_saved_form: torch.Tensor | None

    def __init__(self, *args: Any, config: LanceConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lance_initialize(LanceConfig() if config is None else config)

    def lance_initialize(self, config: LanceConfig) -> None:
        """Gives a plain module whose class was just swapped, or a new one, its compression state: not calibrated."""
        self.lance_config = config
        self.lance_core_bits = config.core_bits or 0
        self.lance_exact = False
        self.register_buffer("lance_lengths", None)
        self._lance_factor_names = ()
        self._lance_owner = None
        self._lance_shared = None
        self._lance_users = []
        self._lance_saved_form = None

    @property
    def lance_source(self) -> CompressedLayer:
        """The layer whose factors this one uses: itself, or the owner of its input group."""
        return self if self._lance_owner is None else self._lance_owner[0]

    @property
    def is_calibrated(self) -> bool:
        """Whether the layer has factors, so that it keeps cores."""
        return len(self.lance_source._lance_factor_names) > 0

    @property
    def factors(self) -> Factors:
        """The factors, one `(size, rank)` matrix or None (mode kept) a mode of the input; empty before calibration."""
        source = self.lance_source
        return [getattr(source, name) for name in source._lance_factor_names]

    @property
    def lance_form(self) -> torch.Tensor:
        """What a saved state says beside the factors: number of modes and bits a value of the core."""
        return torch.tensor([len(self.lance_source._lance_factor_names), self.lance_core_bits])

    @property
    def lance_owner(self) -> torch.Tensor:
        """Name of the layer that stores this one's factors; `torch.distributed.checkpoint` asks for it by its key."""
        return owner_tensor("" if self._lance_owner is None else self._lance_owner[1])

    def set_factors(self, factors: Sequence[torch.Tensor | None], lengths: torch.Tensor | None = None) -> None:
        """Replaces the layer's factors.

        Args:
            factors: one `(size, rank)` matrix or None a mode of the input; empty makes the layer uncalibrated. They are
                stored as buffers named `lance_factor_<mode>of<modes>`, in float32 (float64 for a float64 weight), also
                when the model moves to a narrower dtype later, so that no step casts them.
            lengths: of a sample's core, how many leading values of the last mode are kept, by the indices of the modes
                between; None for all. Needs a factor for every mode but the first, which has none.
        """
        self._store_factors(factors, lengths, self.weight.device)

    def _store_factors(
        self, factors: Sequence[torch.Tensor | None], lengths: torch.Tensor | None, device: torch.device
    ) -> None:
        # The layers that use this one's factors follow.
        users, self._lance_users = self._lance_users, []
        self.lance_clear_factors()
        self._lance_users = users
        dtype = accumulation_dtype(self.weight.dtype)
        names = tuple(factor_name(mode, len(factors)) for mode in range(len(factors)))
        # Autograd saves no tensor that inference mode made.
        with torch.inference_mode(False):
            for name, factor in zip(names, factors):
                stored = None if factor is None else factor.detach().to(device, dtype, copy=True).contiguous()
                self.register_buffer(name, stored)
            self.lance_lengths = None if lengths is None else lengths.detach().to(device, torch.int32, copy=True)
        self._lance_factor_names = names
        self._lance_count = 0 if lengths is None or lengths.is_meta else int(lengths.sum())

    def lance_clear_factors(self) -> None:
        """Forgets the factors; the layer is plain until it gets new ones. Layers that used them get copies of them."""
        if self._lance_owner is not None:
            self._lance_owner[0]._lance_users.remove(self)
            self._lance_owner = None
        factors = self.factors
        for user in list(self._lance_users):
            user._store_factors(factors, self.lance_lengths, user.weight.device)
        for name in self._lance_factor_names:
            delattr(self, name)
        self.lance_lengths = None
        self._lance_factor_names = ()

    def lance_use_factors_of(self, owner: CompressedLayer, name: str) -> None:
        """Drops the layer's factors for those of a layer that reads the same input, and its cores with them.

        Args:
            owner: the other layer; it has factors of its own.
            name: its name relative to this layer's, for saved states.
        """
        self.lance_clear_factors()
        self._lance_owner = (owner, name)
        owner._lance_users.append(self)
        if owner._lance_shared is None:
            owner._lance_shared = SharedCore()

    def lance_keeps_core(self) -> bool:
        """Whether a call now would keep a core: calibrated, and a weight gradient may be asked for."""
        keeps = (
            self.is_calibrated
            and not self.lance_exact
            and self.weight.requires_grad
            and torch.is_grad_enabled()
            # Dynamo of PyTorch 2.11 takes `torch.compiler.is_exporting()` for true in whatever it compiles.
            and not torch.compiler._is_exporting_flag
        )
        if keeps and not torch.compiler.is_compiling():
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise RuntimeError(
                    "lance_kernels: torch.func transforms (grad, vmap, jvp, ...) need derivatives that a core cannot "
                    "give; run them within lance_kernels.exact(model)"
                )
            if type(self.weight).__name__ == "DTensor":
                warnings.warn(
                    f"lance_kernels: the weight of {type(self).__name__} is a DTensor (tensor parallel); the layer "
                    "keeps its whole input",
                    stacklevel=4,
                )
                return False
        return keeps

    def lance_factors_for(self, size: Sequence[int]) -> Factors | None:
        """Factors for an input of this size; None when there is nothing to compress.

        A mode of another size than its factor's is kept. A batch mode with a factor uses the factor's leading rows for
        a smaller batch, and one copy of the factor for every full batch of a larger one.

        Args:
            size: the input's shape.
        """
        factors = self.factors
        if len(factors) != len(size):
            # A linear input with another number of leading modes: only the last mode is the one calibrated.
            kept: Factors = [None] * (len(size) - 1)
            factors = [*kept, factors[-1]]
        batch = factors[0] if len(factors) > 1 else None
        if batch is not None and batch.shape[0] != size[0]:
            factors[0] = _resized_batch_factor(batch, size[0])
        fitting: Factors = [
            factor if factor is not None and factor.shape[0] == extent else None
            for factor, extent in zip(factors, size)
        ]
        if not self.lance_core_bits and all(factor is None for factor in fitting):
            return None
        return fitting

    def lance_lengths_for(self, factors: Factors) -> tuple[torch.Tensor | None, int]:
        """What of a core by these factors is kept: lengths and their sum, as the operators take them.

        None and 0, that is all, where a mode is kept for a call and the lengths do not fit.
        """
        source = self.lance_source
        fits = len(factors) == len(source._lance_factor_names) and all(factor is not None for factor in factors[1:])
        return (source.lance_lengths, source._lance_count) if fits and source.lance_lengths is not None else (None, 0)

    def lance_core_size(self, size: Sequence[int]) -> list[int] | None:
        """Shape of what is kept of an input of this size, before packing; None when there is nothing to compress."""
        factors = self.lance_factors_for(size)
        if factors is None:
            return None
        lengths, count = self.lance_lengths_for(factors)
        if lengths is not None:
            return [size[0], count]
        return [extent if factor is None else factor.shape[1] for factor, extent in zip(factors, size)]

    @abstractmethod
    def lance_weight_grad_flops(
        self, size: Sequence[int], core: Sequence[int], factors: Sequence[Sequence[int] | None]
    ) -> int:
        """Operations of the weight gradient from a core.

        Args:
            size: the input's shape.
            core: the core's; the input's own is the dense weight gradient.
            factors: the factors' shapes, None for a mode that is kept.
        """

    def lance_shared(self, x: torch.Tensor) -> SharedCore | None:
        """Where the core of `x` is shared within the layer's input group; None when there is no group to share with."""
        if torch.compiler.is_compiling() or x.is_inference():
            return None
        return self.lance_source._lance_shared

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        wide = {name: getattr(self, name) for name in self._lance_factor_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = accumulation_dtype(self.weight.dtype)
        for name, before in wide.items():
            after = getattr(self, name)
            if after is not None and after.dtype != dtype:
                setattr(self, name, before.to(after.device, dtype))
        if self._lance_owner is not None:
            self._lance_owner[0]._lance_follow(self.weight)
        return self

    def _lance_follow(self, weight: torch.Tensor) -> None:
        """Brings the factors to where the weight of a layer that uses them is: this one may have left the model."""
        dtype = accumulation_dtype(weight.dtype)
        for name in (*self._lance_factor_names, "lance_lengths"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_meta:
                setattr(self, name, tensor.to(weight.device, dtype if tensor.is_floating_point() else None))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_calibrated:
            return
        source = self.lance_source
        names = [name for name in (*source._lance_factor_names, "lance_lengths") if getattr(source, name) is not None]
        first = self._lance_saved_in(destination)
        form = destination[f"{prefix}lance_form"] = self.lance_form
        if first in (None, prefix):
            source._lance_saved_form = form
            for name in names:
                factor = getattr(source, name)
                destination[f"{prefix}{name}"] = factor if keep_vars else factor.detach()
        else:
            # Each factor is saved once, by the first of its users that is there.
            for name in names:
                destination.pop(f"{prefix}{name}", None)
            destination[f"{prefix}lance_owner"] = owner_tensor(relative_name(first[:-1], prefix[:-1]))

    def _lance_saved_in(self, destination: Mapping[str, Any]) -> str | None:
        """The prefix under which a state has this layer's factors already; None where it does not."""
        saved = self.lance_source._lance_saved_form
        found = (key for key, value in destination.items() if value is saved and key.endswith("lance_form"))
        return next((key.removesuffix("lance_form") for key in found), None)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        vars(self).pop("_lance_pending_owner", None)
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        found, problems = layer_state(self, own, prefix)
        if found is not None and found.owner and not prefix:
            problems.append(f"lance_owner names {found.owner!r}, which has no factors in this state")
        error_msgs.extend(problems)
        if found is not None:
            for key in found.keys:
                del own[key]
            if found.complete and not problems:
                assign = local_metadata.get("assign_to_params_buffers", False)
                device = next((f.device for f in found.factors if f is not None and assign), self.weight.device)
                self._store_factors(found.factors, found.lengths, device)
                self.lance_core_bits = found.core_bits
            elif found.owner and not problems:
                # A hook finds the owner once everything is loaded.
                vars(self)["_lance_pending_owner"] = found.owner
                self.lance_core_bits = found.core_bits
        # Strict loading asks for every buffer: the factors were dealt with here, or stay as they are.
        for name in (*self._lance_factor_names, "lance_lengths"):
            if getattr(self, name) is not None:
                own[f"{prefix}{name}"] = getattr(self, name)
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        """The namesake's, and the factors' sizes and ranks."""
        shapes = ["keep" if f is None else f"{f.shape[0]}->{f.shape[1]}" for f in self.factors]
        bits = f", core_bits={self.lance_core_bits}" if self.lance_core_bits else ""
        if self.lance_source.lance_lengths is not None:
            bits = f", values={self.lance_source._lance_count}{bits}"
        owner = "" if self._lance_owner is None else f", shared with {self._lance_owner[1]}"
        state = f"factors=({', '.join(shapes)}){bits}{owner}" if self.is_calibrated else "not calibrated"
        return f"{super().extra_repr()}, {state}"


def _resized_batch_factor(factor: torch.Tensor, samples: int) -> torch.Tensor | None:
    copies = -(-samples // factor.shape[0])
    if copies == 0:
        return None
    blocks: torch.Tensor = torch.block_diag(*[factor] * copies)
    return blocks[:samples]
