"""What a measurement depends on besides the code under test: hardware, threads, versions and commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MEASURED_PATHS = ("lance_kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results")


@dataclass(frozen=True)
class Environment:
    """Fields that every row of results carries.

    Attributes:
        device: type of the device measured, `cpu` or `cuda`.
        hardware: the processor's or the accelerator's model name.
        threads: threads PyTorch used within an operator.
        wait_policy: `OMP_WAIT_POLICY`, how idle threads wait.
        torch: version of PyTorch.
        python: version of Python.
        lance: version of `lance_kernels`.
        kernels: `reference`, or the instruction set for which the compiled kernels ran.
        commit: what LANCE_COMMIT says, else the hash of the checked-out commit; outside a checkout `unknown`.
        dirty: whether measured files differed from that commit.
    """

    device: str
    hardware: str
    threads: int
    wait_policy: str
    torch: str
    python: str
    lance: str
    kernels: str
    commit: str
    dirty: bool

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def current(device: str = "cpu") -> Environment:
    """The environment of this process, with the number of threads set at the moment."""
    commit, difference = code_state()
    return Environment(
        device=device,
        hardware=torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        threads=torch.get_num_threads(),
        wait_policy=os.environ.get("OMP_WAIT_POLICY", "default").lower(),
        torch=torch.__version__,
        python=platform.python_version(),
        lance=_package_version(),
        kernels=_kernels(),
        commit=commit,
        dirty=bool(difference),
    )


@cache
def processor_name() -> str:
    """Model name of the processor, as the operating system tells it, with the number of logical processors."""
    name, count = platform.processor() or platform.machine(), 0
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    fields = [line.split(":", 1) for line in lines if ":" in line]
    models = [value.strip() for key, value in fields if key.strip() == "model name"]
    family = {key.strip(): value.strip() for key, value in fields}
    count = len(models)
    if not models:
        return name
    return (
        f"{models[0]} (family {family.get('cpu family', '?')}, model {family.get('model', '?')}), "
        f"{count} logical processors"
    )


def code_state() -> tuple[str, str]:
    """The commit LANCE_COMMIT names, else the checked-out one; and a digest of how measured files differ from it."""
    if named := os.environ.get("LANCE_COMMIT"):
        return named, ""
    try:
        commit = _git("rev-parse", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", *MEASURED_PATHS)
        difference = _git("diff", "HEAD", "--", *MEASURED_PATHS)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", ""
    return commit, hashlib.sha256((changed + difference).encode()).hexdigest() if changed else ""


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True, errors="replace"
    ).stdout


def _package_version() -> str:
    try:
        return metadata.version("lance_kernels")
    except metadata.PackageNotFoundError:
        return "uninstalled"


def _kernels() -> str:
    from lance_kernels._extension import build_info

    info = build_info()
    return f"compiled, {info['cpu_capability']}" if info["cpu_library"] else "reference"
