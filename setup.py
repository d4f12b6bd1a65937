"""Builds the compiled libraries from everything under csrc/; the rest of the package is described in pyproject.toml.

Environment variables:
    LANCE_REQUIRE_EXT=1: fail where the default is a pure Python install (no PyTorch, no C++ compiler).
    LANCE_BUILD_EXT=0: pure Python install without trying.
    CXX, CFLAGS, MAX_JOBS: compiler, extra flags, parallel jobs, as usual.
    TORCH_CUDA_ARCH_LIST: GPUs to compile for; by default those of this machine, and without one `ARCHITECTURES`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# PyTorch 2.11, the oldest that the stable ABI calls made here exist in.
TORCH_TARGET_VERSION = "0x020b000000000000"
# PyTorch compiles for the GPUs it sees, and fails where it sees none.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
REASON_FILE = "_pure_python.txt"


class NotBuildableError(Exception):
    """Why the compiled libraries cannot be built here."""


def import_torch() -> Any:
    """Imports torch; in an isolated build, from the interpreter that started the build."""
    try:
        import torch
    except ImportError:
        sys.path.append(str(outer_site_packages()))
        import torch
    return torch


def outer_site_packages() -> Path:
    """Directory that holds the torch of the environment the build was started from."""
    interpreters = [sys.executable]
    if "VIRTUAL_ENV" in os.environ:
        interpreters.append(os.path.join(os.environ["VIRTUAL_ENV"], "bin", "python"))
    # -I leaves out the paths that build isolation put in front.
    query = "import importlib.util as util; print(util.find_spec('torch').origin)"
    for interpreter in interpreters:
        answer = subprocess.run([interpreter, "-I", "-c", query], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return Path(answer.stdout.strip()).parent.parent
    raise NotBuildableError("PyTorch is not installed in the environment the build was started from")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise NotBuildableError(f"the C++ compiler {compiler!r} was not found (set CXX to use another)")


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def compiled() -> dict[str, Any]:
    """Arguments of `setup` that build the libraries.

    Raises:
        NotBuildableError: PyTorch or a compiler is missing.
    """
    check_compiler()
    try:
        import_torch()
        from torch.utils import cpp_extension
    except ImportError as error:
        raise NotBuildableError(f"PyTorch does not import: {error}") from error
    flags = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
    flags += ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # PyTorch's headers have unused parameters
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    extensions = [
        cpp_extension.CppExtension(
            "lance_kernels.lance_cpu",
            sources("cpu/*.cpp"),
            define_macros=macros,
            extra_compile_args=flags,
            py_limited_api=True,
        ),
        cpp_extension.CppExtension(
            "lance_kernels._build_info",
            sources("python/*.cpp"),
            define_macros=macros,
            include_dirs=pybind11_include(),
            extra_compile_args=flags,
        ),
    ]
    if sources("cuda/*.cu") and has_cuda(cpp_extension):
        if not import_torch().cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        extensions.append(
            cpp_extension.CUDAExtension(
                "lance_kernels.lance_cuda",
                sources("cuda/*.cu") + sources("cuda/*.cpp"),
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={
                    "cxx": flags,
                    "nvcc": ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"],
                },
                py_limited_api=True,
            )
        )

    class BuildLibraries(cpp_extension.BuildExtension):
        def get_ext_filename(self, fullname: str) -> str:
            # The operator libraries are loaded by torch.ops.load_library, they are no Python modules.
            if fullname.rpartition(".")[2] in ("lance_cpu", "lance_cuda"):
                return os.path.join(*fullname.split(".")) + ".so"
            return super().get_ext_filename(fullname)

    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildLibraries}}


def pybind11_include() -> list[str]:
    """pybind11's headers; without the package those that PyTorch, whose own directory is searched anyway, carries."""
    try:
        import pybind11
    except ImportError:
        return []
    return [pybind11.get_include()]


def has_cuda(cpp_extension: Any) -> bool:
    return import_torch().version.cuda is not None and cpp_extension.CUDA_HOME is not None


def pure_python(reason: str) -> dict[str, Any]:
    """Arguments of `setup` for an install without libraries, which keeps the reason for `build_info()`."""
    bar = "*" * 100
    message = f"lance_kernels is being installed WITHOUT its compiled kernels: {reason}."
    print(f"{bar}\n{message}\nEvery operator runs its PyTorch reference instead.\n{bar}", file=sys.stderr, flush=True)

    class KeepReason(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                path = Path(self.build_lib, "lance_kernels", REASON_FILE)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(reason + "\n")

    return {"cmdclass": {"build_py": KeepReason}}


def arguments() -> dict[str, Any]:
    if os.environ.get("LANCE_BUILD_EXT", "1") == "0":
        return pure_python("LANCE_BUILD_EXT is 0")
    try:
        if platform.system() == "Windows":
            raise NotBuildableError("the kernels are not built on Windows")
        return compiled()
    except NotBuildableError as error:
        if os.environ.get("LANCE_REQUIRE_EXT", "0") == "1":
            raise SystemExit(f"LANCE_REQUIRE_EXT is 1 and the compiled kernels cannot be built: {error}") from error
        return pure_python(str(error))


setup(**arguments())
