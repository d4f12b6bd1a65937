"""Loads the compiled operator libraries and tells what was built.

A library that is absent leaves the reference implementations in place; one that is there but does not load is an error.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from pathlib import Path

import torch

_DIRECTORY = Path(__file__).parent
_LOADED: dict[str, Path] = {}


def _library(name: str) -> Path | None:
    override = os.environ.get(f"{name.upper()}_LIBRARY")
    path = Path(override) if override else _DIRECTORY / f"{name}.so"
    return path if override or path.exists() else None


def load_libraries() -> None:
    """Loads `lance_cpu.so` and, where PyTorch has CUDA, `lance_cuda.so` from the package's directory.

    `LANCE_CPU_LIBRARY` and `LANCE_CUDA_LIBRARY` name other files to load in their place.

    Raises:
        ImportError: a library is there but does not load; the message says which and why.
    """
    for name in ("lance_cpu", "lance_cuda") if torch.version.cuda else ("lance_cpu",):
        path = _library(name)
        if path is None or name in _LOADED:
            continue
        try:
            torch.ops.load_library(str(path))
        except Exception as error:
            raise ImportError(
                f"{path} is there but does not load: {error}. Rebuild it against PyTorch {torch.__version__} "
                "(`make build`, or `pip install` again), or remove it to run the reference implementations."
            ) from error
        _LOADED[name] = path


def build_info() -> dict[str, str | None]:
    """What was compiled, and what runs.

    Returns:
        `version` of the package; `torch`, the running one; `cpu_library` and `cuda_library`, the files loaded, or None;
        `cpu_capability`, the instruction set the CPU kernels chose on this machine; `compiler`, `cxx_standard`,
        `built_with_torch` and `minimum_torch` of the libraries; `pure_python_reason`, why there are none, if the
        installation recorded it.
    """
    from importlib.metadata import PackageNotFoundError, version

    built = ("compiler", "cxx_standard", "built_with_torch", "minimum_torch")
    loaded = ("version", "torch", "cpu_library", "cuda_library", "cpu_capability")
    info: dict[str, str | None] = dict.fromkeys((*loaded, *built, "pure_python_reason"))
    info["torch"] = torch.__version__
    try:
        info["version"] = version("lance_kernels")
    except PackageNotFoundError:
        info["version"] = None
    for name, path in _LOADED.items():
        info[f"{name.removeprefix('lance_')}_library"] = str(path)
    if "lance_cpu" in _LOADED:
        capability = ctypes.CDLL(str(_LOADED["lance_cpu"])).lance_cpu_capability
        capability.restype = ctypes.c_char_p
        info["cpu_capability"] = capability().decode()
    if _LOADED and any(_DIRECTORY.glob("_build_info.*.so")):
        module = importlib.import_module("lance_kernels._build_info")
        for key in built:
            info[key] = str(getattr(module, key))
    reason = _DIRECTORY / "_pure_python.txt"
    if not _LOADED and reason.exists():
        info["pure_python_reason"] = reason.read_text().strip()
    return info


load_libraries()
