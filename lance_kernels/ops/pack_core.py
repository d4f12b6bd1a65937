"""Cores in few bits: `pack_core` rounds to 8, 4 or 2 bits a value, `unpack_core` gives the values back.

A row is what the core holds at one position of its first two modes (of its first mode, for a matrix): a sample's
channel, or a sample's token. Each row has one scale, `s = absmax / L` with `L = 2^(bits-1) - 1`, rounded to bfloat16; a
value `v` becomes the integer nearest to `v / s`, so `|v - unpacked| <= s / 2`. The buffer holds the codes, least
significant bits first, filled up to a multiple of four bytes, then the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lance_kernels.ops._checks import FLOATING, check, check_floating
from lance_kernels.ops._registry import define, not_differentiable

BITS = (8, 4, 2)


def pack_core(core: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounds a core to `bits` bits a value.

    Args:
        core: any shape, float32, float64, bfloat16 or float16, any strides.
        bits: 8, 4 or 2.

    Returns:
        One uint8 buffer of `packed_bytes(core.shape, bits)` bytes. A row that holds NaN or infinity (in float32)
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
        bits: 8, 4 or 2, as packed.
        dtype: dtype of the result.

    Returns:
        The core, contiguous, of shape `size` and dtype `dtype`.

    Raises:
        RuntimeError: the buffer does not have the size that `size` and `bits` imply, or an argument is out of range.
    """
    core: torch.Tensor = torch.ops.lance.unpack_core(packed, list(size), bits, dtype)
    return core


def packed_bytes(size: Sequence[int], bits: int) -> int:
    """Bytes of the buffer for a core of shape `size`: codes, and two bytes a row."""
    return _code_bytes(size, bits) + 2 * _rows(size)


def _code_bytes(size: Sequence[int], bits: int) -> int:
    return (math.prod(size) * bits + 31) // 32 * 4


def _rows(size: Sequence[int]) -> int:
    return math.prod(size[: min(2, max(len(size) - 1, 0))])


def _check_bits(operator: str, bits: int) -> None:
    check(bits in BITS, f"lance::{operator}: bits is {bits}; expected 8, 4 or 2")


def _pack_reference(core: torch.Tensor, bits: int) -> torch.Tensor:
    _check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    largest = 2 ** (bits - 1) - 1
    rows = core.float().reshape(_rows(core.shape), -1) if core.numel() else core.new_empty(_rows(core.shape), 0).float()
    absmax = rows.abs().amax(dim=1) if rows.shape[1] else rows.new_zeros(rows.shape[0])
    scales = torch.where(absmax.isfinite(), absmax / largest, torch.nan).to(torch.bfloat16)
    steps = scales.float().unsqueeze(1)
    codes = torch.where(steps > 0, (rows / steps).round().clamp(-largest, largest), 0.0) + largest
    per_byte = 8 // bits
    stream = torch.zeros(_code_bytes(core.shape, bits) * per_byte, dtype=torch.uint8, device=core.device)
    stream[: codes.numel()] = codes.reshape(-1).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=core.device)
    packed = (stream.view(-1, per_byte) << shifts).sum(dim=1, dtype=torch.uint8)
    return torch.cat([packed, scales.view(torch.uint8)])


def _pack_fake(core: torch.Tensor, bits: int) -> torch.Tensor:
    _check_bits("pack_core", bits)
    check_floating("pack_core", "core", core)
    return core.new_empty(packed_bytes(core.shape, bits), dtype=torch.uint8)


def _check_packed(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> None:
    _check_bits("unpack_core", bits)
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
    _check_packed(packed, size, bits, dtype)
    if math.prod(size) == 0:
        return packed.new_empty(size, dtype=dtype)
    split = _code_bytes(size, bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    stream = (packed[:split].unsqueeze(1) >> shifts) & (2**bits - 1)
    codes = stream.reshape(-1)[: math.prod(size)].reshape(_rows(size), -1)
    scales = packed[split:].clone().view(torch.bfloat16).float().unsqueeze(1)
    values: torch.Tensor = (codes.float() - (2 ** (bits - 1) - 1)) * scales
    return values.to(dtype).reshape(tuple(size))


def _unpack_fake(packed: torch.Tensor, size: Sequence[int], bits: int, dtype: torch.dtype) -> torch.Tensor:
    _check_packed(packed, size, bits, dtype)
    return packed.new_empty(size, dtype=dtype)


define(
    "pack_core(Tensor core, int bits) -> Tensor",
    reference=_pack_reference,
    fake=_pack_fake,
    autograd=not_differentiable("pack_core"),
)
define(
    "unpack_core(Tensor packed, int[] size, int bits, ScalarType dtype) -> Tensor",
    reference=_unpack_reference,
    fake=_unpack_fake,
)
