"""The device that these tests run on: the GPU where there is one, which `make gpu` asks for, else the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Float32 products of all bits."""
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [products.fp32_precision for products in settings]
    for products in settings:
        products.fp32_precision = "ieee"
    yield
    for products, precision in zip(settings, before):
        products.fp32_precision = precision
