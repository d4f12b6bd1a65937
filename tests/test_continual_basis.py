"""Protected bases: orthonormal whatever happens, in as few numbers as a subspace has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lance_kernels.continual.basis import Basis
from tests.ops.cases import orthonormal

CPU = torch.device("cpu")


def basis_of(groups: int, size: int, dtype: torch.dtype = torch.float32) -> Basis:
    return Basis(groups, size, dtype, CPU)


def add_random(basis: Basis, counts: list[int]) -> list[torch.Tensor]:
    """Protects random free directions; returns them."""
    coordinates = [
        orthonormal(basis.size - used, new) if new else torch.zeros(basis.size - used, 0, dtype=torch.float64)
        for used, new in zip(basis.counts, counts)
    ]
    directions = [basis.embedded(c, group) for group, c in enumerate(coordinates)]
    basis.add(coordinates)
    return directions


def assert_orthonormal(matrix: torch.Tensor, tolerance: float) -> None:
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    assert (matrix.mT @ matrix - eye).abs().max() <= tolerance if matrix.shape[1] else True


@given(data=st.data(), size=st.integers(1, 90), groups=st.integers(1, 3))
def test_products_are_those_of_the_dense_basis(data, size, groups):
    basis = basis_of(groups, size)
    for _ in range(data.draw(st.integers(1, 4))):
        add_random(basis, [data.draw(st.integers(0, size - used)) for used in basis.counts])
    rows = torch.randn(groups, 3, size, dtype=torch.float64)
    components, without = basis.components(rows), basis.without(rows)
    for group in range(groups):
        dense = basis.dense(group)
        assert dense.shape == (size, basis.counts[group])
        assert_orthonormal(dense, 1e-6)
        projector = dense @ dense.mT
        assert torch.allclose(without[group], rows[group] - rows[group] @ projector, atol=1e-5)
        assert torch.allclose(basis.expand(components)[group], rows[group] @ projector, atol=1e-5)
        assert torch.allclose(components[group, :, : dense.shape[1]], rows[group] @ dense, atol=1e-5)
        assert not components[group, :, dense.shape[1] :].any()


@given(data=st.data(), size=st.integers(2, 40))
def test_restricted_grams_are_those_of_the_free_directions(data, size):
    basis = basis_of(1, size)
    add_random(basis, [data.draw(st.integers(0, size - 1))])
    x = torch.randn(size, 2 * size, dtype=torch.float64)
    restricted = basis.restricted(x @ x.mT, 0)
    free = basis.embedded(torch.eye(basis.free, dtype=torch.float64), 0)
    assert_orthonormal(free, 1e-10)
    assert (free.mT @ basis.dense()).abs().max() <= 1e-10 if basis.used else True
    assert torch.allclose(restricted, free.mT @ x @ x.mT @ free, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("new", [1, 4])
def test_orthonormal_and_complete_after_fifty_tasks(new):
    basis = basis_of(2, 240)
    earlier = [[], []]
    for _ in range(50):
        for group, directions in enumerate(add_random(basis, [new, new + (new > 1) * -1])):
            earlier[group].append(directions)
    for group in range(2):
        dense = basis.dense(group)
        assert_orthonormal(dense, 1e-5)
        kept = torch.cat(earlier[group], dim=1)
        assert (kept - dense @ (dense.mT @ kept)).norm(dim=0).max() <= 1e-5


@pytest.mark.parametrize("used", [0, 1, 40, 64, 100, 127, 128])
def test_stores_as_many_numbers_as_a_subspace_has(used):
    basis = basis_of(1, 128)
    add_random(basis, [used])
    assert basis.packed.numel() == used * (128 - used)
    assert basis.stored_bytes == 4 * used * (128 - used) + 128
    assert basis.free == 128 - used
    assert basis.packed.abs().max() <= 2 if basis.packed.numel() else True


def test_directions_on_which_plain_elimination_fails_are_stored_small():
    # Wilkinson's matrix: elimination with row exchanges alone doubles a value in every column.
    size = 24
    lower = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    columns = torch.linalg.qr(torch.cat([lower, torch.ones(8, size, dtype=torch.float64)]))[0]
    basis = basis_of(1, size + 8)
    basis.add([columns])
    assert basis.packed.abs().max() <= 2
    dense = basis.dense()
    assert (columns - dense @ (dense.mT @ columns)).norm(dim=0).max() <= 1e-6


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_narrow_vectors_stay_orthonormal_and_turn_a_little(dtype, off):
    basis = basis_of(1, 200, dtype)
    directions = torch.cat([add_random(basis, [20])[0] for _ in range(3)], dim=1)
    dense = basis.dense()
    assert basis.packed.dtype == dtype
    assert basis.columns.dtype == torch.float32
    assert_orthonormal(dense, 1e-10)
    assert (directions - dense @ (dense.mT @ directions)).norm(dim=0).max() <= off


def test_a_full_basis_is_everything():
    basis = basis_of(2, 6)
    add_random(basis, [6, 4])
    assert (basis.used, basis.free) == (10, 2)
    add_random(basis, [0, 2])
    assert basis.free == 0
    rows = torch.randn(2, 3, 6, dtype=torch.float64)
    assert basis.without(rows).norm() <= 1e-12
    assert basis.packed.numel() == 0


def test_state_goes_back_and_forth_and_is_checked():
    basis, other = basis_of(2, 50), basis_of(2, 50)
    add_random(basis, [30, 10])
    other.load_state_dict(basis.state_dict())
    assert torch.equal(other.dense(1), basis.dense(1))
    with pytest.raises(ValueError, match="does not fit 2 groups of size 49"):
        basis_of(2, 49).check_state(basis.state_dict())
    with pytest.raises(ValueError, match="does not fit 1 groups"):
        basis_of(1, 50).check_state(basis.state_dict())
