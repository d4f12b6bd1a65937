"""Cores in few bits: `pack_core` rounds to 8, 4, 2 or 1 bits a value, `unpack_core` gives the values back.

The core's values, in order, form groups of 16, with 2 bits of 20. A group's scale is the smallest `base * 2^(-c / 8)`,
`c` from 0 to 253, that is not below its magnitude, the largest of its values'; `base` is the largest of all groups. A
value `v` becomes the integer nearest to `v / step`, `step = scale / L` with `L = 2^(bits-1) - 1`, or of -1, 0 and 1
with 2 bits, `L = 1.25`. So `|v - unpacked| <= step / 2`, and `step` is at most `2^(1/8)` times the group's magnitude
over `L` unless that lies more than `2^31` below `base`. With 1 bit a group's magnitude is the mean of its values' and
all that is kept of a value is its sign: it unpacks to plus or minus the scale, a zero to plus. The buffer holds `base`
(float32), the codes and one byte a group. Codes are digits of their byte, the first the least significant: 1, 2 or 8
digits at 8, 4 and 1 bits; at 2 bits, where there are three codes, 5 of base 3. So a value takes 8.5, 4.5, 2.0 or 1.5
bits at 8, 4, 2 and 1, scales included.

Neighbours of a core are alike enough for this: at equal bytes it gave a higher gradient cosine than a bfloat16 scale a
row, scales along the channel mode, or values sorted by their expected variance (docs/decisions.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from lance_kernels.ops._checks import FLOATING, check, check_floating
from lance_kernels.ops._prepared import outside_pools
from lance_kernels.ops._registry import define, not_differentiable, register_triton


class Format(NamedTuple):
    """How codes of one number of bits are kept.

    Attributes:
        base: of the digits that a byte's codes are.
        per_byte: codes in a byte.
        group: values that share a scale; their codes fill whole bytes.
        largest: the largest code; codes are kept with it added.
        steps: of a scale.
        spacing: between codes, in steps.
    """

    base: int
    per_byte: int
    group: int
    largest: int
    steps: float
    spacing: int


FORMATS = {
    8: Format(256, 1, 16, 127, 127, 1),
    4: Format(16, 2, 16, 7, 7, 1),
    2: Format(3, 5, 20, 1, 1.25, 1),
    1: Format(2, 8, 16, 1, 1, 2),
}
BITS = tuple(FORMATS)
MISSING = 255  # the scale code of a group that holds NaN or infinity


def pack_core(core: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds a core to `bits` bits a value.

    Args:
        core: any shape, float32, float64, bfloat16 or float16, any strides.
        bits: 8, 4, 2 or 1.

    Returns:
        One uint8 buffer of `packed_bytes(core.shape, bits)` bytes. A group that holds NaN or infinity (in float32)
        unpacks to NaN throughout, and one that reaches the largest float32 may unpack to infinity or NaN.

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
    return 4 + code_bytes(count, bits) + group_count(count, bits)


def code_bytes(count: int, bits: int) -> int:
    """Bytes of the codes of `count` values."""
    per_byte = FORMATS[bits].per_byte
    return (count + per_byte - 1) // per_byte


def group_count(count: int, bits: int) -> int:
    """Groups of `count` values."""
    group = FORMATS[bits].group
    return (count + group - 1) // group


def core_bytes(size: Sequence[int], bits: int | None, itemsize: int) -> int:
    """Bytes of a core of shape `size`: packed, or with 0 or None bits in a dtype of `itemsize` bytes."""
    return packed_bytes(size, bits) if bits else math.prod(size) * itemsize


def buffer_parts(packed: torch.Tensor, count: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a buffer of `count` values: the bytes of `base`, of the codes, and of the groups' scales."""
    scales = 4 + code_bytes(count, bits)
    return packed[:4], packed[4:scales], packed[scales:]


def check_bits(operator: str, bits: int) -> None:
    """Refuses a number of bits that no packed core has."""
    check(bits in BITS, lambda: f"lance::{operator}: bits is {bits}; expected 8, 4, 2 or 1")


@cache
def scale_table(device: torch.device) -> torch.Tensor:
    """Scales over the base: falling powers of 2^(1/8), computed in float64 and rounded, `(254,)` float32."""
    # On the CPU, whatever the default device: another's powers may differ in their last bit.
    table = torch.exp2(torch.arange(MISSING - 1, dtype=torch.float64, device="cpu") / -8).float()
    return outside_pools(lambda: table.to(device), device)


def _pack_reference(core: torch.Tensor, bits: int) -> torch.Tensor:
    check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    form, count = FORMATS[bits], core.numel()
    groups = F.pad(core.reshape(-1).float(), (0, -count % form.group)).view(-1, form.group)
    magnitudes = _magnitudes(groups, count, bits) if count else groups.new_zeros(0)
    finite = magnitudes.isfinite()
    base = torch.where(finite, magnitudes, 0.0).amax() if count else groups.new_zeros(())
    scales = base * scale_table(core.device)
    rising = scales.flip(0).contiguous()
    chosen = MISSING - 2 - torch.searchsorted(rising, magnitudes.contiguous()).clamp_max(MISSING - 2)
    if bits == 1:
        codes = (~(groups < 0) | ~finite.unsqueeze(1)).float()
    else:
        steps = (scales[chosen] / form.steps).unsqueeze(1)
        codes = torch.where(steps > 0, (groups / steps).round().clamp(-form.largest, form.largest), 0.0)
        codes = torch.where(finite.unsqueeze(1), codes, 0.0) + form.largest
    # Behind the core's end the last byte holds codes of zero.
    digits = codes.reshape(-1)[: code_bytes(count, bits) * form.per_byte].to(torch.uint8).view(-1, form.per_byte)
    packed = (digits * _places(form, core.device)).sum(dim=1, dtype=torch.uint8)
    return torch.cat([base.view(1).view(torch.uint8), packed, torch.where(finite, chosen, MISSING).to(torch.uint8)])


def _places(form: Format, device: torch.device) -> torch.Tensor:
    """What a byte's digits count, `(per_byte,)` uint8."""
    return torch.tensor([form.base**place for place in range(form.per_byte)], dtype=torch.uint8, device=device)


def _magnitudes(groups: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """What the groups' scales are chosen by, `(groups,)`: the largest magnitude, for signs the mean one."""
    if bits > 1:
        return groups.abs().amax(dim=1)
    # Neighbours first: the order of sums is part of the format. Divided before, they stay finite.
    group = groups.shape[1]
    sums = groups.abs() / group
    while sums.shape[1] > 1:
        sums = sums[:, 0::2] + sums[:, 1::2]
    sums[-1] *= group / (group - -count % group)
    return sums.squeeze(1)


def _pack_fake(core: torch.Tensor, bits: int) -> torch.Tensor:
    check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    return core.new_empty(packed_bytes(core.shape, bits), dtype=torch.uint8)


def check_packed(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> None:
    """Refuses a buffer that is no packed core of shape `size`, or a dtype that no core has."""
    check_bits("unpack_core", bits)
    check(
        dtype in FLOATING,
        lambda: f"lance::unpack_core: dtype is {dtype}; expected float32, float64, bfloat16 or float16",
    )
    check(
        packed.dtype == torch.uint8 and packed.dim() == 1,
        lambda: (
            f"lance::unpack_core: packed is {packed.dtype} of shape {tuple(packed.shape)}; expected a flat uint8 buffer"
        ),
    )
    check(
        all(extent >= 0 for extent in size),
        lambda: f"lance::unpack_core: size is {tuple(size)}; expected no negative entry",
    )
    check(
        packed.shape[0] == packed_bytes(size, bits),
        lambda: (
            f"lance::unpack_core: packed has {packed.shape[0]} bytes; expected {packed_bytes(size, bits)} for size "
            f"{tuple(size)} in {bits} bits"
        ),
    )


def _unpack_reference(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    check_packed(packed, size, bits, dtype)
    form, count = FORMATS[bits], math.prod(size)
    base, codes, chosen = buffer_parts(packed, count, bits)
    table = F.pad(base.clone().view(torch.float32) * scale_table(packed.device) / form.steps, (0, 2), value=torch.nan)
    steps = table[chosen.long()].repeat_interleave(form.group)[:count]
    digits = (codes.unsqueeze(1) // _places(form, packed.device)).short() % form.base
    values: torch.Tensor = (digits.reshape(-1)[:count].float() * form.spacing - form.largest) * steps
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
