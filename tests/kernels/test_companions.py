"""The companions' kernels: numbers under the interpreter, and that they compile for the GPUs there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from lance_kernels.kernels import activation, mask
from lance_kernels.ops.activation import KINDS
from tests.kernels.compiled import assert_without_spills, compiling_for
from tests.kernels.programs import interpreted


def test_kernels_agree_with_the_references_under_the_interpreter():
    assert interpreted("interpreted_companions") == "366 cases"


@pytest.mark.parametrize("capability", [80, 90])
def test_masks_compile_through_their_launchers(capability):
    with compiling_for(capability) as compiled:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 4096).to(dtype)
            for bounds in ((None, None, None), (0.0, 6.0, None), (None, None, 0.1)):
                _, bits = mask.masked_activation(x, *bounds, [0, 1])
                mask.masked_activation_grad(x, bits, bounds[2], [0, 1])
    assert len(compiled) == 12
    assert_without_spills(compiled, least_bytes=16)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_bits_compile_through_their_launchers(capability):
    x = torch.randn(4, 4096).bfloat16()
    with compiling_for(capability) as compiled:
        bits = mask.pack_mask(x > 0, [0, 1])
        mask.unpack_mask(bits, x, [0, 1])
        mask.dropout_grad(x, bits, 0.1, [0, 1])
    assert [kernel.name for kernel in compiled] == ["pack_kernel", "unpack_kernel", "dropout_grad_kernel"]
    for kernel, widest in zip(compiled, (8, 1, 16)):  # eight flags, their byte, eight gradients
        assert_without_spills([kernel], least_bytes=widest)


@pytest.mark.parametrize("capability", [80, 90])
def test_codes_compile_through_their_launchers(capability):
    x = torch.randn(4, 4096).bfloat16()
    with compiling_for(capability) as compiled:
        for kind, bits in itertools.product(KINDS if capability == 90 else list(KINDS)[:1], (8, 4)):
            codes = activation.activation_codes(x, kind, bits, [0, 1])
            activation.activation_grad(x, codes, kind, bits, [0, 1])
    assert len(compiled) == (4 * len(KINDS) if capability == 90 else 4)
    assert_without_spills(compiled, least_bytes=4)  # two 4-bit codes a byte
