"""The CUDA sources compile for the GPUs there are, wherever nvcc is found, and multiply on the matrix units."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from tests.kernels.compiled import TOOLS

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def nvcc() -> str | None:
    """The compiler of CUDA_HOME, of PATH, or of pip's packages."""
    wheel = find_spec("nvidia")
    homes = [
        os.environ.get("CUDA_HOME"),
        *(f"{path}/cu13" for path in (wheel and wheel.submodule_search_locations) or ()),
    ]
    named = [f"{home}/bin/nvcc" for home in homes if home]
    return next((path for path in (shutil.which(name) for name in [*named, "nvcc"]) if path), None)


def unpreloaded() -> dict[str, str]:
    """The environment without a sanitizer's library, which is for this process and not for compilers."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def test_there_are_sources():
    assert SOURCES


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_compiles_for_ampere_and_hopper(source, tmp_path):
    text = (ROOT / "setup.py").read_text()
    version = re.search(r'TORCH_TARGET_VERSION = "(0x\w+)"', text)
    assert version is not None
    compiled = tmp_path / "source.o"
    command = [nvcc(), "-c", source, "-o", compiled, "-std=c++20", "-O3", "--threads", "2", *COMMON_NVCC_FLAGS]
    command += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={version.group(1)}", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    command += [option for path in include_paths() for option in ("-isystem", path)]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=unpreloaded(), timeout=600)
    assert answer.returncode == 0, answer.stderr
    spills = re.findall(r"(\d+) bytes spill stores", answer.stderr)
    assert spills
    assert set(spills) == {"0"}
    code = subprocess.run([TOOLS / "cuobjdump", "-sass", compiled], capture_output=True, text=True, check=True).stdout
    for capability in (80, 90):
        assert f"sm_{capability}" in code
    for instruction in ("HMMA.16816.F32.BF16", "DMMA", "LDGSTS.E.BYPASS.128"):  # matrix units, copies of 16 bytes
        assert instruction in code
