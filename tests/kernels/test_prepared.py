"""What is kept of factors: made once, again when these change, and there for the CUDA graphs that read it."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lance_kernels.ops import _prepared


@pytest.fixture(autouse=True)
def _nothing_prepared(monkeypatch):
    monkeypatch.setattr(_prepared, "_PREPARED", {})


@pytest.fixture
def capture(monkeypatch):
    """Says whether a CUDA graph is being captured."""
    return lambda yes: monkeypatch.setattr(_prepared, "_capturing", lambda _: yes)


def doubled(factor, form=("doubled",)):
    return _prepared.prepared([factor], form, lambda: 2 * factor)


def test_is_made_once_and_again_when_the_factor_changes():
    factor = torch.ones(3)
    first = doubled(factor)
    assert doubled(factor) is first
    assert doubled(factor, ("other",)) is not first
    factor.mul_(3)
    assert torch.equal(doubled(factor), torch.full((3,), 6.0))
    factor.data = torch.full((3,), 5.0)
    assert torch.equal(doubled(factor), torch.full((3,), 10.0))
    assert len(_prepared._PREPARED) == 2
    del factor
    assert not _prepared._PREPARED


def test_inference_tensors_are_not_kept():
    with torch.inference_mode():
        factor = torch.ones(3)
    assert doubled(factor) is not doubled(factor)
    assert not _prepared._PREPARED


def test_a_graph_reads_what_was_made_before_and_keeps_it_alive(capture):
    factor = torch.ones(3)
    before = doubled(factor)
    capture(True)
    assert doubled(factor) is before
    assert doubled(factor) is before
    capture(False)
    alive = weakref.ref(before)
    factor.mul_(3)
    assert torch.equal(doubled(factor), torch.full((3,), 6.0))
    del before
    assert torch.equal(alive(), torch.full((3,), 2.0))
    del factor
    assert alive() is None


def test_what_a_capture_makes_is_not_kept(capture):
    factor = torch.ones(3)
    capture(True)
    assert doubled(factor) is not doubled(factor)
    assert not _prepared._PREPARED
    capture(False)
    stale = doubled(factor)
    factor.mul_(3)
    capture(True)
    assert torch.equal(doubled(factor), torch.full((3,), 6.0))
    capture(False)
    assert doubled(factor) is not stale


def test_what_stands_for_a_tensor_is_not_kept():
    with FakeTensorMode() as mode:
        doubled(mode.from_tensor(torch.ones(3)))
        doubled(torch.ones(3))
    assert not _prepared._PREPARED
