"""What the launchers share: tiles, the precision of float32 products, and factors in the form the kernels read."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from triton.runtime.autotuner import OutOfResources
from triton.runtime.driver import driver

from lance_kernels.ops._prepared import prepared

MIN_SIDE = 16  # least side of a matrix product on the matrix units
MAX_ALIGN_BYTES = 16  # widest load of a thread

# Multiprocessors that a launch should fill twice. A constant: the order of sums must not depend on the device.
PROGRAMS = 264
# Partial sums may take this share of the streamed tensor, or this many bytes.
WORKSPACE_SHARE, WORKSPACE_BYTES = 0.05, 8 * 2**20


Result = TypeVar("Result")


class Tile(NamedTuple):
    """Block sizes of a launch.

    Attributes:
        stream: rows of the streamed tensor, the long side of the matrix product.
        sum: terms of the sum taken at once.
        warps: warps of a program.
        stages: loads in flight.
        blocks: blocks of `stream` rows that share what is read of a factor.
    """

    stream: int
    sum: int
    warps: int
    stages: int
    blocks: int = 1

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return self.stream * self.blocks


# Registers of a thread that accumulators may take, found by compiling; the rest is for addresses and operands.
MAX_REGISTERS, MAX_REGISTERS_BEFORE_HOPPER = 160, 80
MAX_REREADS = 0.55

# The tile of every launch so far, by kernel, compute capability and shape.
CHOSEN: dict[tuple[str, tuple[Hashable, ...]], Tile] = {}
# Tiles that take the place of the chosen ones, by kernel; for tuning.
FORCED: dict[str, Tile] = {}


def launch_fitting(
    kernel: str,
    shape: tuple[Hashable, ...],
    variant: tuple[Hashable, ...],
    tiles_for: Callable[..., Sequence[Tile]],
    launch: Callable[[Tile], Result],
) -> Result | None:
    """Launches with the first of a shape's tiles for which the GPU has the shared memory, and keeps it in `CHOSEN`.

    How much a kernel takes is known when it is compiled, no sooner.

    Args:
        kernel: its name; a tile in `FORCED` goes first.
        shape: what the tiles follow from.
        variant: what a kernel is compiled for besides, such as dtype and alignment.
        tiles_for: `tiles_for(*shape)` lists the tiles, the preferred one first.
        launch: starts the kernel with a tile.

    Returns:
        What `launch` returns; None where no tile fits, and nothing was launched.
    """
    if kernel in FORCED:
        return launch(FORCED[kernel])
    key = (kernel, (capability(), *shape, *variant))

    def tried() -> Iterator[Tile]:
        if key in CHOSEN:
            yield CHOSEN[key]
        yield from tiles_for(*shape)

    for tile in tried():
        try:
            result = launch(tile)
        except OutOfResources:
            continue
        CHOSEN[key] = tile
        return result
    return None


def capability() -> int:
    """Compute capability, times ten, of the GPU that kernels are compiled for; Hopper's for the interpreter."""
    return 90 if triton.knobs.runtime.interpret else _capability(driver.active.get_current_device())


@functools.cache
def _capability(device: int) -> int:
    return int(driver.active.get_current_target().arch)


def has_wide_units() -> bool:
    """Whether matrix units read their operands from shared memory: data centre GPUs from Hopper on."""
    return capability() in (90, 100, 103)


def by_preference(
    tiles: Sequence[Tile],
    *,
    registers: Callable[[Tile], float],
    shared: Callable[[Tile], float],
    rereads: Callable[[Tile], float],
) -> list[Tile]:
    """Tiles as a launch tries them: first those that fit registers and shared memory and read factors seldom enough.

    Args:
        tiles: tiles in order of preference otherwise.
        registers: registers of a thread that a tile's accumulators and operands take.
        shared: bytes of shared memory that a tile takes, roughly.
        rereads: elements of factors a tile reads for each streamed element.
    """
    room = MAX_REGISTERS if has_wide_units() else MAX_REGISTERS_BEFORE_HOPPER

    def place(tile: Tile) -> tuple[float, float, bool]:
        return max(shared(tile), shared_memory()), max(registers(tile), room), rereads(tile) > MAX_REREADS

    return sorted(tiles, key=place)


def shared_memory() -> int:
    """Bytes of shared memory that a program can have."""
    return (227 if has_wide_units() else 163 if capability() == 80 else 99) * 1024


def stages_for(stage_bytes: int, other_bytes: int = 0) -> int:
    """Loads in flight for which the shared memory suffices, with some to spare for what changes its layout."""
    room = shared_memory() - 32 * 1024 - other_bytes
    return max(2, min(4, room // stage_bytes))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`; `triton.cdiv`, made for kernels too, takes ten times as long."""
    return -(-size // block)


def next_power_of_two(size: int) -> int:
    """The least power of two that is not below `size`; faster than Triton's, as `cdiv` is."""
    return 1 << (size - 1).bit_length()


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size` and `MIN_SIDE`."""
    return max(MIN_SIDE, next_power_of_two(size))


def alignment(itemsize: int, *extents: int) -> int:
    """The largest power of two, in elements, that divides all `extents` and makes a load of at most 16 bytes."""
    align = MAX_ALIGN_BYTES // itemsize
    while any(extent % align for extent in extents):
        align //= 2
    return align


def matmul_precision(dtype: torch.dtype) -> str:
    """Triton's name of the precision that PyTorch allows products of `dtype`."""
    return _precision(dtype, torch.backends.cuda.matmul)


def convolution_precision(dtype: torch.dtype) -> str:
    """The same for convolutions."""
    return _precision(dtype, torch.backends.cudnn.conv)  # type: ignore[attr-defined]


def _precision(dtype: torch.dtype, products: Any) -> str:
    # Sums of 16-bit products are multiplied on in float32: TF32 has the mantissa of float16, and bits to spare for
    # bfloat16.
    tf32 = products.fp32_precision == "tf32" if dtype == torch.float32 else dtype == torch.bfloat16
    return "tf32" if tf32 else "tf32x3"


def splits_for(programs: int, tiles: int, partial_bytes: int, streamed_bytes: int) -> int:
    """Into how many partial sums a reduction is split: by the shape alone, within the workspace's bound.

    Args:
        programs: programs there are without splitting.
        tiles: tiles there are to share out.
        partial_bytes: bytes of one set of partial sums.
        streamed_bytes: bytes of the streamed tensor.
    """
    wanted = min(tiles, PROGRAMS // max(programs, 1) if 3 * programs < PROGRAMS else 1)
    bound = max(WORKSPACE_BYTES, int(WORKSPACE_SHARE * streamed_bytes)) // max(partial_bytes, 1)
    return max(1, min(wanted, bound))


def nearest_tf32(values: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to the ten bits of mantissa of TF32, beyond which matrix units ignore the rest."""
    near = (values.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(values.isnan(), values, near.view(torch.float32))


@triton.jit
def nearest(values, PRECISION: tl.constexpr):
    """Operand of a product in `PRECISION`: float32 rounded to TF32 where the matrix units would cut it off."""
    if PRECISION == "tf32" and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        near = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # The bits of a NaN may carry over into the sign.
        values = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, values, near)
    return values


def kronecker(
    factors: Sequence[torch.Tensor], dtype: torch.dtype, columns: int, precision: str = "ieee"
) -> torch.Tensor:
    """The Kronecker product of factors, with zero columns added.

    Args:
        factors: one or more `(size, rank)` matrices; the last one's rows vary fastest.
        dtype: dtype of the result.
        columns: columns of the result, at least the product of the ranks.
        precision: precision of the products it is for; for TF32, a float32 result is rounded to it.

    Returns:
        `(product of sizes, columns)`, contiguous.
    """
    rounds = dtype == torch.float32 and precision == "tf32"

    def make() -> torch.Tensor:
        product = factors[0].float()
        for factor in factors[1:]:
            product = product[:, None, :, None] * factor.float()[None, :, None, :]
            product = product.reshape(math.prod(product.shape[:2]), -1)
        padded = torch.zeros(product.shape[0], columns, dtype=dtype, device=product.device)
        padded[:, : product.shape[1]] = product
        return nearest_tf32(padded) if rounds else padded

    return prepared(factors, ("kronecker", dtype, columns, rounds), make)
