"""Two measurements of a suite beside each other: `python -m benchmarks --compare REF`."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.results import Results, Row
from benchmarks.tables import Table, significant, value_text

Key = tuple[str, str, str]


def earlier(reference: str, suite: str, root: Path = ROOT) -> list[Row]:
    """Rows of a suite as they were.

    Args:
        reference: a results file, or a revision of git that has one for the suite in `benchmarks/results`.
        suite: the suite's name.
        root: the repository.

    Raises:
        ValueError: there is neither, or the file holds no results of the suite.
    """
    path = Path(reference)
    if path.is_file():
        found = Results.read(path)
    else:
        name = f"{reference}:benchmarks/results/{suite}/results.json"
        answer = subprocess.run(["git", "-C", str(root), "show", name], capture_output=True, check=False)
        if answer.returncode:
            reason = answer.stderr.decode(errors="replace").strip()
            raise ValueError(f"--compare: {reference!r} is no file, and git has no {name} ({reason})")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "results.json"
            copy.write_bytes(answer.stdout)
            found = Results.read(copy)
    if found.suite != suite:
        raise ValueError(f"--compare: {reference} has results of the suite {found.suite!r}; expected {suite!r}")
    return found.rows


def comparison(before: Sequence[Row], now: Sequence[Row], reference: str) -> Table:
    """Every value that both have, and the later over the earlier; ratios to a baseline beside each other, too.

    Args:
        before: the earlier rows.
        now: the later rows.
        reference: what the earlier rows are called.
    """
    table = Table(
        f"Compared with {reference}",
        ("case", "method", "quantity", reference, "now", "now over it", "ratio then", "ratio now"),
    )
    old: dict[Key, Row] = {(row.case, row.method, row.quantity): row for row in before}
    matched = 0
    for row in now:
        earlier_row = old.get((row.case, row.method, row.quantity))
        if earlier_row is None:
            continue
        matched += 1
        ratio = significant(row.median / earlier_row.median) if earlier_row.median else "-"
        ratios = ["" if r.ratio_median is None else significant(r.ratio_median) for r in (earlier_row, row)]
        values = [value_text(r.median, r.unit) for r in (earlier_row, row)]
        table.rows.append((row.case, row.method, row.quantity, *values, ratio, *ratios))
    table.caption = f"{matched} of {len(now)} values now and of {len(before)} then are compared."
    hardware = {row.environment["hardware"] for row in (*before, *now)}
    if len(hardware) > 1:
        table.caption += " Measured on different hardware: " + "; ".join(sorted(hardware)) + "."
    return table
