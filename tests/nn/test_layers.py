"""The drop-in layers against their `torch.nn` namesakes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lance_kernels as lance
from tests.ops.cases import approximation, assert_near

CONVOLUTIONS = {1: (nn.Conv1d, lance.nn.Conv1d), 2: (nn.Conv2d, lance.nn.Conv2d), 3: (nn.Conv3d, lance.nn.Conv3d)}


def full_rank(layer, x):
    """The layer with square orthonormal factors: its weight gradient is the plain one."""
    layer.set_factors([None, *(torch.linalg.qr(torch.randn(size, size, dtype=x.dtype))[0] for size in x.shape[1:])])
    return layer


def as_compressed(plain, **config):
    model = nn.Sequential(copy.deepcopy(plain))
    lance.compress_(model, lance.LanceConfig(**{"core_bits": None, "companions": "none", **config}))
    return model[0]


def gradients(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape, dtype=y.dtype))
    result = [x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
    layer.zero_grad()
    return y.detach(), result


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "numbers",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 4, "padding": "same", "dilation": 3},
        {"kernel_size": 3, "padding": "valid", "stride": 2},
        {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 1, "stride": 3, "bias": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolutions_are_the_plain_ones_at_full_rank(dimensions, mode, numbers):
    plain_type, layer_type = CONVOLUTIONS[dimensions]
    plain = plain_type(4, 8, padding_mode=mode, **numbers).double()
    x = torch.randn(3, 4, *range(8, 8 + dimensions), dtype=torch.float64)
    y, expected = gradients(plain, x)
    layer = as_compressed(plain)
    assert type(layer) is layer_type
    actual_y, actual = gradients(full_rank(layer, x), x)
    assert torch.equal(actual_y, y)
    for mine, theirs in zip(actual, expected):
        assert_near(mine, theirs, factor=100)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise(multiplier):
    plain = nn.Conv2d(5, 5 * multiplier, 3, padding=1, groups=5).double()
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    _, expected = gradients(plain, x)
    _, actual = gradients(full_rank(as_compressed(plain), x), x)
    for mine, theirs in zip(actual, expected):
        assert_near(mine, theirs, factor=100)


def test_unbatched_convolution():
    plain = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(3, 6, 7, dtype=torch.float64)
    y, expected = gradients(plain, x)
    actual_y, actual = gradients(full_rank(as_compressed(plain), x.unsqueeze(0)), x)
    assert torch.equal(actual_y, y)
    for mine, theirs in zip(actual, expected):
        assert_near(mine, theirs, factor=100)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (2, 3, 2, 6)])
def test_linear_of_any_number_of_modes(shape):
    plain = nn.Linear(6, 5).double()
    x = torch.randn(shape, dtype=torch.float64)
    y, expected = gradients(plain, x)
    layer = as_compressed(plain)
    layer.set_factors([*[None] * (len(shape) - 1), torch.linalg.qr(torch.randn(6, 6).double())[0]])
    actual_y, actual = gradients(layer, x)
    assert torch.equal(actual_y, y)
    for mine, theirs in zip(actual, expected):
        assert_near(mine, theirs, factor=100)
    other = torch.randn(3, 2, 2, 2, 6, dtype=torch.float64)
    assert torch.equal(layer(other), plain(other))


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(3, 4, 3)])
def test_uncalibrated_is_plain_to_the_bit(layer):
    x = torch.randn((4, 6) if isinstance(layer, nn.Linear) else (2, 3, 8, 8))
    y, expected = gradients(layer, x)
    actual_y, actual = gradients(as_compressed(layer), x)
    assert torch.equal(actual_y, y)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(actual, expected))


def saved_by(layer, x):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    return kept


def test_decides_at_call_time_what_to_keep():
    layer = full_rank(as_compressed(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert x.data_ptr() not in {tensor.data_ptr() for tensor in saved_by(layer, x)}
    with torch.no_grad():
        assert saved_by(layer, x) == []
    with lance.exact(nn.Sequential(layer)):
        assert x.data_ptr() in {tensor.data_ptr() for tensor in saved_by(layer, x)}
    assert not layer.lance_exact


@pytest.mark.parametrize("size", [(2, 3, 8, 8), (5, 3, 8, 8), (2, 3, 8, 6), (2, 3, 5, 5)])
def test_other_sizes_keep_their_modes_and_stay_right(size):
    plain = nn.Conv2d(3, 4, 3, padding=1).double()
    layer = as_compressed(plain)
    factors = [
        None,
        *(torch.linalg.qr(torch.randn(n, n).double())[0][:, :rank] for n, rank in ((3, 2), (8, 3), (8, 4))),
    ]
    layer.set_factors(factors)
    x = torch.randn(size, dtype=torch.float64)
    fitting = [f if f is not None and f.shape[0] == extent else None for f, extent in zip(factors, size)]
    _, expected = gradients(plain, approximation(x, fitting))
    _, actual = gradients(layer, x)
    assert_near(actual[1], expected[1], factor=100)


@pytest.mark.parametrize("batch", [1, 3, 4, 5, 8, 11])
def test_fixed_batch_takes_any_batch_size(batch):
    plain = nn.Linear(6, 5).double()
    layer = as_compressed(plain, batch_mode="fixed")
    factor = torch.linalg.qr(torch.randn(4, 4).double())[0]
    layer.set_factors([factor, None])
    x = torch.randn(batch, 6, dtype=torch.float64)
    _, expected = gradients(plain, x)
    _, actual = gradients(layer, x)
    # A full-rank batch factor loses nothing for whole batches; leading rows of it lose something for the rest.
    whole = batch // 4 * 4
    rows = torch.block_diag(*[factor] * 3)[:batch]
    x_hat = rows @ (rows.mT @ x)
    assert_near(x_hat[:whole], x[:whole], factor=100)
    _, approximate = gradients(plain, x_hat)
    assert_near(actual[1], approximate[1], factor=100)
    assert_near(actual[2], expected[2], factor=100)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 4, 3)])
def test_state_moves_between_plain_calibrated_and_uncalibrated(layer):
    x = torch.randn((4, 6) if isinstance(layer, nn.Linear) else (2, 6, 8, 8))
    calibrated = full_rank(as_compressed(layer), x)
    state = calibrated.state_dict()
    assert [key for key in state if "lance_factor" in key]
    fresh = as_compressed(layer)
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.factors[1:], calibrated.factors[1:]))
    calibrated.load_state_dict(layer.state_dict())
    assert calibrated.is_calibrated
    as_compressed(layer).load_state_dict(layer.state_dict())


def test_copies_pickles_and_moves():
    x = torch.randn(2, 3, 8, 8)
    layer = full_rank(as_compressed(nn.Conv2d(3, 4, 3)), x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
    expected = gradients(layer, x)[1]
    for other in copies:
        assert other.lance_config == layer.lance_config
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, x)[1], expected))
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.factors[1].dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(layer).to("meta").factors[1].device.type == "meta"


def test_can_be_built_directly():
    layer = lance.nn.Conv2d(3, 4, 3, padding=1, config=lance.LanceConfig(core_bits=None))
    assert not layer.is_calibrated
    assert "not calibrated" in repr(layer)
    full_rank(layer, torch.zeros(1, 3, 8, 8))
    assert "factors=(keep, 3->3, 8->8, 8->8)" in repr(layer)


def test_nested_tensors_train_as_in_the_plain_layer():
    layer = nn.Linear(8, 3)
    lance.compress_(layer)
    lance.calibrate(layer, [torch.randn(50, 3) @ torch.randn(3, 8)], progress=False)
    rows = [torch.randn(3, 8), torch.randn(5, 8)]
    layer(torch.nested.nested_tensor(rows, layout=torch.jagged)).values().sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.cat(rows).sum(0).expand(3, 8))
