"""The companions' kernels: numbers under the interpreter, and that they compile for the GPUs there are."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lance_kernels.kernels import activation, mask
from lance_kernels.ops.activation import KINDS
from tests.kernels.programs import interpreted


def test_kernels_agree_with_the_references_under_the_interpreter():
    assert interpreted("interpreted_companions") == "480 cases"


def compile_for(kernel, types, constants, capability):
    names = kernel.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)]))
    binary = triton.compile(
        ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32)
    )
    assert len(binary.asm["cubin"]) > 0
    assert ".local" not in binary.asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masks_compile_ahead_of_time(capability, dtype):
    for kind in ("relu", "clamp", "leaky"):
        types = [f"*{dtype}", f"*{dtype}", "*u8", "fp32", "fp32", "fp32", "i64"]
        compile_for(mask.activate_kernel, types, {"KIND": kind, "BLOCK": mask.BLOCK}, capability)
    types = [f"*{dtype}", "*u8", f"*{dtype}", "fp32", "i64"]
    for scaled in (False, True):
        compile_for(mask.select_kernel, types, {"SCALED": scaled, "BLOCK": mask.BLOCK}, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_compile_ahead_of_time(capability, bits):
    for kind in KINDS:
        grid = KINDS[kind].grids[bits]
        constants = {"STEPS": grid.steps, "ZERO": grid.zero, "BITS": bits, "BLOCK": activation.BLOCK}
        compile_for(activation.codes_kernel, ["*bf16", "*u8", "i64"], {"KIND": kind, **constants}, capability)
        compile_for(activation.grad_kernel, ["*bf16", "*u8", "*bf16", "i64"], constants, capability)
