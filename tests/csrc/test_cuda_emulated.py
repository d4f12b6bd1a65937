"""The CUDA kernels' numbers without a GPU: their source, compiled for the CPU over a small emulation of CUDA."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from tests.csrc.test_cuda_sources import unpreloaded
from tests.ops.tensors import assert_near, lay_out

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent / "csrc" / "cuda" / "mode_gram.cu"
REGISTRATION = """
STABLE_TORCH_LIBRARY(lance_emulated, m) {
  m.def("mode_grams_(Tensor(a!)[] grams, Tensor x, int[] modes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(lance_emulated, CPU, m) { m.impl("mode_grams_", TORCH_BOX(&lance::mode_grams_)); }
"""


def for_the_cpu(source: str) -> str:
    """The source with its launches, its stream and its registration replaced, and groups of a few samples."""
    launch = re.compile(r"(\w+<[^;<>]*>)\s*<<<(.*?), kThreads, 0, stream>>>(\(.*?\));", re.DOTALL)
    source, launches = launch.subn(r"emulate(\2, kThreads, [&] { \1\3; });", source)
    assert launches == 2
    for old, new in (
        ("#include <cuda_pipeline.h>\n#include <cuda_runtime.h>\n#include <mma.h>\n", '#include "emulated_cuda.h"\n'),
        ("#include <torch/csrc/stable/accelerator.h>\n", ""),
        ("torch::stable::accelerator::DeviceGuard", "EmulatedGuard"),
        ("aoti_torch_get_current_cuda_stream", "emulated_stream"),
        ("kGroupBytes = 16 << 20", "kGroupBytes = 4096"),
    ):
        assert old in source
        source = source.replace(old, new)
    return source[: source.index("STABLE_TORCH_LIBRARY_IMPL")] + REGISTRATION


@pytest.fixture(scope="module")
def mode_grams_(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "source.cpp").write_text(for_the_cpu(SOURCE.read_text()))
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-w"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{HERE}", f"-I{SOURCE.parent}"]
    command += [option for path in include_paths() for option in ("-isystem", path)]
    command += [folder / "source.cpp", "-o", folder / "emulated.so", f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=unpreloaded(), timeout=300)
    assert answer.returncode == 0, answer.stderr
    torch.ops.load_library(str(folder / "emulated.so"))
    return torch.ops.lance_emulated.mode_grams_


@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((3, 70, 9), "contiguous", torch.bfloat16),
        ((3, 66, 5, 6), "channels_last", torch.float16),
        ((4, 20, 30), "sliced", torch.float32),
        ((2, 3, 4, 5, 13), "transposed", torch.float64),
        ((6, 130, 3), "expanded", torch.float32),
        ((1, 5), "contiguous", torch.bfloat16),
        ((2, 72, 16, 24), "contiguous", torch.bfloat16),
        ((3, 72, 6, 12), "channels_last", torch.bfloat16),
        ((2, 68, 14, 14), "contiguous", torch.float16),
        ((5, 20, 68), "contiguous", torch.float32),
        ((3, 36, 6, 10), "channels_last", torch.float32),
        ((3, 66, 34), "contiguous", torch.float64),
        ((3, 70, 5, 4), "channels_last", torch.float64),
    ],
)
def test_running_grams(mode_grams_, shape, layout, dtype):
    x = lay_out(torch.randn(shape).to(dtype), layout)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    before = [torch.randn(size, size, dtype=wide) for size in shape]
    grams = [gram.clone() for gram in before]
    mode_grams_(grams, x, list(range(len(shape))))
    for mode, (gram, start) in enumerate(zip(grams, before)):
        unfolded = x.double().movedim(mode, 0).reshape(shape[mode], -1)
        assert_near(gram, start.double() + unfolded @ unfolded.mT, terms=x.numel())
        added = gram - start
        assert (added - added.mT).abs().max() <= 1e-5 * gram.abs().max()
