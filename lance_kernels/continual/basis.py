"""Protected directions of a layer's input: an orthonormal basis a group, stored in as few numbers as a subspace has.

The span of `k` directions of length `n` is also that of a matrix with the unit matrix in `k` of its rows, the pivots,
and some `X`, `(n - k, k)`, in the others; `X` is what is stored, `k (n - k)` numbers. The orthonormal basis is
`M = [1; X] L^-T` with `L L^T = 1 + X^T X` (Cholesky), and that of the free directions `N = [-X^T; 1] R^-T` with
`R R^T = 1 + X X^T`: orthonormal whatever `X` is, so rounding it cannot take the basis away from orthonormal, only turn
it. Pivots are those of Gaussian elimination with row exchanges, improved until no value of `X` is above 2 (the volume
of the pivots' rows grows with each exchange; Goreinov et al., "How to find a good submatrix", 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

LARGEST = 2.0  # of the values of X


class Basis:
    """Protected directions, none at first.

    Args:
        groups: number of groups, each with directions of its own.
        size: length of a direction, `n`.
        dtype: of the stored numbers.
        device: of the stored numbers and of the basis made from them.

    Attributes:
        pivots: which rows hold the unit matrix, `(groups, n)`, boolean; as many as the group has directions.
        packed: `X` of all groups, one after the other, rows and columns in the order of `n`.
        columns: `M` in float32 (float64 where `packed` is), `(groups, n, width)`, made from the stored numbers; zero
            where a group has fewer directions than others.
    """

    def __init__(self, groups: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.groups, self.size = groups, size
        self.pivots = torch.zeros(groups, size, dtype=torch.bool, device=device)
        self.packed = torch.zeros(0, dtype=dtype, device=device)
        self._make_columns()

    @property
    def width(self) -> int:
        """The most directions of any group."""
        return max(self.counts)

    @property
    def used(self) -> int:
        """Protected directions of all groups."""
        return sum(self.counts)

    @property
    def free(self) -> int:
        """Free directions of all groups."""
        return self.groups * self.size - self.used

    @property
    def stored_bytes(self) -> int:
        """Bytes of what is stored."""
        return self.packed.nbytes + self.pivots.nbytes

    def components(self, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates of the rows' protected part.

        Args:
            rows: `(groups, count, n)`, float32 or float64.

        Returns:
            `rows M`, `(groups, count, width)`; zero where a group has fewer directions than others.
        """
        return rows @ self.columns.to(rows.device, rows.dtype)

    def expand(self, components: torch.Tensor) -> torch.Tensor:
        """The rows that have these coordinates and no free part, `(groups, count, n)`."""
        return components @ self.columns.to(components.device, components.dtype).mT

    def without(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows (I - M M^T)`: the rows' free part, `(groups, count, n)`."""
        columns = self.columns.to(rows.device, rows.dtype)
        return rows - (rows @ columns) @ columns.mT

    def restricted(self, gram: torch.Tensor, group: int) -> torch.Tensor:
        """A group's Gram matrix in its free coordinates, `N^T gram N`.

        Args:
            gram: `(n, n)`, float64.
            group: the group.

        Returns:
            `(n - k, n - k)` for `k` protected directions, symmetric.
        """
        free = self._free(group).to(gram.device)
        inner = free.mT @ gram @ free
        return (inner + inner.mT) / 2

    def embedded(self, coordinates: torch.Tensor, group: int) -> torch.Tensor:
        """The directions that have these free coordinates.

        Args:
            coordinates: `(n - k, count)`, float64.
            group: the group.

        Returns:
            `N coordinates`, `(n, count)`.
        """
        return self._free(group).to(coordinates.device) @ coordinates

    def dense(self, group: int = 0) -> torch.Tensor:
        """A group's protected directions as columns, `(n, k)`, float64."""
        rest, pivots = self._rest(group), self.pivots[group]
        count = rest.shape[1]
        columns = rest.new_zeros(self.size, count)
        columns[pivots] = torch.eye(count, dtype=rest.dtype, device=rest.device)
        columns[~pivots] = rest
        return _orthonormal(columns)

    def add(self, coordinates: Sequence[torch.Tensor]) -> None:
        """Protects further directions.

        Args:
            coordinates: by group, the directions' free coordinates, `(n - k, count)`, columns orthonormal, float64;
                `count` may be 0.
        """
        pivots, pieces = self.pivots.clone(), []
        for group, new in enumerate(coordinates):
            if not new.shape[1]:
                pieces.append(self._rest(group).flatten())
                continue
            columns = torch.cat([self.dense(group), self.embedded(new.to(self.packed.device), group)], dim=1)
            pivots[group], rest = _with_pivots(columns)
            pieces.append(rest.flatten())
        self.pivots, self.packed = pivots, torch.cat(pieces).to(self.packed.dtype)
        self._make_columns()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as two tensors."""
        return {"pivots": self.pivots, "packed": self.packed}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses what `state_dict` of another basis gave.

        Raises:
            ValueError: it does not fit these groups and this size.
        """
        pivots, packed = state["pivots"], state["packed"]
        fits = pivots.dtype == torch.bool and tuple(pivots.shape) == (self.groups, self.size)
        if not fits or tuple(packed.shape) != (sum(k * (self.size - k) for k in _counts(pivots)),):
            raise ValueError(
                f"basis with pivots {tuple(pivots.shape)}, packed {tuple(packed.shape)}, does not fit {self.groups} "
                f"groups of size {self.size}"
            )
        if not bool(packed.isfinite().all()):
            raise ValueError("basis holds NaN or infinity")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave and `check_state` found right."""
        self.pivots = state["pivots"].detach().to(self.pivots.device, copy=True)
        self.packed = state["packed"].detach().to(self.packed.device, self.packed.dtype, copy=True)
        self._make_columns()

    def _make_columns(self) -> None:
        self.counts = _counts(self.pivots)
        self._starts = [0, *accumulate(count * (self.size - count) for count in self.counts)]
        wide = self.packed.dtype == torch.float64
        dtype = torch.float64 if wide else torch.float32
        self.columns = self.packed.new_zeros(self.groups, self.size, self.width, dtype=dtype)
        for group, count in enumerate(self.counts):
            if count:
                self.columns[group, :, :count] = self.dense(group)

    def _rest(self, group: int) -> torch.Tensor:
        """A group's `X`, `(n - k, k)`, float64."""
        count = self.counts[group]
        return self.packed[self._starts[group] : self._starts[group + 1]].double().view(self.size - count, count)

    def _free(self, group: int) -> torch.Tensor:
        """A group's free directions as columns, `(n, n - k)`, float64."""
        rest, pivots = self._rest(group), self.pivots[group]
        count = rest.shape[0]
        columns = rest.new_zeros(self.size, count)
        columns[pivots] = -rest.mT
        columns[~pivots] = torch.eye(count, dtype=rest.dtype, device=rest.device)
        return _orthonormal(columns)


def _counts(pivots: torch.Tensor) -> list[int]:
    counts: list[int] = pivots.sum(1).tolist()
    return counts


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns of the same span, for columns that hold a unit matrix."""
    lower = torch.linalg.cholesky(columns.mT @ columns)
    solved: torch.Tensor = torch.linalg.solve_triangular(lower.mT, columns, upper=True, left=False)
    return solved


def _with_pivots(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pivots and `X` of the span of some columns.

    Args:
        columns: `(n, k)`, orthonormal, float64.

    Returns:
        Pivots, `(n,)`, boolean, and `X`, `(n - k, k)`.
    """
    size, count = columns.shape
    exchanges, lower, _ = torch.lu_unpack(*torch.linalg.lu_factor(columns))
    order = exchanges.argmax(0)  # row of `columns` at each place of `lower`
    rest = torch.linalg.solve_triangular(lower[:count], lower[count:], upper=False, left=False, unitriangular=True)
    while rest.numel():
        place = int(rest.abs().argmax())
        row, column = divmod(place, count)
        if abs(pivot := float(rest[row, column])) <= LARGEST:
            break
        # The row and the pivot exchange places.
        scaled = -rest[row] / pivot
        scaled[column] = 1 / pivot
        change = scaled.clone()
        change[column] -= 1
        rest += torch.outer(rest[:, column], change)
        rest[row] = scaled
        order[count + row], order[column] = order[column].clone(), order[count + row].clone()
    pivots = torch.zeros(size, dtype=torch.bool, device=columns.device)
    pivots[order[:count]] = True
    return pivots, rest[order[count:].argsort()][:, order[:count].argsort()]
