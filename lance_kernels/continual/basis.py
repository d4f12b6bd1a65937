"""Protected directions of a layer's input: an orthonormal basis a group, stored as packed Householder vectors.

`Q = H_1 ... H_r` with `H_j = I - 2 v_j v_j^T / |v_j|^2`, `v_j` zero above entry `j` and one there (LAPACK's `geqrf`),
is orthogonal whatever the vectors are, so rounding them cannot take the basis away from orthonormal. Some of its
columns are protected, the others are free: the first `k` columns, or, where the free ones are fewer, all but the first
`n - k`. The scale `2 / |v_j|^2` follows from the vector, so `r` vectors take `n r - r (r + 1) / 2` numbers. Blocks of
vectors are applied together in the compact form of Schreiber and Van Loan (SIAM J. Sci. Stat. Comput. 1989),
`I - V T V^T`, where the inverse of `T` is the upper triangle of `V^T V` with half its diagonal (Puglisi, SIAM J. Sci.
Stat. Comput. 1992).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

BLOCK = 64  # vectors applied together


class Basis:
    """Protected directions, none at first.

    Args:
        groups: number of groups, each with directions of its own.
        size: length of a direction, `n`.
        dtype: of the stored vectors.
        device: of the stored vectors.

    Attributes:
        counts: protected directions, by group.
        complement: whether the free columns of `Q` come first.
        packed: the vectors, `(groups, numbers)`: block by block the strictly lower triangle of the block's first rows,
            then the rows below.
    """

    def __init__(self, groups: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.groups, self.size = groups, size
        self.counts = [0] * groups
        self.complement = False
        self.vectors = 0
        self.packed = torch.zeros(groups, 0, dtype=dtype, device=device)

    @property
    def width(self) -> int:
        """Columns that `components` has: the most directions of any group."""
        return max(self.counts)

    @property
    def used(self) -> int:
        """Protected directions of all groups."""
        return sum(self.counts)

    @property
    def free(self) -> int:
        """Free directions of all groups."""
        return self.groups * self.size - self.used

    def components(self, rows: torch.Tensor) -> torch.Tensor:
        """Coordinates of the rows' protected part.

        Args:
            rows: `(groups, count, n)`, float32 or float64.

        Returns:
            `rows M`, `(groups, count, width)`; zero where a group has fewer directions than others.
        """
        return self._rotated(rows)[..., self._columns()] * self._mask(rows)

    def expand(self, components: torch.Tensor) -> torch.Tensor:
        """The rows that have these coordinates and no free part, `(groups, count, n)`."""
        rows = components.new_zeros(*components.shape[:-1], self.size)
        rows[..., self._columns()] = components * self._mask(components)
        return self._rotated_back(rows)

    def without(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows (I - M M^T)`: the rows' free part, `(groups, count, n)`."""
        turned = self._rotated(rows)
        turned[..., self._columns()] *= 1 - self._mask(rows)
        return self._rotated_back(turned)

    def restricted(self, gram: torch.Tensor, group: int) -> torch.Tensor:
        """A group's Gram matrix in its free coordinates, `N^T gram N`.

        Args:
            gram: `(n, n)`, float64.
            group: the group.

        Returns:
            `(n - k, n - k)` for `k` protected directions, symmetric.
        """
        half = self._rotated(gram.unsqueeze(0), group)
        whole = self._rotated(half.mT, group)[0]
        free = self._free_columns(group)
        return (whole + whole.mT)[free, free] / 2

    def embedded(self, coordinates: torch.Tensor, group: int) -> torch.Tensor:
        """The directions that have these free coordinates.

        Args:
            coordinates: `(n - k, count)`, float64.
            group: the group.

        Returns:
            `N coordinates`, `(n, count)`.
        """
        rows = coordinates.new_zeros(1, coordinates.shape[1], self.size)
        rows[0, :, self._free_columns(group)] = coordinates.mT
        return self._rotated_back(rows, group)[0].mT

    def dense(self, group: int = 0) -> torch.Tensor:
        """A group's protected directions as columns, `(n, k)`, float64."""
        eye = torch.eye(self.size, dtype=torch.float64, device=self.packed.device)
        columns = self._rotated(eye.unsqueeze(0), group)[0]
        count = self.counts[group]
        return columns[:, self.size - count :] if self.complement else columns[:, :count]

    def add(self, coordinates: Sequence[torch.Tensor]) -> None:
        """Protects further directions.

        Args:
            coordinates: by group, the directions' free coordinates, `(n - k, count)`, columns orthonormal, float64;
                `count` may be 0.
        """
        counts = [count + new.shape[1] for count, new in zip(self.counts, coordinates)]
        # Vectors of the form with fewer of them.
        complement = self.size - min(counts) < max(counts)
        vectors = self._unpacked(torch.float64)
        if not complement and not self.complement:
            found = []
            for group, (before, new) in enumerate(zip(self.counts, coordinates)):
                # Where a group has fewer vectors than others, reflections without any turned these signs.
                signs = torch.ones_like(new[:, :1])
                signs[: self.vectors - before] = -1
                found.append(torch.cat([vectors[group, :, :before], _below(before, signs * new)], dim=1))
        else:
            found = []
            for group, new in enumerate(coordinates):
                rest = torch.linalg.qr(new, mode="complete")[0][:, new.shape[1] :]
                basis = self.embedded(rest, group)
                if not complement:
                    basis = torch.linalg.qr(basis, mode="complete")[0][:, basis.shape[1] :]
                found.append(_below(0, basis))
        self.counts, self.complement = counts, complement
        self.vectors = max(matrix.shape[1] for matrix in found)
        stacked = vectors.new_zeros(self.groups, self.size, self.vectors)
        for group, matrix in enumerate(found):
            stacked[group, :, : matrix.shape[1]] = matrix
        self._pack(stacked)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and one tensor."""
        return {"counts": list(self.counts), "complement": self.complement, "packed": self.packed}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuses what `state_dict` of another basis gave.

        Raises:
            ValueError: it does not fit these groups and this size.
        """
        counts, packed = state["counts"], state["packed"]
        fits = len(counts) == self.groups and all(0 <= count <= self.size for count in counts)
        if not fits or tuple(packed.shape) != (self.groups, self._numbers(counts, state["complement"])):
            raise ValueError(
                f"basis of {counts} directions, packed {tuple(packed.shape)}, does not fit {self.groups} groups of "
                f"size {self.size}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave and `check_state` found right."""
        self.counts, self.complement = list(state["counts"]), bool(state["complement"])
        self.vectors = self.size - min(self.counts) if self.complement else self.width
        self.packed = state["packed"].detach().to(self.packed.device, self.packed.dtype, copy=True)

    def _numbers(self, counts: Sequence[int], complement: bool) -> int:
        """Numbers a group that the packed vectors of so many directions take."""
        vectors = self.size - min(counts) if complement else max(counts)
        return sum(_block_numbers(self.size, start, width) for start, width in _blocks(vectors))

    def _columns(self) -> slice:
        return slice(self.size - self.width, self.size) if self.complement else slice(0, self.width)

    def _free_columns(self, group: int) -> slice:
        count = self.counts[group]
        return slice(0, self.size - count) if self.complement else slice(count, self.size)

    def _mask(self, like: torch.Tensor) -> torch.Tensor:
        """`(groups, 1, width)`: one where a column of `_columns` is one of the group's."""
        counts = torch.tensor(self.counts, device=like.device).view(-1, 1, 1)
        columns = torch.arange(self.width, device=like.device)
        mine = columns >= self.width - counts if self.complement else columns < counts
        return mine.to(like.dtype)

    def _rotated(self, rows: torch.Tensor, group: int | None = None) -> torch.Tensor:
        """`rows Q`, a copy; of one group where it is given."""
        turned = rows.clone()
        for start, vectors in self._block_vectors(rows, group):
            _reflect(turned[..., start:], vectors, transpose=False)
        return turned

    def _rotated_back(self, rows: torch.Tensor, group: int | None = None) -> torch.Tensor:
        """`rows Q^T`, in place."""
        for start, vectors in reversed(list(self._block_vectors(rows, group))):
            _reflect(rows[..., start:], vectors, transpose=True)
        return rows

    def _block_vectors(self, like: torch.Tensor, group: int | None) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and vectors, `(groups, n - start, width)`, of every block."""
        packed = self.packed if group is None else self.packed[group : group + 1]
        packed = packed.to(like.device)
        offset = 0
        for start, width in _blocks(self.vectors):
            numbers = _block_numbers(self.size, start, width)
            block = packed[:, offset : offset + numbers].to(like.dtype)
            offset += numbers
            triangle = width * (width - 1) // 2
            top = torch.eye(width, dtype=like.dtype, device=like.device).repeat(len(packed), 1, 1)
            row, column = torch.tril_indices(width, width, -1, device=like.device)
            top[:, row, column] = block[:, :triangle]
            yield start, torch.cat([top, block[:, triangle:].unflatten(1, (-1, width))], dim=1)

    def _unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        """The vectors below the diagonal, `(groups, n, vectors)`."""
        vectors = self.packed.new_zeros(self.groups, self.size, self.vectors, dtype=dtype)
        for start, block in self._block_vectors(vectors, None):
            vectors[:, start:, start : start + block.shape[2]] = block
        return vectors.tril(-1)

    def _pack(self, vectors: torch.Tensor) -> None:
        pieces = [vectors.new_zeros(self.groups, 0)]
        for start, width in _blocks(self.vectors):
            row, column = torch.tril_indices(width, width, -1, device=vectors.device)
            block = vectors[:, start:, start : start + width]
            pieces += [block[:, row, column], block[:, width:].flatten(1)]
        self.packed = torch.cat(pieces, dim=1).to(self.packed.device, self.packed.dtype)


def _blocks(vectors: int) -> list[tuple[int, int]]:
    """First vector and number of vectors of every block."""
    return [(start, min(BLOCK, vectors - start)) for start in range(0, vectors, BLOCK)]


def _block_numbers(size: int, start: int, width: int) -> int:
    return width * (width - 1) // 2 + (size - start - width) * width


def _below(start: int, columns: torch.Tensor) -> torch.Tensor:
    """The Householder vectors that turn `columns` into the unit vectors from `start` on, below their ones.

    Args:
        start: rows above, in which the vectors are zero.
        columns: `(size - start, count)`, float64.

    Returns:
        `(size, count)`; the ones are left out.
    """
    factored, _ = torch.geqrf(columns)
    below = factored.tril(-1)
    return torch.cat([below.new_zeros(start, below.shape[1]), below])


def _reflect(rows: torch.Tensor, vectors: torch.Tensor, transpose: bool) -> None:
    """Applies a block of reflections from the right, in place.

    Args:
        rows: `(groups, count, size)`.
        vectors: `(groups, size, width)`.
        transpose: apply the product's transpose.
    """
    overlaps = vectors.mT @ vectors
    upper = overlaps.triu(1) + torch.diag_embed(overlaps.diagonal(dim1=-2, dim2=-1) / 2)
    shared = rows @ vectors
    if transpose:
        solved = torch.linalg.solve_triangular(upper.mT, shared, upper=False, left=False)
    else:
        solved = torch.linalg.solve_triangular(upper, shared, upper=True, left=False)
    rows -= solved @ vectors.mT
