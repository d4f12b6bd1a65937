"""`NullSpacePlugin` in the real Avalanche."""

from __future__ import annotations

import subprocess
import sys

from tests.integrations.avalanche_run import ROOT


def test_two_experiences_are_two_tasks() -> None:
    for library in ("avalanche", "torchvision"):
        assert (ROOT / "build" / library).is_dir(), f"`make test` installs {library}; so does `make build/{library}`"
    command = [sys.executable, "-m", "tests.integrations.avalanche_run"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "held"
