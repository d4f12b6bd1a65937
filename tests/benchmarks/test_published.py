"""The published layer's contractions against a dense computation in float64."""

import pytest
import torch
from torch.nn.grad import conv2d_weight

from benchmarks import published
from benchmarks.layers import LAYERS, Layer, orthonormal


def factors_of(shape: tuple[int, ...], ranks: tuple[int, ...], generator: torch.Generator) -> list[torch.Tensor]:
    return [orthonormal(size, rank, generator).double() for size, rank in zip(shape[1:], ranks)]


def test_projection_is_the_mode_products() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, 6, dtype=torch.float64, generator=generator)
    factors = factors_of(x.shape, (2, 3, 4), generator)
    expected = torch.einsum("bchw,cq,hk,wl->bqkl", x, *factors)
    torch.testing.assert_close(published.project(x, factors), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), 1, 1), ((1, 1), 1, 0), ((3, 3), 2, 1), ((5, 3), 1, 2), ((3, 3), 3, 0), ((1, 1), 2, 0), ((2, 2), 2, 1)],
)
def test_convolution_weight_grad_is_the_dense_one_of_the_reconstruction(
    kernel: tuple[int, int], stride: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 9, 10, dtype=torch.float64, generator=generator)
    factors = factors_of(x.shape, (3, 4, 2), generator)
    core = published.project(x, factors)
    weight = torch.randn(5, 6, *kernel, dtype=torch.float64, generator=generator)
    grad_output = torch.randn_like(torch.conv2d(x, weight, stride=stride, padding=padding))
    x_hat = torch.einsum("bqkl,cq,hk,wl->bchw", core, *factors)
    expected = conv2d_weight(x_hat, weight.shape, grad_output, stride=stride, padding=padding)
    actual = published.convolution_weight_grad(grad_output, core, factors, kernel, stride, padding)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("features_last", [False, True])
def test_linear_weight_grad_is_the_dense_one_of_the_reconstruction(features_last: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 7, 6, dtype=torch.float64, generator=generator)
    grad_output = torch.randn(4, 7, 5, dtype=torch.float64, generator=generator)
    factors = factors_of(x.shape, (3, 2), generator)
    core = published.project(x, factors)
    x_hat = torch.einsum("bkr,nk,dr->bnd", core, *factors)
    expected = torch.einsum("bno,bnd->od", grad_output, x_hat)
    actual = published.linear_weight_grad(grad_output, core, factors, features_last=features_last)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_timed_methods_compute_the_same(layer: Layer) -> None:
    tensors = layer.with_batch(2).tensors(seed=0)
    core = tensors.project()
    torch.testing.assert_close(core, tensors.published_project(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        layer.weight_grad(tensors, core), layer.published_weight_grad(tensors, core), rtol=1e-3, atol=1e-3
    )
    weight = tensors.weight.clone().requires_grad_()
    leaves = type(tensors)(tensors.x, weight, tensors.grad, tensors.factors)
    (dense,) = torch.autograd.grad(layer.plain_forward(leaves), weight, tensors.grad)
    torch.testing.assert_close(layer.dense_weight_grad(tensors), dense, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.forward(tensors), layer.plain_forward(tensors), rtol=1e-4, atol=1e-4)
