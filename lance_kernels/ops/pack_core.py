"""Cores in few bits: `pack_core` rounds to 8, 4, 2 or 1 bits a value, `unpack_core` gives the values back.

The core's values, in order, form groups of 16. A group's scale is the smallest `base * 2^(-c / 8)`, `c` from 0 to 253,
that is not below its magnitude, the largest of its values'; `base` is the largest of all groups. A value `v` becomes
the integer nearest to `v / step`, `step = scale / L` with `L = 2^(bits-1) - 1`. So `|v - unpacked| <= step / 2`, and
`step` is at most `2^(1/8)` times the group's magnitude over `L` unless that lies more than `2^31` below `base`. With
1 bit a group's magnitude is the mean of its values' and all that is kept of a value is its sign: it unpacks to plus or
minus the scale, a zero to plus. The buffer holds `base` (float32), the codes, least significant bits first, and one
byte a group: 4.5 bits a value at 4 bits.

Neighbours of a core are alike enough for this: at equal bytes it gave a higher gradient cosine than a bfloat16 scale a
row, scales along the channel mode, or values sorted by their expected variance (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional as F

from lance_kernels.ops._checks import FLOATING, check, check_floating
from lance_kernels.ops._registry import define, not_differentiable, register_triton

BITS = (8, 4, 2, 1)
GROUP = 16
MISSING = 255  # the scale code of a group that holds NaN or infinity


def pack_core(core: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds a core to `bits` bits a value.

    Args:
        core: any shape, float32, float64, bfloat16 or float16, any strides.
        bits: 8, 4, 2 or 1.

    Returns:
        One uint8 buffer of `packed_bytes(core.shape, bits)` bytes. A group that holds NaN or infinity (in float32)
        unpacks to NaN throughout.

    Raises:
        RuntimeError: `bits` is another number, or the dtype is not a floating one.
    """
    packed: torch.Tensor = torch.ops.lance.pack_core(core, bits)
    return packed


def unpack_core(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    """Gives back the core that `pack_core` rounded.

    Args:
        packed: the buffer, uint8, `(packed_bytes(size, bits),)`.
        size: the core's shape.
        bits: 8, 4, 2 or 1, as packed.
        dtype: dtype of the result.

    Returns:
        The core, contiguous, of shape `size` and dtype `dtype`.

    Raises:
        RuntimeError: the buffer does not have the size that `size` and `bits` imply, or an argument is out of range.
    """
    core: torch.Tensor = torch.ops.lance.unpack_core(packed, list(size), bits, dtype)
    return core


def packed_bytes(size: Sequence[int], bits: int) -> int:
    """Bytes of the buffer for a core of shape `size`: base, codes, and one byte a group."""
    count = math.prod(size)
    return 4 + (count * bits + 7) // 8 + (count + GROUP - 1) // GROUP


def core_bytes(size: Sequence[int], bits: int | None, itemsize: int) -> int:
    """Bytes of a core of shape `size`: packed, or with 0 or None bits in a dtype of `itemsize` bytes."""
    return packed_bytes(size, bits) if bits else math.prod(size) * itemsize


def check_bits(operator: str, bits: int) -> None:
    """Refuses a number of bits that no packed core has."""
    check(bits in BITS, f"lance::{operator}: bits is {bits}; expected 8, 4, 2 or 1")


@cache
def scale_table(device: torch.device) -> torch.Tensor:
    """Scales over the base: falling powers of 2^(1/8), computed in float64 and rounded, `(254,)` float32."""
    return torch.exp2(torch.arange(MISSING - 1, dtype=torch.float64) / -8).float().to(device)


def _pack_reference(core: torch.Tensor, bits: int) -> torch.Tensor:
    check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    largest, count, per_byte = 2 ** (bits - 1) - 1, core.numel(), 8 // bits
    groups = F.pad(core.reshape(-1).float(), (0, -count % GROUP)).view(-1, GROUP)
    magnitudes = _magnitudes(groups, count, bits) if count else groups.new_zeros(0)
    finite = magnitudes.isfinite()
    base = torch.where(finite, magnitudes, 0.0).amax() if count else groups.new_zeros(())
    scales = base * scale_table(core.device)
    rising = scales.flip(0).contiguous()
    chosen = MISSING - 2 - torch.searchsorted(rising, magnitudes.contiguous()).clamp_max(MISSING - 2)
    if bits == 1:
        codes = (~(groups < 0) | ~finite.unsqueeze(1)).float()
    else:
        steps = (scales[chosen] / largest).unsqueeze(1)
        codes = torch.where(steps > 0, (groups / steps).round().clamp(-largest, largest), 0.0)
        codes = torch.where(finite.unsqueeze(1), codes, 0.0) + largest
    # Behind the core's end the last byte holds codes of zero.
    stream = codes.reshape(-1)[: count + -count % per_byte].to(torch.uint8).view(-1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=core.device)
    packed = (stream << shifts).sum(dim=1, dtype=torch.uint8)
    return torch.cat([base.view(1).view(torch.uint8), packed, torch.where(finite, chosen, MISSING).to(torch.uint8)])


def _magnitudes(groups: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """What the groups' scales are chosen by, `(groups,)`: the largest magnitude, for signs the mean one."""
    if bits > 1:
        return groups.abs().amax(dim=1)
    # Neighbours first: the order of sums is part of the format. Divided before, they stay finite.
    sums = groups.abs() / GROUP
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    sums[-1] *= GROUP / (GROUP - -count % GROUP)
    return sums.squeeze(1)


def _pack_fake(core: torch.Tensor, bits: int) -> torch.Tensor:
    check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    return core.new_empty(packed_bytes(core.shape, bits), dtype=torch.uint8)


def check_packed(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> None:
    """Refuses a buffer that is no packed core of shape `size`, or a dtype that no core has."""
    check_bits("unpack_core", bits)
    check(dtype in FLOATING, f"lance::unpack_core: dtype is {dtype}; expected float32, float64, bfloat16 or float16")
    check(
        packed.dtype == torch.uint8 and packed.dim() == 1,
        f"lance::unpack_core: packed is {packed.dtype} of shape {tuple(packed.shape)}; expected a flat uint8 buffer",
    )
    check(all(extent >= 0 for extent in size), f"lance::unpack_core: size is {tuple(size)}; expected no negative entry")
    check(
        packed.shape[0] == packed_bytes(size, bits),
        f"lance::unpack_core: packed has {packed.shape[0]} bytes; expected {packed_bytes(size, bits)} for size "
        f"{tuple(size)} in {bits} bits",
    )


def _unpack_reference(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    check_packed(packed, size, bits, dtype)
    # A code of 1 bit is a sign: 0 for -1, 1 for 1.
    spacing, largest = (1, 2 ** (bits - 1) - 1) if bits > 1 else (2, 1)
    count = math.prod(size)
    split = 4 + (count * bits + 7) // 8
    base, codes, chosen = packed[:4].clone().view(torch.float32), packed[4:split], packed[split:]
    table = F.pad(base * scale_table(packed.device) / largest, (0, 2), value=torch.nan)
    steps = table[chosen.long()].repeat_interleave(GROUP)[:count]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    stream = (codes.unsqueeze(1) >> shifts) & (2**bits - 1)
    values: torch.Tensor = (stream.reshape(-1)[:count].float() * spacing - largest) * steps
    return values.to(dtype).reshape(tuple(size))


def _unpack_fake(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    check_packed(packed, size, bits, dtype)
    return packed.new_empty(size, dtype=dtype)


define(
    "pack_core(Tensor core, int bits) -> Tensor",
    reference=_pack_reference,
    fake=_pack_fake,
    autograd=not_differentiable("pack_core"),
)
define(
    "unpack_core(Tensor packed, SymInt[] size, int bits, ScalarType dtype) -> Tensor",
    reference=_unpack_reference,
    fake=_unpack_fake,
)

register_triton("pack_core")
register_triton("unpack_core", file="pack_core")
