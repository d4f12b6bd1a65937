"""The patches' kernel: numbers under the interpreter, and that it compiles for the GPUs there are."""

from __future__ import annotations

import pytest
import torch

from lance_kernels.kernels.patch import patch_gram_
from tests.kernels.compiled import assert_without_spills, compiling_for
from tests.kernels.programs import interpreted


def test_agrees_with_the_reference_under_the_interpreter():
    assert interpreted("interpreted_patch") == "6 cases"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_ahead_of_time(capability, dtype):
    x, gram = torch.empty(8, 16, 14, 14, dtype=dtype), torch.empty(1, 144, 144)
    with compiling_for(capability) as compiled:
        patch_gram_(gram, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert [kernel.name for kernel in compiled] == ["patch_gram_kernel"]
    assert_without_spills(compiled, least_bytes=dtype.itemsize)
