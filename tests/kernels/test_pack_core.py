"""The packing kernels: numbers under the interpreter, and that they compile for the GPUs there are."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lance_kernels.kernels import pack_core as kernels
from lance_kernels.ops.pack_core import GROUP, MISSING
from tests.kernels.programs import interpreted


def test_kernels_have_the_bits_of_the_reference_under_the_interpreter():
    assert interpreted("interpreted_pack_core") == "288 cases"


def compiled(kernel, types, constants, capability):
    names = kernel.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)]))
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_ahead_of_time(capability, bits, dtype):
    groups = {"GROUPS": kernels.GROUPS, "GROUP": GROUP}
    packing = compiled(
        kernels.pack_kernel,
        [f"*{dtype}", "*fp32", "*fp32", "*fp32", "*u8", "*u8", "i64", "i64"],
        {"BITS": bits, **groups, "MISSING": MISSING},
        capability,
    )
    unpacking = compiled(
        kernels.unpack_kernel,
        ["*u8", "*u8", "*fp32", "*fp32", f"*{dtype}", "i64"],
        {"BITS": bits, "BLOCK": kernels.GROUPS * GROUP, "GROUP": GROUP, "MISSING": MISSING},
        capability,
    )
    magnitudes = compiled(kernels.magnitudes_kernel, [f"*{dtype}", "*fp32", "i64"], groups, capability)
    for binary in (packing, unpacking, magnitudes):
        assert len(binary.asm["cubin"]) > 0
        assert ".local" not in binary.asm["ptx"]
