"""`python -m benchmarks.gpu`: ceilings, kernels and steps on a GPU; each case's rows are written when it is done."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.environment import ROOT
from benchmarks.gpu import device, dram
from benchmarks.gpu.cases import SUITE
from benchmarks.gpu.models import MODEL_CASES
from benchmarks.registry import Context
from benchmarks.results import Results, Row
from benchmarks.tables import generic_tables
from lance_kernels.kernels import _common


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    arguments.add_argument("--case", default="*", metavar="GLOB", help="measure the cases whose name matches")
    arguments.add_argument("--models", action="store_true", help="measure whole models too")
    arguments.add_argument("--seconds", type=float, default=200, help="start no case after so long (default 200)")
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the suite out")
    arguments.add_argument("--quick", action="store_true", help="tiny sizes: a trial, not a result")
    arguments.add_argument("--output", type=Path, help="file of results (default benchmarks/results/gpu/DEVICE.json)")
    arguments.add_argument(
        "--tile", nargs="+", metavar="KERNEL=STREAM,SUM,WARPS,STAGES[,BLOCKS]", help="use these tiles; for tuning"
    )
    arguments.add_argument("--profile", action="store_true", help="print what every method launches, and for how long")
    arguments.add_argument("--dram", action="store_true", help="count the bytes read from memory with ncu instead")
    arguments.add_argument("--list", action="store_true", help="list the cases and stop")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(argv)
    names = [name for name in SUITE.select(options.case) if options.models or not name.startswith(MODEL_CASES)]
    if options.list or not names:
        print(*(names or [f"no case matches {options.case!r}"]), sep="\n")
        return 0 if names else 2
    if options.device == "cpu" and not options.quick:
        print("--device cpu tries the suite out: add --quick", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("this PyTorch sees no GPU; --device cpu --quick tries the suite out", file=sys.stderr)
        return 2
    if options.dram:
        return dram.report()
    for entry in options.tile or ():
        kernel, numbers = entry.split("=")
        _common.FORCED[kernel] = _common.Tile(*map(int, numbers.split(",")))
    device.profiled = options.profile
    here = environment.current(options.device)
    path = options.output or _results_path(here.hardware, options.quick)
    torch.backends.cudnn.benchmark = True  # the dense layers' fastest algorithms
    failed = _measure(names, options, here, path)
    _show(path, names)
    for (kernel, shape), tile in _common.CHOSEN.items():
        print(f"tile of {kernel} for {shape}: {tuple(tile)}")
    return 1 if failed else 0


def _results_path(hardware: str, quick: bool) -> Path:
    folder = ROOT / ("build/benchmarks" if quick else "benchmarks/results") / "gpu"
    return folder / (re.sub(r"\W+", "-", hardware).strip("-") + ".json")


def _measure(names: list[str], options: argparse.Namespace, here: environment.Environment, path: Path) -> list[str]:
    """Measures the cases; returns those that failed."""
    start, failed = time.perf_counter(), []
    rows = {} if not path.exists() else _by_case(Results.read(path).rows)
    for name in names:
        if time.perf_counter() - start > options.seconds:
            print(f"out of time before {name}; --case measures it alone", file=sys.stderr)
            break
        began = time.perf_counter()
        torch.manual_seed(0)
        try:
            rows[name] = SUITE.cases[name](Context(SUITE.name, name, here, quick=options.quick, device=options.device))
        except Exception as error:  # Triton's are no RuntimeErrors
            failed.append(name)
            print(f"FAILED {name}: {type(error).__name__}: {error}", file=sys.stderr)
            if isinstance(error, torch.AcceleratorError):
                break  # nothing runs on the device any more
            continue
        if options.device == "cuda":
            torch.cuda.empty_cache()
        Results(SUITE.name, SUITE.command, [row for case in SUITE.cases for row in rows.get(case, [])]).write(path)
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return failed


def _by_case(rows: list[Row]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def _show(path: Path, names: list[str]) -> None:
    if not path.exists():
        return
    rows = [row for row in Results.read(path).rows if row.case in names]
    for table in generic_tables(rows):
        print(table.markdown())
    print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
