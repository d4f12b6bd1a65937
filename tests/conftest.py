"""Set-up that every test shares: seeds, threads, and how many examples hypothesis draws."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("fuzz", parent=settings.get_profile("default"), max_examples=5000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# With AMX, PyTorch 2.13's own bfloat16 convolutions read memory past their input where stride and kernel are 3 and the
# size is 5: NaN where the heap holds one (docs/decisions.md). oneDNN reads this at its first call.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

# Small tensors on two threads that wait for a third process take a hundred times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
