"""What the drop-in linear and convolution layers share: factors, their state, and when a core is kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from lance_kernels.config import LanceConfig
from lance_kernels.ops._checks import accumulation_dtype

Factors = list[torch.Tensor | None]

_FACTOR_NAME = re.compile(r"lance_factor_(\d+)of(\d+)")


class CompressedLayer(nn.Module):
    """Mixin of the layers that keep a core of their input in place of the input.

    Until `set_factors` is called, and whenever no weight gradient will be asked for, the layer is its plain namesake.

    Attributes:
        lance_config: how ranks are chosen when factors are made.
        lance_core_bits: bits a value of the core, 0 for the dtype of the input.
        lance_exact: keep the whole input and give dense gradients.
    """

    plain_type: ClassVar[type[nn.Module]]
    weight: torch.Tensor
    lance_config: LanceConfig
    lance_core_bits: int
    lance_exact: bool
    _lance_factor_names: tuple[str, ...]

    def __init__(self, *args: Any, config: LanceConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lance_initialize(LanceConfig() if config is None else config)

    def lance_initialize(self, config: LanceConfig) -> None:
        """Gives a plain module whose class was just swapped, or a new one, its compression state: not calibrated."""
        self.lance_config = config
        self.lance_core_bits = config.core_bits or 0
        self.lance_exact = False
        self._lance_factor_names = ()

    @property
    def is_calibrated(self) -> bool:
        """Whether the layer has factors, so that it keeps cores."""
        return len(self._lance_factor_names) > 0

    @property
    def factors(self) -> Factors:
        """The factors, one `(size, rank)` matrix or None (mode kept) a mode of the input; empty before calibration."""
        return [getattr(self, name) for name in self._lance_factor_names]

    def set_factors(self, factors: Sequence[torch.Tensor | None]) -> None:
        """Replaces the layer's factors.

        Args:
            factors: one `(size, rank)` matrix or None a mode of the input; empty makes the layer uncalibrated. They are
                stored as buffers named `lance_factor_<mode>of<modes>`, in float32 (float64 for a float64 weight).
        """
        self.lance_clear_factors()
        dtype = accumulation_dtype(self.weight.dtype)
        for mode, factor in enumerate(factors):
            name = f"lance_factor_{mode}of{len(factors)}"
            stored = None if factor is None else factor.detach().to(self.weight.device, dtype).contiguous()
            self.register_buffer(name, stored)
        self._lance_factor_names = tuple(f"lance_factor_{mode}of{len(factors)}" for mode in range(len(factors)))

    def lance_clear_factors(self) -> None:
        """Forgets the factors; the layer is plain again until it gets new ones."""
        for name in self._lance_factor_names:
            delattr(self, name)
        self._lance_factor_names = ()

    def lance_keeps_core(self) -> bool:
        """Whether a call now would keep a core: calibrated, and a weight gradient may be asked for."""
        return (
            self.is_calibrated
            and not self.lance_exact
            and self.weight.requires_grad
            and torch.is_grad_enabled()
            and not torch.compiler.is_exporting()
        )

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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        found: dict[int, torch.Tensor] = {}
        modes = 0
        for key, value in state_dict.items():
            match = _FACTOR_NAME.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
            if match is not None:
                found[int(match[1])], modes = value, int(match[2])
        if found:
            self.set_factors([found.get(mode) for mode in range(modes)])
        own = {f"{prefix}{name}": getattr(self, name) for name in self._lance_factor_names}
        # Strict loading asks for every buffer: a plain model's state leaves the factors as they are.
        present = {key: factor for key, factor in own.items() if factor is not None and key not in state_dict}
        super()._load_from_state_dict({**state_dict, **present}, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """The namesake's, and the factors' sizes and ranks."""
        shapes = ["keep" if f is None else f"{f.shape[0]}->{f.shape[1]}" for f in self.factors]
        bits = f", core_bits={self.lance_core_bits}" if self.lance_core_bits else ""
        state = f"factors=({', '.join(shapes)}){bits}" if self.is_calibrated else "not calibrated"
        return f"{super().extra_repr()}, {state}"


def _resized_batch_factor(factor: torch.Tensor, samples: int) -> torch.Tensor | None:
    copies = -(-samples // factor.shape[0])
    if copies == 0:
        return None
    blocks: torch.Tensor = torch.block_diag(*[factor] * copies)
    return blocks[:samples]
