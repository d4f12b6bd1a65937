"""What a learner says of itself: free directions, bytes, and what happens to every part of the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from lance_kernels.convert import Summary


@dataclass(frozen=True)
class Capacity:
    """How much of one layer's input is taken.

    Attributes:
        size: directions in all, of all groups.
        used: directions that are protected.
        free: directions that later tasks may use.
        next_rank: directions that the present task trains, or a next one like the last would; at most `free`.
        full: nothing is free: the weight is frozen.
    """

    size: int
    used: int
    free: int
    next_rank: int
    full: bool


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that tasks leave behind in one layer.

    Attributes:
        basis: stored protected directions.
        product: the weight's value on them.
        working: what is made from both and held while training: an orthonormal basis, and random combinations by which
            a change of that value is noticed.
    """

    basis: int
    product: int
    working: int

    @property
    def stored(self) -> int:
        """What has to be kept from task to task, and is saved."""
        return self.basis + self.product

    @property
    def total(self) -> int:
        """All of them."""
        return self.stored + self.working


@dataclass(frozen=True)
class Memory:
    """Bytes that tasks leave behind.

    Attributes:
        layers: by layer name.
    """

    layers: dict[str, LayerMemory]

    @property
    def stored(self) -> int:
        """What has to be kept from task to task, and is saved, of all layers."""
        return sum(layer.stored for layer in self.layers.values())

    @property
    def working(self) -> int:
        """What is made from it and held while training, of all layers."""
        return sum(layer.working for layer in self.layers.values())

    @property
    def total(self) -> int:
        """Everything."""
        return self.stored + self.working


@dataclass
class LearnerSummary:
    """What a learner protects, and what happens to the rest.

    Attributes:
        tasks: tasks that have ended.
        capacity: by protected layer.
        policy: by kind of parameter, and for running statistics.
        compression: what `compress_` did.
    """

    tasks: int
    capacity: dict[str, Capacity]
    policy: dict[str, str]
    compression: Summary = field(default_factory=Summary)

    def __str__(self) -> str:
        lines = [f"{self.tasks} tasks ended, {len(self.capacity)} layers protected"]
        for name, layer in self.capacity.items():
            state = "full, frozen" if layer.full else f"next task: {layer.next_rank}"
            lines.append(f"  {name or '(root)'}: {layer.used} of {layer.size} directions used, {state}")
        lines += [f"  {kind}: {what}" for kind, what in self.policy.items()]
        lines += [f"  {name or '(root)'}: not protected, {reason}" for name, reason in self.compression.left.items()]
        return "\n".join(lines)
