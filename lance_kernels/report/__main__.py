"""`python -m lance_kernels.report MODULE:FUNCTION [ARGUMENT ...]`: peak resident memory of training steps.

FUNCTION is called with the arguments, as strings, and returns `(model, sample, loss_fn)` as `report` takes them. Then
two training steps run (forward, backward, a plain SGD update), and one line of JSON tells by how much the resident set
of this process, fresh and with nothing else in it, rose above what it was before the first.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from lance_kernels._batches import run_model, to_device_of
from lance_kernels.report import default_loss


def peak_resident(model: torch.nn.Module, sample: Any, loss_fn: Any = None, steps: int = 2) -> dict[str, int]:
    """Runs training steps and tells what the process's resident set was.

    Args:
        model: the model to train; its parameters are updated.
        sample: a batch, as `report` takes it.
        loss_fn: scalar loss of the model's output; `default_loss` by default.
        steps: number of steps.

    Returns:
        `before`, `peak` and `above` (their difference), bytes.

    Raises:
        OSError: the system does not tell (only Linux does).
    """
    sample = to_device_of(model, sample)
    loss_of = loss_fn or default_loss
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    before = _start_peak()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss_of(run_model(model, sample)).backward()
        optimizer.step()
    peak = _status("VmHWM")
    return {"before": before, "peak": peak, "above": peak - before}


def _start_peak() -> int:
    """Gives freed memory back to the system, sets the peak to what is resident, and returns that."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no field {field}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lance_kernels.report", description=__doc__)
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="returns (model, sample, loss_fn)")
    parser.add_argument("arguments", nargs="*", help="passed to the function")
    parser.add_argument("--steps", type=int, default=2, help="training steps to run (default 2)")
    options = parser.parse_args(argv)
    module, _, name = options.target.partition(":")
    if not name:
        parser.error(f"the target is {options.target!r}; expected MODULE:FUNCTION")
    sys.path.insert(0, "")
    model, sample, loss_fn = getattr(importlib.import_module(module), name)(*options.arguments)
    print(json.dumps(peak_resident(model, sample, loss_fn, options.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
