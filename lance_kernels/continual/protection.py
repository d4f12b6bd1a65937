"""One layer's protected weight: what it must stay on the protected directions, and how it is brought back there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lance_kernels.continual.basis import Basis
from lance_kernels.nn._compressed import CompressedLayer
from lance_kernels.ops._checks import accumulation_dtype
from lance_kernels.ops._registry import without_autocast

PROBES = 8
# A weight is brought back when its protected part has moved by this many roundings of its own.
ROUNDINGS = 2.0
# A weight that moved this many times as far does so at every step, and is brought back in its own precision.
FAR = 16.0


class Protection:
    """The directions a layer's weight must not change along, and its value on them.

    The weight is read as `(groups, O / groups, n)`. With `M` the protected directions and `C = W M` remembered,
    `W - (W M - C) M^T` is the nearest weight that agrees with `C`. How far a weight is from it is estimated by fixed
    random combinations `z` of the directions, `W (M z) - C z`: 8 of them miss a change of five times the threshold once
    in 10^5 times at worst, that of a change along one direction. Up to 8 directions are looked at one by one.

    Args:
        layer: the layer.
        dtype: of the stored basis.
        device: of the stored basis and remembered product; None for the weight's.
    """

    def __init__(self, layer: CompressedLayer, dtype: torch.dtype, device: torch.device | None) -> None:
        self.layer = layer
        self.groups = int(getattr(layer, "groups", 1))
        self.size = layer.weight[0].numel()
        self.basis = Basis(self.groups, self.size, dtype, device or layer.weight.device)
        self.product: torch.Tensor | None = None  # C, (groups, O / groups, width)
        self.probes: torch.Tensor | None = None  # M z, (groups, n, probes), float64
        self.targets: torch.Tensor | None = None  # C z, (groups, O / groups, probes), float64
        self.seed = 0

    @property
    def full(self) -> bool:
        """Whether no direction is free."""
        return self.basis.free == 0

    @property
    def guards(self) -> bool:
        """Whether there is something to bring the weight back to."""
        return self.product is not None and self.layer.weight.requires_grad

    def protect(self, coordinates: Sequence[torch.Tensor], seed: int) -> None:
        """Protects further directions, along which the weight's present value is the one to keep.

        Along those before it stays what it was: taken from the weight again, it would drift by a rounding a task.

        Args:
            coordinates: of the directions, as `Basis.add` takes them.
            seed: of the random combinations that tell whether the weight moved.
        """
        weight = self._weight(torch.float64)
        if self.product is not None:
            weight = weight - self.basis.expand(self.basis.components(weight) - self.product.to(weight))
        self.basis.add(coordinates)
        self.seed = seed
        if self.basis.width and not self.full:
            self.remember(weight)
        else:
            self.product = self.probes = self.targets = None

    def remember(self, weight: torch.Tensor | None = None) -> None:
        """Takes a weight's value along the protected directions for the one to keep.

        Args:
            weight: `(groups, O / groups, n)`, float64; None for the layer's present one.
        """
        product = self.basis.components(self._weight(torch.float64) if weight is None else weight)
        self.product = product.to(self.basis.packed.device, accumulation_dtype(self.layer.weight.dtype))
        self.make_probes()

    def make_probes(self) -> None:
        """Combinations of directions and of the remembered product, from these and the seed; on the weight's device."""
        self.probes = self.targets = None
        if self.product is None:
            return
        width = self.basis.width
        count = min(width, PROBES)
        generator = torch.Generator().manual_seed(self.seed)
        combinations = torch.randn(self.groups, width, count, dtype=torch.float64, generator=generator) / count**0.5
        if count == width:
            combinations = torch.eye(width, dtype=torch.float64).repeat(self.groups, 1, 1)
        combinations = combinations.to(self.product.device)
        device = self.layer.weight.device
        self.probes = (self.basis.columns.double() @ combinations).to(device)
        self.targets = (self.product.double() @ combinations).to(device)

    def moved(self) -> torch.Tensor:
        """How far the weight's protected part is from what it must be, over its norm and the threshold; 0-dim."""
        assert self.probes is not None
        assert self.targets is not None
        # In float32, these sums round by more than the threshold.
        weight = self._weight(torch.float64)
        away: torch.Tensor = (weight @ self.probes - self.targets).norm()
        eps = max(torch.finfo(dtype).eps for dtype in (self.layer.weight.dtype, self.basis.columns.dtype))
        return away.div(ROUNDINGS * eps * weight.norm().clamp_min(torch.finfo(torch.float64).tiny))

    @property
    def tolerance(self) -> float:
        """How far `moved` may be by roundings alone: averages over thousands of weights add up to some."""
        narrow = torch.finfo(self.layer.weight.dtype).eps > torch.finfo(torch.float32).eps
        return ROUNDINGS if narrow else FAR

    def restore_(self, distance: float) -> None:
        """Brings the weight back.

        Args:
            distance: how far it has moved, as `moved` gives it.
        """
        assert self.product is not None
        # Products in float32 round by more than the threshold: a weight that stays would be brought back every step.
        precise = distance < FAR or _rounds_products(self.layer.weight.device)
        weight = self._weight(torch.float64 if precise else None)
        with without_autocast():
            away = self.basis.components(weight) - self.product.to(weight.device)
            weight = weight - self.basis.expand(away)
        self.layer.weight.detach().copy_(weight.view_as(self.layer.weight))

    def project(self, grad: torch.Tensor) -> torch.Tensor:
        """The part of a weight's gradient along free directions."""
        if not self.basis.width:
            return grad
        rows = grad.reshape(self.groups, -1, self.size).to(accumulation_dtype(grad.dtype))
        with without_autocast():
            return self.basis.without(rows).reshape(grad.shape).to(grad.dtype)

    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of the stored directions and of the remembered product."""
        return self.basis.stored_bytes, 0 if self.product is None else self.product.nbytes

    def working_bytes(self) -> int:
        """Bytes of what is made from these and held while training: orthonormal columns and probes."""
        made = (self.basis.columns, self.probes, self.targets)
        return sum(tensor.nbytes for tensor in made if tensor is not None)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and tensors."""
        return {**self.basis.state_dict(), "product": self.product, "seed": self.seed}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses what `state_dict` of another layer's gave.

        Raises:
            ValueError: it does not fit the layer.
        """
        self.basis.check_state(state)
        product = state["product"]
        shape = (self.groups, self.layer.weight.shape[0] // self.groups, int(state["pivots"].sum(1).max()))
        if product is not None and tuple(product.shape) != shape:
            raise ValueError(f"product has shape {tuple(product.shape)}; expected {shape}")
        if product is not None and not bool(product.isfinite().all()):
            raise ValueError("product holds NaN or infinity")
        if not isinstance(state["seed"], int):
            raise ValueError(f"seed is {state['seed']!r}; expected an integer")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave and `check_state` found right."""
        self.basis.load_state_dict(state)
        product, self.seed = state["product"], int(state["seed"])
        self.product = None if product is None else product.detach().to(self.basis.packed.device, copy=True)
        self.make_probes()

    def _weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = self.layer.weight.detach().reshape(self.groups, -1, self.size)
        return weight.to(dtype or accumulation_dtype(weight.dtype))


def _rounds_products(device: torch.device) -> bool:
    """Whether PyTorch is set to make float32 products on a device in fewer bits (TF32, bfloat16)."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("ieee", "none")
