"""How the rows of the suite `cpu` are shown: what was reached beside each target."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    environment_text,
    generic_plot,
    missed,
    new_figure,
    ratio_text,
    save_figure,
    significant,
    value_text,
)

QUESTIONS = {
    "weight gradient": "Projection plus weight gradient over the dense weight gradient",
    "whole step": "Whole step (forward pass, both gradients) over plain PyTorch",
    "projection": "Projection over the published layer's (a clone, then one `tensordot` a mode)",
    "over published": "Projection plus weight gradient over the published layer's",
    "calibration": "Calibration of a batch over a forward pass",
    "model step": "Whole training step of a model over plain PyTorch",
    "growth": "Growth: log-log slope of time over elements of the input, 1 to 64 times",
}


def tables(rows: list[Row]) -> list[Table]:
    """One table a question: the ratio that was reached beside its target."""
    found = []
    for question, title in QUESTIONS.items():
        chosen = [row for row in rows if row.case.split(":", 1)[0] == question]
        if chosen:
            found.append(_growth_table(title, chosen) if question == "growth" else _ratio_table(title, chosen))
    if found:
        found[-1].caption = "\n".join(
            part
            for part in (
                found[-1].caption,
                "Ratios are medians (10th to 90th percentile) over rounds in which all methods of a case ran side by "
                "side; float32, the batch mode kept.",
                environment_text(rows),
            )
            if part
        )
    return found


def _ratio_table(title: str, rows: list[Row]) -> Table:
    table = Table(title, ("case", "method", "time", "ratio", "target"))
    for row in rows:
        case = row.case.split(": ", 1)[1]
        target = "" if row.target is None else f"at most {row.target:g}" + (", missed" if missed(row) else ", met")
        baselines = {other.baseline for other in rows if other.case == row.case}
        ratio = "1" if row.method in baselines else ratio_text(row)
        table.rows.append((case, row.method, value_text(row.median, row.unit), ratio, target))
    notes = {row.details["note"]: None for row in rows if "note" in row.details}
    table.caption = "\n".join(notes)
    return table


def _growth_table(title: str, rows: list[Row]) -> Table:
    table = Table(title, ("kernel", "shortest", "longest", "slope", "target"))
    for row in (row for row in rows if row.quantity == "slope"):
        times = row.details["seconds"]
        table.rows.append(
            (
                row.case.split(": ", 1)[1],
                value_text(times[0], "s"),
                value_text(times[-1], "s"),
                f"{significant(row.median)} ({significant(row.p10)} to {significant(row.p90)})",
                "" if row.target is None else f"at most {row.target:g}" + (", missed" if missed(row) else ", met"),
            )
        )
    table.caption = (
        "Sizes are batches of 1 to 64. A result above 32 MiB, where glibc stops reusing memory, goes to fresh pages at "
        "every call; `fill of a new tensor` shows what that alone costs."
    )
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the ratios beside their targets; growth in `growth.png` beside it."""
    generic_plot([row for row in rows if row.target is not None and row.quantity == "time"], path)
    growth = [row for row in rows if row.quantity == "slope"]
    if growth:
        figure, axes = new_figure(width=10.0, height=4.5)
        for row in growth:
            label = f"{row.case.split(': ', 1)[1]}, slope {row.median:.2f}"
            axes.loglog(row.details["elements"], row.details["seconds"], marker=".", label=label)
        axes.set_xlabel("elements of the input")
        axes.set_ylabel("seconds")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        save_figure(figure, path.with_name("growth.png"))
