"""The device that these tests run on: the GPU where there is one, which `make gpu` asks for, else the CPU."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param
