"""Calibration within a limit of Gram bytes: groups of layers, several passes, the same factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lance_kernels as lance
from lance_kernels import _grams


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.up, self.down = (nn.Linear(*s) for s in ((24, 24), (24, 24), (24, 40), (40, 24)))

    def forward(self, x):
        h = torch.tanh(x)
        return x + self.down(torch.relu(self.up(self.query(h) + self.key(h))))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    lance.compress_(model, lance.LanceConfig(companions="none"))
    return model


class Loader:
    """Batches that can be iterated any number of times; counts the passes."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.fixture
def most_bytes(monkeypatch):
    """The largest sum of Gram bytes allocated within one pass."""
    sums = []
    before = _grams.Collector.__init__
    allocate = _grams.Grams.allocate

    def begin(self, *args):
        before(self, *args)
        sums.append(0)

    def counted(self, device):
        allocate(self, device)
        sums[-1] += sum(gram.numel() * gram.element_size() for gram in self.grams if gram is not None)

    monkeypatch.setattr(_grams.Collector, "__init__", begin)
    monkeypatch.setattr(_grams.Grams, "allocate", counted)
    return sums


@pytest.mark.parametrize(("limit", "passes"), [(None, 1), (2**31, 1), (20_000, 2), (9000, 4), (1, 9)])
def test_groups_give_the_same_factors(most_bytes, limit, passes):
    data = [torch.randn(6, 5, 24) for _ in range(3)]
    model, reference = network(), network()
    lance.calibrate(reference, data, progress=False, max_bytes=None)
    most_bytes.clear()
    loader = Loader(data)
    found = lance.calibrate(model, loader, progress=False, max_bytes=limit)
    assert loader.passes == passes
    largest = (5 * 5 + 40 * 40) * 4
    assert limit is None or max(most_bytes) <= max(limit, largest)
    assert found.shared == {f"{index}.key": f"{index}.query" for index in range(3)}
    assert found.batches == 3
    for name, layer in model.named_modules():
        if isinstance(layer, lance.nn.Linear):
            twin = reference.get_submodule(name)
            pairs = zip(layer.factors, twin.factors, strict=True)
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)


def test_data_that_comes_once_only():
    model = network()
    data = [torch.randn(6, 5, 24)]
    with pytest.raises(ValueError, match=r"exceed max_bytes, 9000, .* can be iterated once only"):
        lance.calibrate(model, iter(data), progress=False, max_bytes=9000)
    assert not model[0].query.is_calibrated
    lance.calibrate(model, iter(data), progress=False)
    assert model[0].query.is_calibrated


def test_refuses_no_room():
    with pytest.raises(ValueError, match="max_bytes is 0; expected at least 1, or None"):
        lance.calibrate(network(), [torch.randn(2, 5, 24)], max_bytes=0)
