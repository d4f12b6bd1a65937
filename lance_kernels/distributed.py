"""The processes that calibrate together: sums, exchanges, and failures that reach every rank instead of hanging it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The ranks of a process group, or this process alone where `torch.distributed` is not initialized.

    Args:
        group: the process group; None for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.together = dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
        self.count = dist.get_world_size(group) if self.together else 1
        self.rank = dist.get_rank(group) if self.together else 0

    def exchange(self, value: Any, error: Exception | None = None) -> list[Any]:
        """Every rank's value, by rank; also how a rank's failure reaches the others.

        Args:
            value: what this rank tells the others; anything that pickles.
            error: what went wrong on this rank since the last exchange.

        Raises:
            Exception: `error`, on the rank that has it.
            RuntimeError: another rank failed; the message names it.
        """
        if not self.together:
            if error is not None:
                raise error
            return [value]
        mine = (None, value) if error is None else (f"{type(error).__name__}: {error}", None)
        everyone: list[Any] = [None] * self.count
        dist.all_gather_object(everyone, mine, group=self.group)
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(everyone):
            if message is not None:
                raise RuntimeError(f"calibrate: rank {rank} failed, so no rank calibrates: {message}")
        return [entry for _, entry in everyone]

    def sum_(self, tensor: torch.Tensor) -> None:
        """Adds up a tensor over the ranks, in place."""
        if self.together:
            dist.all_reduce(tensor, group=self.group)

    def broadcast_(self, tensor: torch.Tensor, rank: int) -> None:
        """Overwrites a tensor by that of one rank of the group."""
        if self.together:
            source = rank if self.group is None else dist.get_global_rank(self.group, rank)
            dist.broadcast(tensor, source, group=self.group)
