"""`pack_core` and `unpack_core` on a GPU; the buffer's layout is that of `lance_kernels/ops/pack_core.py`.

Packing takes two launches: the groups' magnitudes, then scales and codes. The largest magnitude is the core's `base`;
every program of the second launch looks for it, or where there are many groups a launch between. Divisions and
roundings are IEEE's, so the bytes are those of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from lance_kernels.kernels._common import cdiv, next_power_of_two
from lance_kernels.ops.pack_core import (
    FORMATS,
    MISSING,
    check_bits,
    check_packed,
    code_bytes,
    group_count,
    packed_bytes,
    scale_table,
)

GROUPS = 64  # groups a program of packing takes
SEARCHED, SEARCH = 8192, 2048  # groups whose largest magnitude every program looks for itself, and those at once
BLOCK = 1024  # values a program of unpacking takes


@triton.jit
def magnitudes_kernel(
    core_pointer,
    magnitudes_pointer,
    count,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Every group's largest magnitude, or with one bit its mean one."""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    place = tl.arange(0, PADDED)[None, :]
    places = groups[:, None] * GROUP + place  # (GROUPS, PADDED)
    inside = (place < GROUP) & (places < count)
    values = tl.load(core_pointer + places, mask=inside, other=0.0).to(tl.float32)
    if BITS == 1:
        # Neighbours first: the order of sums is part of the format.
        sums = tl.abs(values) / GROUP  # (GROUPS, GROUP)
        for halving in tl.static_range(4):
            pairs = tl.reshape(sums, (GROUPS, GROUP // (2 << halving), 2))
            first, second = tl.split(pairs)
            sums = first + second
        sizes = tl.minimum(count - groups * GROUP, GROUP).to(tl.float32)
        magnitudes = tl.reshape(sums, (GROUPS,)) * tl.div_rn(tl.full([GROUPS], GROUP * 1.0, tl.float32), sizes)
    else:
        # As integers, NaN and infinity are above every number.
        words = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        magnitudes = tl.max(words, axis=1).to(tl.float32, bitcast=True)  # (GROUPS,)
    tl.store(magnitudes_pointer + groups, magnitudes, mask=groups * GROUP < count)


@triton.jit
def largest(magnitudes_pointer, groups, SEARCH: tl.constexpr):
    """The largest magnitude of a number, 0 where no group has one."""
    found = tl.zeros([SEARCH], dtype=tl.float32)
    for start in range(0, groups, SEARCH):
        group = start + tl.arange(0, SEARCH)
        magnitudes = tl.load(magnitudes_pointer + group, mask=group < groups, other=0.0)
        finite = (magnitudes.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
        found = tl.maximum(found, tl.where(finite, magnitudes, 0.0))
    return tl.max(found, axis=0)


@triton.jit
def load_base(packed_pointer):
    """The base at the start of a buffer, which may begin between two words."""
    place = tl.arange(0, 4)
    return tl.sum(tl.load(packed_pointer + place).to(tl.int32) << (8 * place), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def pack_kernel(
    core_pointer,
    magnitudes_pointer,
    table_pointer,
    packed_pointer,
    count,
    code_bytes,
    BITS: tl.constexpr,
    BASE: tl.constexpr,
    PER_BYTE: tl.constexpr,
    LARGEST: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    DIGITS: tl.constexpr,
    SEARCH: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Scale and codes of every group, the least significant digit of a byte first; DIGITS is PER_BYTE padded.

    Finds the base too, `SEARCH` groups at once, or reads it where that is 0.
    """
    BYTES: tl.constexpr = GROUP // PER_BYTE
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = groups * GROUP < count
    if SEARCH:
        base = largest(magnitudes_pointer, tl.cdiv(count, GROUP), SEARCH)
        place = tl.arange(0, 4)
        word = (base.to(tl.int32, bitcast=True) >> (8 * place)).to(tl.uint8)
        tl.store(packed_pointer + place, word, mask=(place < 4) & (tl.program_id(0) == 0))
    else:
        base = load_base(packed_pointer)
    codes_pointer = packed_pointer + 4
    scales_pointer = codes_pointer + code_bytes
    magnitudes = tl.load(magnitudes_pointer + groups, mask=inside, other=0.0)  # (GROUPS,)
    finite = (magnitudes.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    known = tl.where(finite, magnitudes, 0.0)
    # The last scale that is not below the magnitude, by bisection of the falling table.
    low = tl.zeros([GROUPS], dtype=tl.int32)
    high = tl.full([GROUPS], MISSING - 2, dtype=tl.int32)
    for _ in tl.static_range(8):
        middle = (low + high + 1) // 2
        reaches = base * tl.load(table_pointer + middle) >= known
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle - 1)
    tl.store(scales_pointer + groups, tl.where(finite, low, MISSING).to(tl.uint8), mask=inside)
    targets = groups[:, None] * BYTES + tl.arange(0, BYTES)[None, :]  # (GROUPS, BYTES)
    digit = tl.arange(0, DIGITS)[None, None, :]
    places = targets[:, :, None] * PER_BYTE + digit  # (GROUPS, BYTES, DIGITS)
    inside = (digit < PER_BYTE) & (places < count)
    values = tl.load(core_pointer + places, mask=inside, other=0.0).to(tl.float32)
    if BITS == 1:
        codes = tl.where(finite[:, None, None] & (values < 0), 0, 1)
    else:
        steps = tl.div_rn(base * tl.load(table_pointer + low), STEPS * 1.0)
        usable = finite & (steps > 0)
        steps = tl.where(usable, steps, 1.0)[:, None, None]
        values = tl.where(usable[:, None, None], values, 0.0)
        ratios = tl.div_rn(values, tl.broadcast_to(steps, (GROUPS, BYTES, DIGITS)))
        ratios = tl.minimum(tl.maximum(ratios, -LARGEST * 1.0), LARGEST * 1.0)
        # Adding it leaves no bits behind the point: rounds to nearest, ties to even.
        rounded = (ratios + 12582912.0) - 12582912.0
        codes = (rounded + LARGEST).to(tl.int32)
    counts = tl.where(digit < PER_BYTE, 1, 0)
    for place in tl.static_range(PER_BYTE - 1):
        counts = tl.where(digit > place, counts * BASE, counts)
    packed = tl.sum(codes * counts, axis=2)  # (GROUPS, BYTES)
    tl.store(codes_pointer + targets, packed.to(tl.uint8), mask=targets < code_bytes)


@triton.jit
def unpack_kernel(
    packed_pointer,
    table_pointer,
    core_pointer,
    count,
    code_bytes,
    BASE: tl.constexpr,
    PER_BYTE: tl.constexpr,
    LARGEST: tl.constexpr,
    STEPS: tl.constexpr,
    SPACING: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    MISSING: tl.constexpr,
):
    """Values from codes and scales."""
    codes_pointer = packed_pointer + 4
    scales_pointer = codes_pointer + code_bytes
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    scales = tl.load(scales_pointer + places // GROUP, mask=inside, other=0).to(tl.int32)  # (BLOCK,)
    known = scales < MISSING - 1
    steps = load_base(packed_pointer) * tl.load(table_pointer + tl.where(known, scales, 0))
    steps = tl.where(known, tl.div_rn(steps, STEPS * 1.0), float("nan"))
    digits = tl.load(codes_pointer + places // PER_BYTE, mask=inside, other=0).to(tl.int32)
    for place in tl.static_range(PER_BYTE - 1):
        digits = tl.where(places % PER_BYTE > place, digits // BASE, digits)
    values = (digits % BASE * SPACING - LARGEST).to(tl.float32) * steps
    tl.store(core_pointer + places, values.to(core_pointer.dtype.element_ty), mask=inside)


def _format(bits: int) -> dict[str, Any]:
    """What both ways know of the buffer, as a kernel's compile-time arguments."""
    form = FORMATS[bits]
    return {
        "BASE": form.base,
        "PER_BYTE": form.per_byte,
        "LARGEST": form.largest,
        "STEPS": form.steps,
        "GROUP": form.group,
        "MISSING": MISSING,
    }


def pack_core(core: torch.Tensor, bits: int) -> torch.Tensor:
    """Launches the kernels that pack `core`; see `lance_kernels.ops.pack_core`."""
    check_bits("pack_core", bits)
    form, dense, count = FORMATS[bits], core.contiguous(), core.numel()
    packed = core.new_empty(packed_bytes(core.shape, bits), dtype=torch.uint8)
    groups = group_count(count, bits)
    magnitudes = core.new_empty(groups, dtype=torch.float32)
    grid = (cdiv(groups, GROUPS),)
    if not count:
        return packed.zero_()
    # float64 is narrowed here, as the reference does, so that the kernels have one way to round.
    dense = dense.float() if dense.dtype == torch.float64 else dense
    padded = next_power_of_two(form.group)
    magnitudes_kernel[grid](
        dense,
        magnitudes,
        count,
        BITS=bits,
        GROUPS=GROUPS,
        GROUP=form.group,
        PADDED=padded,
        enable_fp_fusion=False,  # a fused sum of quotients rounds once less where they are subnormal
    )
    searched = groups <= SEARCHED
    if not searched:
        torch.amax(magnitudes.nan_to_num(nan=0.0, posinf=0.0), 0, keepdim=True, out=packed[:4].view(torch.float32))
    pack_kernel[grid](
        dense,
        magnitudes,
        scale_table(core.device),
        packed,
        count,
        code_bytes(count, bits),
        BITS=bits,
        GROUPS=GROUPS,
        DIGITS=next_power_of_two(form.per_byte),
        SEARCH=SEARCH if searched else 0,
        **_format(bits),
    )
    return packed


def unpack_core(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Launches the kernel that unpacks a core; see `lance_kernels.ops.unpack_core`."""
    check_packed(packed, size, bits, dtype)
    core, count = packed.new_empty(tuple(size), dtype=dtype), math.prod(size)
    if not count:
        return core
    unpack_kernel[(cdiv(count, BLOCK),)](
        packed.contiguous(),
        scale_table(packed.device),
        core,
        count,
        code_bytes(count, bits),
        SPACING=FORMATS[bits].spacing,
        BLOCK=BLOCK,
        **_format(bits),
    )
    return core
