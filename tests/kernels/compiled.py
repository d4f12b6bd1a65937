"""Compiles kernels for GPUs that are not there, through their own launchers, and reads the machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import OutOfResources
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class StubDriver:
    """Names a GPU to compile for; nothing can be launched on it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(eq=False)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: the kernel.
        capability: the GPU's compute capability, times ten.
        binary: what Triton made of it.
    """

    name: str
    capability: int
    binary: Any

    @functools.cached_property
    def sass(self) -> str:
        """The machine code, disassembled."""
        return self._tool("nvdisasm", "-c")

    @functools.cached_property
    def usage(self) -> dict[str, int]:
        """Registers, bytes of stack, and the like."""
        found = re.findall(r"([A-Z]+):(\d+)", self._tool("cuobjdump", "-res-usage"))
        return {key: int(value) for key, value in found}

    def _tool(self, name: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            answer = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
        return answer.stdout

    @property
    def instructions(self) -> int:
        """Instructions there are; a thread without loops and branches executes no more."""
        return len(re.findall(r"/\*[0-9a-f]{4,}\*/", self.sass))

    @functools.cached_property
    def load_bytes(self) -> list[int]:
        """Bytes a thread takes from global memory at once, by load instruction."""
        widths = []
        for line in self.sass.splitlines():
            found = re.search(r"\b(?:LDG|LDGSTS)\.[\w.]*", line)
            if found:
                parts = found.group().split(".")
                bits = [int(part) for part in parts if part in ("32", "64", "128")]
                narrow = 1 if {"U8", "S8"} & set(parts) else 2 if {"U16", "S16"} & set(parts) else 4
                widths.append(bits[0] // 8 if bits else narrow)
        return widths


def assert_without_spills(compiled: list[Compiled], least_bytes: int) -> None:
    """No kernel uses local memory, and each loads so many bytes at once somewhere."""
    for kernel in compiled:
        assert ".local" not in kernel.binary.asm["ptx"], kernel.name
    for kernel in {kernel.name: kernel for kernel in compiled}.values():
        assert kernel.usage["STACK"] == 0, kernel.name
        assert max(kernel.load_bytes) >= least_bytes, kernel.name


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Context in which launches compile for a GPU and start nothing.

    As on that GPU, a kernel that takes more shared memory than there is raises `OutOfResources`.

    Args:
        capability: compute capability times ten, as in 90.

    Yields:
        What has been compiled, in order of the launches.
    """
    done: list[Compiled] = []
    original: Callable[..., Any] = JITFunction.run

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = original(self, *args, grid=grid, warmup=True, **kwargs)
        if binary.metadata.shared > SHARED_MEMORY[capability]:
            raise OutOfResources(binary.metadata.shared, SHARED_MEMORY[capability], "shared memory")
        done.append(Compiled(self.fn.__name__, capability, binary))
        return binary

    before = driver._active
    driver.set_active(StubDriver(capability))
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield done
    finally:
        driver._active = before


def aligned(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """A tensor without memory of its own pages, `offset` elements behind a 16-byte boundary."""
    count = 1
    for size in shape:
        count *= size
    return torch.empty(count + 64, dtype=dtype)[offset : offset + count].view(shape)
