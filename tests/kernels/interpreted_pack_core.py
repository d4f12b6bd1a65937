"""Runs the packing kernels under Triton's interpreter against the reference; a program that a test starts."""

from __future__ import annotations

import itertools

import torch

from lance_kernels.kernels.pack_core import SEARCHED, pack_core, unpack_core
from lance_kernels.ops.pack_core import _pack_reference, _unpack_reference
from tests.kernels.strict import strict

SHAPES = [(3, 5, 7, 2), (4, 9), (5,), (0, 3, 4), (1,), (16,), (33, 17), (70, 64)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def main() -> None:
    torch.manual_seed(0)
    cases = 0
    small = ((torch.float32, 1e-30), (torch.float32, 1e-42), (torch.bfloat16, 1e-39))
    scaled = [*((dtype, 1.0) for dtype in DTYPES), *small]
    for bits, shape, (dtype, scale) in itertools.product((8, 4, 2, 1), SHAPES, scaled):
        core = (torch.randn(shape) * torch.rand(shape) ** 10 * scale).to(dtype)
        if core.numel() > 40:
            core.view(-1)[3], core.view(-1)[37] = torch.nan, torch.inf
        packed = pack_core(core, bits)
        assert torch.equal(packed, _pack_reference(core, bits)), (bits, shape, dtype, scale)
        mine, reference = unpack_core(packed, shape, bits, dtype), _unpack_reference(packed, shape, bits, dtype)
        assert torch.equal(mine.isnan(), reference.isnan())
        assert torch.equal(mine.nan_to_num(), reference.nan_to_num()), (bits, shape, dtype, scale)
        behind, apart = torch.cat([packed[:1], packed])[1:], packed.repeat_interleave(2)[::2]
        for buffer in (behind, apart):
            assert torch.equal(unpack_core(buffer, shape, bits, dtype).view(torch.uint8), mine.view(torch.uint8))
        cases += 1
    core = torch.randn(16 * SEARCHED + 1)
    assert torch.equal(pack_core(core, 4), _pack_reference(core, 4))
    print(f"{cases} cases")


if __name__ == "__main__":
    with strict():
        main()
