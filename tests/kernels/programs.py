"""Starts programs whose kernels Triton interprets: whether it does is decided when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def interpreted(module: str, *arguments: str) -> str:
    """Runs `tests.kernels.<module>` with Triton's interpreter and returns what it prints."""
    answer = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout.strip()
