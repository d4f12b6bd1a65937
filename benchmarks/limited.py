"""A fine-tuning that plain PyTorch cannot finish under a memory limit, and that compressed activations can.

`python -m benchmarks.limited` fine-tunes MobileNetV2 twice, each time in a process of its own whose address space is
limited (as `ulimit -v` does) to what it has when training begins plus a fixed amount.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import lance_kernels as lance
from benchmarks import environment
from benchmarks.models import natural_images
from benchmarks.suites.memory import prepared

OUT_OF_MEMORY = 3
METHODS = ("plain", "lance")


def fine_tune(method: str, megabytes: int, batch: int, size: int, steps: int, threads: int) -> int:
    """Fine-tunes under the limit, in this process; returns the exit status."""
    torch.set_num_threads(threads)
    images, few = natural_images(batch, size, 0), natural_images(4, size, 1)
    labels = torch.arange(batch) % 10
    model = prepared("MobileNetV2", few, "frozen")
    if method == "lance":
        lance.compress_(model)
        lance.calibrate(model, [few], progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + megabytes * 10**6, most))
    losses: list[float] = []
    try:
        for _ in range(steps):
            losses.append(step())
    except (MemoryError, RuntimeError) as error:
        said = (str(error).splitlines() or ["nothing"])[0]
    else:
        print(json.dumps({"finished": True, "steps": len(losses), "losses": losses}))
        return 0
    # Libraries name many reasons when they get no memory. It was that if the step passes without the limit.
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    step()
    error = f"out of memory: without the limit the step passes, with it: {said}"
    print(json.dumps({"finished": False, "steps": len(losses), "error": error}))
    return OUT_OF_MEMORY


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def run_both(arguments: Sequence[str]) -> dict[str, dict[str, object]]:
    """What each method came to in a process of its own."""
    results: dict[str, dict[str, object]] = {}
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.limited", "--method", method, *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=environment.ROOT)
        if answer.returncode not in (0, OUT_OF_MEMORY):
            raise RuntimeError(f"{' '.join(command)} failed:\n{answer.stderr}")
        results[method] = json.loads(answer.stdout.splitlines()[-1])
    return results


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 when ours finished."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limited", description=__doc__)
    parser.add_argument(
        "--megabytes", type=int, default=1200, help="address space that training may add (default 1200)"
    )
    parser.add_argument("--batch", type=int, default=32, help="images a step (default 32)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default 224)")
    parser.add_argument("--steps", type=int, default=3, help="steps to train (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads within an operator (default 2)")
    parser.add_argument("--method", choices=METHODS, help="run one method in this process")
    options = parser.parse_args(given)
    if options.method is not None:
        return fine_tune(options.method, options.megabytes, options.batch, options.size, options.steps, options.threads)
    results = run_both(given)
    for method, result in results.items():
        outcome = f"finished {result['steps']} steps, losses {result.get('losses')}"
        print(f"{method}: " + (outcome if result["finished"] else str(result["error"])))
    return 0 if results["lance"]["finished"] else 1


if __name__ == "__main__":
    sys.exit(main())
