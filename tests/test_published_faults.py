"""Every fault known of the published implementation, each with a test that it is not ours (design page, section 2)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lance_kernels as lance
from tests.ops.cases import assert_near


def layer_of(plain, factors=(), **config):
    model = nn.Sequential(copy.deepcopy(plain))
    lance.compress_(model, lance.LanceConfig(**{"core_bits": None, "companions": "none", **config}))
    model[0].set_factors(factors)
    return model[0]


def square_factors(size):
    return [None, *(torch.linalg.qr(torch.randn(extent, extent).double())[0] for extent in size[1:])]


def weight_gradients(plain, layer, x):
    result = []
    for module in (layer, plain):
        module.zero_grad()
        module(x).square().sum().backward()
        result.append(module.weight.grad.clone())
    return result


def test_the_first_calibration_batch_weighs_no_more_than_any_other():
    first, rest = torch.zeros(4, 8), torch.zeros(4, 8)
    first[:, 0], rest[:, 1] = 1.0, 1.0
    model = nn.Sequential(nn.Linear(8, 3))
    lance.compress_(model, lance.LanceConfig(core_bits=None))
    found = lance.calibrate(model, [first, *[rest] * 9], progress=False)
    values = found.layers["0"].eigenvalues[1]
    assert_near(values[:2] / values.sum(), torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_convolutions_get_a_weight_gradient(groups):
    plain = nn.Conv2d(6, 6 * groups, 3, groups=groups).double()
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    assert_near(*weight_gradients(plain, layer_of(plain, square_factors(x.shape)), x), factor=100)


@pytest.mark.parametrize("number", [2, 3])
def test_stride_equal_to_dilation(number):
    plain = nn.Conv2d(3, 4, 3, stride=number, dilation=number, padding=1).double()
    x = torch.randn(2, 3, 11, 12, dtype=torch.float64)
    ours, true = weight_gradients(plain, layer_of(plain, square_factors(x.shape)), x)
    assert ours.shape == plain.weight.shape
    assert_near(ours, true, factor=100)


def test_each_axis_has_its_own_padding():
    plain = nn.Conv2d(3, 4, 3, padding=(0, 2)).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert_near(*weight_gradients(plain, layer_of(plain, square_factors(x.shape)), x), factor=100)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_count(mode):
    plain = nn.Conv2d(3, 4, 3, padding=2, padding_mode=mode).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert_near(*weight_gradients(plain, layer_of(plain, square_factors(x.shape)), x), factor=100)


@pytest.mark.parametrize("batch_mode", ["keep", "fixed"])
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_any_batch_size_works(batch, batch_mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    lance.compress_(model, lance.LanceConfig(batch_mode=batch_mode, core_bits=None))
    lance.calibrate(model, [torch.randn(4, 3, 8, 8)], progress=False)
    model(torch.randn(batch, 3, 8, 8)).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_linear_inputs_of_any_number_of_modes(shape):
    plain = nn.Linear(6, 4).double()
    x = torch.randn(shape, dtype=torch.float64)
    assert_near(*weight_gradients(plain, layer_of(plain, square_factors(x.shape)), x), factor=100)


def test_factors_are_in_the_state_and_move():
    x = torch.randn(2, 6, dtype=torch.float64)
    layer = layer_of(nn.Linear(6, 4), square_factors(x.shape))
    assert "lance_factor_1of2" in layer.state_dict()
    assert layer.to("meta").lance_factor_1of2.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_works(dtype):
    x = torch.randn(4, 3, 8, 8)
    layer = layer_of(nn.Conv2d(3, 4, 3), [None if f is None else f.float() for f in square_factors(x.shape)])
    with torch.autocast("cpu", dtype):
        loss = layer(x).float().square().sum()
    loss.backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.weight.grad.abs().sum() > 0


def test_forward_makes_no_copy_of_its_input():
    x = torch.randn(64, 32, 16, 16)
    layer = layer_of(nn.Conv2d(32, 2, 1), [None, *(torch.linalg.qr(torch.randn(n, n))[0][:, :2] for n in (32, 16, 16))])

    def large_allocations(module):
        module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            module(x)
        events = profiler.profiler.kineto_results.events()
        return sum(event.name() == "[memory]" and event.nbytes() >= x.nbytes / 2 for event in events)

    # The library's own convolution may reorder x; ours adds nothing to that.
    assert large_allocations(layer) == large_allocations(nn.Conv2d(32, 2, 1))
