"""`python -m benchmarks`: measures suites and writes their results, tables and plots."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import readme, suites
from benchmarks.compare import comparison, earlier
from benchmarks.environment import ROOT
from benchmarks.registry import SUITES
from benchmarks.runner import Options, existing, run


def parser() -> argparse.ArgumentParser:
    """The command line."""
    measured = [name for name, suite in SUITES.items() if suite.cases]
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=suites.__doc__)
    arguments.add_argument(
        "--suite", action="append", choices=measured, help="suite to run; all when absent; repeatable"
    )
    arguments.add_argument("--case", default="*", metavar="GLOB", help="run the cases whose name matches")
    arguments.add_argument(
        "--quick", action="store_true", help="small sizes and few rounds: a smoke test, not a result"
    )
    arguments.add_argument("--threads", type=int, default=2, help="threads within an operator (default 2)")
    arguments.add_argument("--seed", type=int, default=0, help="seed of random numbers (default 0)")
    arguments.add_argument(
        "--output", type=Path, help="folder of the results (default benchmarks/results; build/benchmarks with --quick)"
    )
    arguments.add_argument(
        "--data", type=Path, help="images for the suites that take real ones: an npz file or a data set's folder"
    )
    arguments.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure (default cpu)")
    arguments.add_argument(
        "--backbone", metavar="NAME", help="pretrained network of timm or torchvision for the suite finetune"
    )
    arguments.add_argument(
        "--compare", metavar="REF", help="git revision or results file; prints what was measured then, now, and ratios"
    )
    arguments.add_argument("--restart", action="store_true", help="forget what an interrupted run has measured")
    arguments.add_argument("--list", action="store_true", help="list suites and cases and stop")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from rich.console import Console

    options = parser().parse_args(argv)
    chosen = options.suite or [name for name, suite in SUITES.items() if suite.cases]
    if options.list:
        for name in chosen:
            print(name, *(f"  {case}" for case in SUITES[name].select(options.case)), sep="\n")
        return 0
    output = options.output or (ROOT / "build" / "benchmarks" if options.quick else ROOT / "benchmarks" / "results")
    console = Console()
    matching = [name for name in chosen if SUITES[name].select(options.case)]
    if not matching:
        print(f"no case of {', '.join(chosen)} matches {options.case!r}; see --list", file=sys.stderr)
        return 2
    for name in matching:
        settings = Options(
            output,
            options.case,
            options.quick,
            options.threads,
            options.seed,
            options.restart,
            options.data,
            options.device,
            options.backbone,
        )
        try:
            existing(SUITES[name], output)
            before = earlier(options.compare, name) if options.compare else None
            if options.device not in SUITES[name].devices:
                raise ValueError(
                    f"suite {name} runs on {', '.join(SUITES[name].devices)}; got --device {options.device}"
                )
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        rows = run(SUITES[name], settings)
        readme.update(output)
        for table in SUITES[name].tables(rows):
            console.print(table.rich())
        if before is not None:
            console.print(comparison(before, rows, options.compare).rich())
        console.print(f"written to {output / name}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on at the next case", file=sys.stderr)
        sys.exit(130)
