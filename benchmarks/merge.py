"""`python -m benchmarks.merge FILE...`: puts results measured in several folders, or on several machines, together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import readme
from benchmarks.registry import SUITES
from benchmarks.results import Results, Row
from benchmarks.runner import publish


def merge(files: list[Path], output: Path) -> list[str]:
    """Publishes the cases of results files; a case of a later file replaces that of an earlier one.

    Args:
        files: `results.json` files of any suites.
        output: folder in which each suite has a folder of results.

    Returns:
        Names of the suites that were written.

    Raises:
        ValueError: a file holds no results, or those of no known suite.
    """
    measured: dict[str, dict[str, list[Row]]] = {}
    for file in files:
        found = Results.read(file)
        if found.suite not in SUITES:
            raise ValueError(f"{file} has results of the suite {found.suite!r}; expected one of {sorted(SUITES)}")
        cases: dict[str, list[Row]] = {}
        for row in found.rows:
            cases.setdefault(row.case, []).append(row)
        measured.setdefault(found.suite, {}).update(cases)
    for suite, cases in measured.items():
        publish(SUITES[suite], output, cases)
    return list(measured)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results.json of a suite")
    parser.add_argument("--output", type=Path, default=readme.RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    try:
        suites = merge(options.files, options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    readme.update(options.output)
    print(f"written to {', '.join(str(options.output / suite) for suite in suites)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
