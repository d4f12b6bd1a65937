"""Makes Triton's interpreter as strict as a GPU, or stricter, and counts what kernels load and store.

Within `strict()`, for kernels of a process started with `TRITON_INTERPRET=1`:

- bfloat16 operands of a dot are widened (the interpreter multiplies their bits) and float32 ones cut off, as matrix
  units do, to what `input_precision` leaves of them; conversions to bfloat16 round to nearest, and back leave
  the smallest numbers what they are; bfloat16 arithmetic is refused;
- a masked load without `other`, a dot with a side under 16, an address outside the arguments, and an element that two
  programs store are refused;
- programs run in shuffled order;
- new tensors are filled with NaN, and how often each element of named arguments is loaded is kept.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

LEAST_DOT = 16


class StrictError(RuntimeError):
    """What a GPU would not do, or not promise."""


@dataclass
class Region:
    """The memory that one tensor argument names.

    Attributes:
        start: address of the first element.
        size: bytes of an element.
        span: elements from the first to the last one, by the strides.
        loads: how often each of them was loaded; None when it is not counted.
        writers: program that stored each, -1 for none; None when it is not counted.
    """

    start: int
    size: int
    span: int
    loads: np.ndarray | None = None
    writers: np.ndarray | None = None

    def index(self, addresses: np.ndarray) -> np.ndarray:
        """Element numbers of those addresses that lie in the region."""
        inside = (addresses >= self.start) & (addresses < self.start + self.span * self.size)
        return (addresses[inside] - np.uint64(self.start)).astype(np.int64) // self.size


@dataclass
class Launch:
    """One launch: the kernel's name and its tensor arguments."""

    kernel: str
    regions: dict[str, Region]

    def loads(self, argument: str) -> np.ndarray:
        """How often each element of a counted argument was loaded."""
        counts = self.regions[argument].loads
        assert counts is not None, f"{argument} is not counted"
        return counts


@dataclass
class Machine:
    """What runs at the moment, and what ran."""

    counted: Collection[str]
    random: np.random.Generator
    launches: list[Launch] = field(default_factory=list)
    order: np.ndarray | None = None
    program: int = 0

    def access(self, addresses: np.ndarray, mask: np.ndarray, stores: bool) -> None:
        """Refuses addresses outside the arguments, and a second store; counts."""
        wanted = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(addresses.shape, mask.shape)).astype(bool)
        ]
        launch, found = self.launches[-1], 0
        for name, region in launch.regions.items():
            index = region.index(wanted)
            found += len(index)
            if not stores and region.loads is not None:
                np.add.at(region.loads, index, 1)
            if stores and region.writers is not None:
                before = region.writers[index]
                if ((before >= 0) & (before != self.program)).any():
                    raise StrictError(f"{launch.kernel}: two programs store the same element of {name}")
                region.writers[index] = self.program
        if found < len(wanted):
            kind = "stores to" if stores else "loads from"
            raise StrictError(f"{launch.kernel} {kind} an address outside its arguments {list(launch.regions)}")


def _region(tensor: torch.Tensor, counted: bool) -> Region:
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    region = Region(tensor.data_ptr(), tensor.element_size(), span if tensor.numel() else 0)
    if counted:
        region.loads = np.zeros(region.span, dtype=np.int64)
        region.writers = np.full(region.span, -1, dtype=np.int64)
    return region


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest, ties to even."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()


def _widened(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float64 if handle.data.dtype == np.float64 else np.float32)


def cut_off(values: np.ndarray) -> np.ndarray:
    """float32 of which only the ten bits of mantissa that TF32 has are left: all that matrix units read."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _nearest(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return cut_off((bits + np.uint32(0x1000)).view(np.float32))


def _dot(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: int
) -> TensorHandle:
    if min(*a.data.shape[-2:], b.data.shape[-1]) < LEAST_DOT:
        raise StrictError(f"dot of {a.data.shape} and {b.data.shape}; expected sides of at least {LEAST_DOT}")
    left, right = _widened(a), _widened(b)
    name = str(precision).rsplit(".", 1)[-1].lower()
    if a.dtype.scalar != tl.float32 or name == "ieee":
        product = np.matmul(left, right)
    elif name == "tf32":
        product = np.matmul(cut_off(left), cut_off(right))
    elif name == "tf32x3":
        # Triton rounds the high parts; what is left of the low ones does not matter.
        high, other = _nearest(left), _nearest(right)
        low, rest = cut_off(left - high), cut_off(right - other)
        product = np.matmul(high, rest) + np.matmul(low, other) + np.matmul(high, other)
    else:
        raise StrictError(f"dot in {name}, whose rounding is not known here")
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _converting(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def cast(builder: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_bfloat16_bits(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return TensorHandle(_widened(src), tl.float32)
        return original(builder, src, dst_type)

    return cast


def _refusing_bfloat16(name: str, original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def operation(builder: InterpreterBuilder, *operands: TensorHandle) -> TensorHandle:
        if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            raise StrictError(f"{name} of bfloat16 values; expected them widened first")
        return original(builder, *operands)

    return operation


def _patches(machine: Machine) -> dict[tuple[type, str], Any]:
    """What replaces the interpreter's own functions, by class and name."""
    builder = InterpreterBuilder
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    grid_dim, grid_index, execute = builder.set_grid_dim, builder.set_grid_idx, GridExecutor.__call__

    def load(self: Any, ptr: TensorHandle, cache: Any, eviction: Any, volatile: Any) -> TensorHandle:
        mask = TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        machine.access(ptr.data, mask.data, stores=False)
        return masked_load(self, ptr, mask, None, cache, eviction, volatile)

    def load_masked(self: Any, ptrs: TensorHandle, mask: TensorHandle, other: Any, *rest: Any) -> TensorHandle:
        if other is None:
            raise StrictError(f"{machine.launches[-1].kernel}: a masked load without `other`")
        machine.access(ptrs.data, mask.data, stores=False)
        return masked_load(self, ptrs, mask, other, *rest)

    def store_masked(self: Any, ptrs: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> Any:
        machine.access(ptrs.data, mask.data, stores=True)
        return masked_store(self, ptrs, value, mask, *rest)

    def set_grid_dim(self: Any, *sizes: int) -> None:
        machine.order = machine.random.permutation(int(np.prod(sizes)))
        grid_dim(self, *sizes)

    def set_grid_index(self: Any, *index: int) -> None:
        assert machine.order is not None
        machine.program = int(machine.order[np.ravel_multi_index(index, self.grid_dim)])
        grid_index(self, *map(int, np.unravel_index(machine.program, self.grid_dim)))

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        known = inspect.getfullargspec(self.fn).args
        named = inspect.getcallargs(self.fn, *args, **{key: value for key, value in kwargs.items() if key in known})
        tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        regions = {name: _region(tensor, name in machine.counted) for name, tensor in tensors.items()}
        machine.launches.append(Launch(self.fn.__name__, regions))
        execute(self, *args, **kwargs)

    patches: dict[tuple[type, str], Any] = {
        (builder, "create_load"): load,
        (builder, "create_masked_load"): load_masked,
        (builder, "create_masked_store"): store_masked,
        (builder, "create_dot"): _dot,
        (builder, "cast_impl"): _converting(builder.cast_impl),
        (builder, "set_grid_dim"): set_grid_dim,
        (builder, "set_grid_idx"): set_grid_index,
        (GridExecutor, "__call__"): call,
    }
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        patches[builder, name] = _refusing_bfloat16(name, getattr(builder, name))
    return patches


@contextmanager
def strict(counted: Collection[str] = (), seed: int = 0) -> Iterator[list[Launch]]:
    """Context of strict interpretation.

    Args:
        counted: kernels' arguments whose loads and stores are counted.
        seed: seed of the order of programs.

    Yields:
        The launches so far, in order.
    """
    machine = Machine(counted, np.random.default_rng(seed))
    patches = [mock.patch.object(owner, name, new) for (owner, name), new in _patches(machine).items()]
    for patch in patches:
        patch.start()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        yield machine.launches
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for patch in reversed(patches):
            patch.stop()
