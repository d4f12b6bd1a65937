"""The patches' kernel: numbers under the interpreter, and that it compiles for the GPUs there are."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from lance_kernels.kernels import patch
from tests.kernels.compiled import assert_without_spills, compiling_for
from tests.kernels.programs import interpreted


def test_agrees_with_the_reference_under_the_interpreter():
    assert interpreted("interpreted_patch") == "7 cases"


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_ahead_of_time(capability, dtype):
    x, gram = torch.empty(8, 16, 14, 14, dtype=dtype), torch.empty(1, 144, 144)
    with compiling_for(capability) as compiled:
        patch.patch_gram_(gram, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert [kernel.name for kernel in compiled] == ["patch_gram_kernel"]
    assert_without_spills(compiled, least_bytes=dtype.itemsize)


def test_few_tiles_share_out_the_columns():
    """Columns are shared out, two steps each, where the matrix is small, and not where it is large."""
    grids = []
    with mock.patch.object(patch, "patch_gram_kernel") as kernel:
        kernel.__getitem__.side_effect = lambda grid: grids.append(grid) or (lambda *args, **kwargs: None)
        for channels in (16, 512):
            x, gram = torch.zeros(8, channels, 14, 14), torch.zeros(1, 9 * channels, 9 * channels)
            patch.patch_gram_(gram, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)
    assert grids == [(6 * 25,), (72 * 73 // 2,)]
