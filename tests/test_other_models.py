"""Models that nobody here wrote, from `compress_` to `revert_`; what becomes of them is in docs/models.md."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.other_models import MODELS, PAGE, ROOT, TORCHVISION, check


def written():
    """The rows of the page, by model."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row[1:] for row in rows}


def assert_as_written(row):
    """What is compressed and what is left is as the page says; figures in bits may differ between machines."""
    assert row["compressed"] > 0
    assert written()[row["model"]][:3] == [str(row["compressed"]), str(row["shared"]), row["left"]]


@pytest.mark.parametrize("name", MODELS)
def test_everything(name):
    assert_as_written(check(name))


def test_everything_of_torchvision():
    """In a process of its own: beside a PyTorch for the CPU its wheel changes what others import."""
    assert TORCHVISION.is_dir(), "`make test` installs torchvision; so does `make build/torchvision`"
    command = [sys.executable, "-m", "tests.other_models", "--torchvision"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    assert {row["model"] for row in rows} == {name for name in written() if name.startswith("torchvision ")}
    for row in rows:
        assert_as_written(row)
