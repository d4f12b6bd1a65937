"""`python -m benchmarks.readme`: puts the tables of `benchmarks/results` between the README's markers.

A pair of markers is `<!-- results: SUITE -->` and `<!-- end of results -->`; what lies between them is written here.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks import demo_tables, suites
from benchmarks.environment import ROOT
from benchmarks.gpu.cases import SUITE as GPU
from benchmarks.registry import SUITES
from benchmarks.results import Results
from benchmarks.runner import markdown, present

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- results: (?P<suite>\w+) -->\n.*?<!-- end of results -->", re.DOTALL)
SHOWN = (suites, demo_tables)  # importing them registers their suites


def render(text: str, results: Path = RESULTS, *, strict: bool = True) -> str:
    """`text` with every marked part made anew from the results.

    Args:
        text: the README.
        results: folder of the results.
        strict: refuse a marker without results; else leave what it marks.

    Raises:
        ValueError: a marker names an unknown suite, or one without results.
    """

    def part(match: re.Match[str]) -> str:
        name = match["suite"]
        if name == GPU.name:
            return _devices(match[0], results / name, strict)
        path = results / name / "results.json"
        if name in SUITES and not path.exists() and not strict:
            return match[0]
        if name not in SUITES or not path.exists():
            raise ValueError(f"README marks results of {name!r}; {path} is not there or no suite has that name")
        table = markdown(SUITES[name], Results.read(path).rows)
        image = f"![{name}](benchmarks/results/{name}/plot.png)"
        return f"<!-- results: {name} -->\n{table}\n{image}\n<!-- end of results -->"

    return MARKED.sub(part, text)


def _devices(part: str, folder: Path, strict: bool) -> str:
    """The marked part of the suite that writes a file a device."""
    files = sorted(folder.glob("*.json"))
    if not files and not strict:
        return part
    if not files:
        raise ValueError(f"README marks results of {GPU.name!r}; {folder} holds no file of a device")
    rows = [row for file in files for row in Results.read(file).rows]
    return f"<!-- results: {GPU.name} -->\n{markdown(GPU, rows)}<!-- end of results -->"


def update(output: Path) -> None:
    """Renders the README again after results were written to `output`, if those are the results that it shows."""
    if output.resolve() == RESULTS and README.exists():
        README.write_text(render(README.read_text(encoding="utf-8"), strict=False), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Writes the README, and the tables and plots beside the results; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README would change")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if options.check:
        if fresh != text:
            print("README.md differs from benchmarks/results; run python -m benchmarks.readme", file=sys.stderr)
        return int(fresh != text)
    for name, suite in SUITES.items():
        if (RESULTS / name / "results.json").exists():
            present(suite, RESULTS / name)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
