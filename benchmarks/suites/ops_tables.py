"""How the rows of the suite `ops` are shown."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    environment_text,
    missed,
    new_figure,
    ratio_text,
    save_figure,
    significant,
    value_text,
)


def tables(rows: list[Row]) -> list[Table]:
    """One line an operator: time at the largest size, over the naive form and the floor, and the slope."""
    table = Table(
        "Operators on the largest input: time, over the naive form, over the counted floor; slope over 1 to 64 times",
        ("operator", "time", "over naive", "over floor", "slope", "target of the slope"),
    )
    for case in dict.fromkeys(row.case for row in rows):
        found = {row.quantity: row for row in rows if row.case == case and row.method == "lance"}
        time, floor, slope = found["time"], found["time over floor"], found["slope"]
        target = (
            "" if slope.target is None else f"at most {slope.target:g}" + (", missed" if missed(slope) else ", met")
        )
        spread = f"{significant(slope.median)} ({significant(slope.p10)} to {significant(slope.p90)})"
        table.rows.append((case, value_text(time.median, "s"), ratio_text(time), ratio_text(floor), spread, target))
    table.caption = (
        "Naive: PyTorch's namesake, or the dense computation in plain PyTorch. Floor: the larger of bytes over the "
        "speed of a copy and operations over the speed of a matrix product, both measured in the same rounds.\n"
        + environment_text(rows)
    )
    return [table]


def plot(rows: list[Row], path: Path) -> None:
    """Time over elements, a line an operator."""
    figure, axes = new_figure(width=10.0, height=5.5)
    for row in rows:
        if row.quantity == "slope":
            label = f"{row.case}, slope {row.median:.2f}"
            axes.loglog(row.details["elements"], row.details["seconds"], marker=".", label=label)
    axes.set_xlabel("elements of the input")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)
