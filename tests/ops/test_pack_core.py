"""`pack_core` and `unpack_core`: the stated bound, the stated size, and what NaN becomes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from lance_kernels.ops import pack_core, unpack_core
from lance_kernels.ops.pack_core import BITS, FORMATS, _pack_reference, _unpack_reference, packed_bytes
from tests.ops.cases import DTYPES, LAYOUTS, lay_out

shapes = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(tuple)
bits = st.sampled_from(BITS)


def groups_of(core: torch.Tensor, bits: int) -> torch.Tensor:
    flat, group = core.double().reshape(-1), FORMATS[bits].group
    return torch.nn.functional.pad(flat, (0, -flat.numel() % group)).view(-1, group)


@given(shape=shapes, bits=st.sampled_from((8, 4, 2)), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_error_is_at_most_half_a_step(shape, bits, dtype, layout):
    core = lay_out(torch.randn(shape).to(dtype), layout)
    packed = pack_core(core, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_bytes(shape, bits),)
    unpacked = unpack_core(packed, shape, bits, torch.float64)
    assert unpacked.shape == shape
    # Half a step, and the float32 roundings of scale and product.
    step = 2**0.125 * groups_of(core, bits).abs().amax(1, keepdim=True) / {8: 127, 4: 7, 2: 1.25}[bits]
    assert ((groups_of(unpacked, bits) - groups_of(core, bits)).abs() <= step * (0.5 + 1e-4)).all()


@given(shape=shapes, dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS))
def test_one_bit_keeps_signs_and_the_mean_magnitude(shape, dtype, layout):
    core = lay_out(torch.randn(shape).to(dtype), layout)
    packed = pack_core(core, 1)
    assert packed.shape == (packed_bytes(shape, 1),)
    unpacked = unpack_core(packed, shape, 1, torch.float64)
    assert torch.equal(unpacked < 0, core < 0)
    sizes = groups_of(torch.ones(shape), 1).sum(1)
    means = groups_of(core, 1).abs().sum(1) / sizes
    found = groups_of(unpacked, 1).abs()
    assert torch.equal(found.sum(1), found.amax(1) * sizes)
    assert (found.amax(1) >= means * (1 - 1e-6)).all()
    assert (found.amax(1) <= means * 2**0.125 * (1 + 1e-6)).all()


def test_one_bit_of_large_and_of_small_values():
    core = torch.tensor([3e38, -3e38, 1e38, -1e38] * 4)
    assert unpack_core(pack_core(core, 1), core.shape, 1, torch.float32).abs().equal(torch.full((16,), 2e38))
    zeros = torch.tensor([0.0, -0.0, 4.0, -4.0])
    assert unpack_core(pack_core(zeros, 1), (4,), 1, torch.float32).tolist() == [2.0, 2.0, 2.0, -2.0]


@given(shape=shapes, bits=bits, dtype=st.sampled_from(DTYPES), scale=st.sampled_from((1.0, 1e-30, 1e30, 1e-42)))
def test_compiled_kernel_has_the_bits_of_the_reference(shape, bits, dtype, scale):
    core = (torch.randn(shape) * torch.rand(shape) ** 20 * scale).to(dtype)
    if core.numel() > 2:
        core.view(-1)[1] = torch.nan
    packed = pack_core(core, bits)
    assert torch.equal(packed, _pack_reference(core, bits))
    mine, reference = (f(packed, shape, bits, dtype) for f in (unpack_core, _unpack_reference))
    assert torch.equal(mine.isnan(), reference.isnan())
    assert torch.equal(mine.nan_to_num(), reference.nan_to_num())


def test_tiny_groups_beside_a_large_one():
    group = FORMATS[8].group
    core = torch.cat([torch.full((group,), 1e10), torch.full((group,), 1e-10)])
    unpacked = unpack_core(pack_core(core, 8), core.shape, 8, torch.float32)
    # The second group lies 66 octaves below the first, beyond the scales' reach: zero is within half of its step.
    assert torch.equal(unpacked, torch.cat([core[:group], torch.zeros(group)]))


@pytest.mark.parametrize("bits", BITS)
def test_zero_core_unpacks_to_zero(bits):
    assert not unpack_core(pack_core(torch.zeros(2, 3, 4), bits), (2, 3, 4), bits, torch.float32).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_poison_their_group_only(bits, bad):
    core = torch.randn(3, 4, FORMATS[bits].group)
    core[1, 2, 3] = bad
    unpacked = unpack_core(pack_core(core, bits), core.shape, bits, torch.float32)
    assert unpacked[1, 2].isnan().all()
    unpacked[1, 2] = 0
    assert unpacked.isfinite().all()


@pytest.mark.parametrize(("bits", "with_scales"), [(8, 8.5), (4, 4.5), (2, 2.0), (1, 1.5)])
def test_bits_of_a_value_with_its_scale(bits, with_scales):
    count = 2**14 * 5
    assert packed_bytes((count,), bits) == 4 + count * with_scales / 8
    assert len(pack_core(torch.randn(count), bits)) == packed_bytes((count,), bits)


def test_two_bits_are_three_levels_five_to_a_byte():
    core = torch.tensor([1.0, -1.0, 0.35, -0.6, 0.0, 1.0, 1.0])
    packed = pack_core(core, 2)
    digits = [[2, 0, 1, 0, 1], [2, 2, 1, 1, 1]]  # zeros behind the end
    assert packed[4:6].tolist() == [sum(digit * 3**place for place, digit in enumerate(byte)) for byte in digits]
    assert unpack_core(packed, (7,), 2, torch.float32).mul(1.25).tolist() == [1.0, -1.0, 0.0, -1.0, 0.0, 1.0, 1.0]


def test_float64_beyond_float32_becomes_nan_not_a_number():
    core = torch.tensor([[1e300, 1.0]], dtype=torch.float64)
    assert unpack_core(pack_core(core, 4), core.shape, 4, torch.float64).isnan().all()


@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits):
    core = torch.randn(3, 5, 2, 3)
    packed = pack_core(core, bits)
    opcheck(torch.ops.lance.pack_core.default, (core, bits))
    opcheck(torch.ops.lance.unpack_core.default, (packed, list(core.shape), bits, torch.bfloat16))


def test_refusals():
    core = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="bits is 3; expected 8, 4, 2 or 1"):
        pack_core(core, 3)
    with pytest.raises(RuntimeError, match=r"core has dtype torch.int64"):
        pack_core(core.long(), 4)
    packed = pack_core(core, 4)
    with pytest.raises(RuntimeError, match=r"packed has \d+ bytes; expected \d+ for size \(3, 9\) in 4 bits"):
        unpack_core(packed, (3, 9), 4, torch.float32)
    with pytest.raises(RuntimeError, match="expected a flat uint8 buffer"):
        unpack_core(packed.float(), (3, 4), 4, torch.float32)
    with pytest.raises(RuntimeError, match=r"dtype is torch.int32"):
        unpack_core(packed, (3, 4), 4, torch.int32)
    with pytest.raises(RuntimeError, match="expected no negative entry"):
        unpack_core(packed, (-3, -4), 4, torch.float32)
