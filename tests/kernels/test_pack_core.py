"""The packing kernels: numbers under the interpreter, and that they compile for the GPUs there are."""

from __future__ import annotations

import pytest
import torch

from lance_kernels.kernels.pack_core import pack_core, unpack_core
from lance_kernels.ops.pack_core import scale_table
from tests.kernels.compiled import assert_without_spills, compiling_for
from tests.kernels.programs import interpreted


def test_kernels_have_the_bits_of_the_reference_under_the_interpreter():
    assert interpreted("interpreted_pack_core") == "224 cases"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, torch.float32), (90, torch.bfloat16), (90, torch.float16), (80, torch.bfloat16), (100, torch.bfloat16)],
)
def test_kernels_compile_through_their_launchers(capability, dtype):
    core = torch.randn(64, 128).to(dtype)
    with compiling_for(capability) as compiled:
        for bits in (8, 4, 2, 1):
            packed = pack_core(core, bits)
            unpack_core(packed, [64, 128], bits, dtype)
    assert [kernel.name for kernel in compiled] == ["magnitudes_kernel", "pack_kernel", "unpack_kernel"] * 4
    assert_without_spills(compiled, least_bytes=4)  # scales and codes
    # A fused multiplication and addition would round the mean of subnormal quotients otherwise than the reference.
    sixteenths = [line for kernel in compiled for line in kernel.sass.splitlines() if "0.0625" in line]
    assert sixteenths
    assert not any("FFMA" in line for line in sixteenths)


def test_scales_are_those_of_the_cpu_whatever_the_default_device():
    scale_table.cache_clear()
    with torch.device("meta"):
        table = scale_table(torch.device("cpu"))
    assert torch.equal(table, torch.exp2(torch.arange(254, dtype=torch.float64) / -8).float())
