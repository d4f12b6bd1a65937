"""How rows of one training step are shown, a table a case."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    bytes_text,
    environment_text,
    generic_plot,
    new_figure,
    ratio_text,
    save_figure,
    significant,
    value_text,
)


def step_tables(rows: list[Row]) -> list[Table]:
    """One table a case: a line a method, bytes, operations and time; below the last what they say."""
    cases = dict.fromkeys(row.case for row in rows)
    found = [_table(case, [row for row in rows if row.case == case]) for case in cases]
    if found:
        explained = (
            "Factors from calibration are shared by all steps. Operations are those of whole boxes of ranks, of which "
            "a plan keeps some values."
        )
        if any(row.quantity == "step time" for row in rows):
            explained += (
                " Ratios of time are medians (10th to 90th percentile) over rounds in which all methods ran in turns. "
                "Decomposition: time within a step that a rival takes to compress; ours is within the layer's operator."
            )
        found[-1].caption = "\n".join(filter(None, [found[-1].caption, explained]))
    return found


def _table(case: str, rows: list[Row]) -> Table:
    table = Table(
        f"One training step: {case.partition(': ')[2]}",
        (
            "method", "counted", "factors", "held", "peak", "operations over plain's",
            "of them decomposition", "step time over plain's", "decomposition", "calibration, once",
        ),
    )  # fmt: skip
    values = {(row.method, row.quantity): row for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        table.rows.append((method, *_cells(method, values)))
    # What was not measured has no column.
    shown = [index for index, cells in enumerate(zip(*table.rows)) if index == 0 or set(cells) != {"-"}]
    table.columns = [table.columns[index] for index in shown]
    table.rows = [[row[index] for index in shown] for row in table.rows]
    reached = [(row, row.median if row.ratio_median is None else row.ratio_median, row.target) for row in rows]
    table.caption = "\n".join(
        f"{row.quantity} of {row.method} over plain's: {significant(value)} (target at most {target:g}, "
        f"{'met' if value <= target else 'missed'})."
        for row, value, target in reached
        if target is not None
    )
    return table


def _cells(method: str, values: dict[tuple[str, str], Row]) -> list[str]:
    def found(quantity: str) -> Row | None:
        return values.get((method, quantity))

    counted, factors = found("counted bytes"), found("factor bytes")
    operations, apart, calibration = found("operations"), found("decomposition in a step"), found("calibration")
    held, peak, time = found("held bytes"), found("peak bytes"), found("step time")
    share = "-"
    if operations is not None and operations.details["decomposition"]:
        share = f"{100 * operations.details['decomposition'] / operations.median:.1f} %"
    whole = operations is None or operations.ratio is None
    return [
        "-" if counted is None else bytes_text(counted.median),
        "-" if factors is None or not factors.median else bytes_text(factors.median),
        "-" if held is None else bytes_text(held.median),
        "-" if peak is None else bytes_text(peak.median),
        "1" if whole or operations is None else f"{operations.ratio_median:.3f}",
        share,
        "-" if time is None else (value_text(time.median, "s") if time.ratio is None else ratio_text(time)),
        "-" if apart is None else value_text(apart.median, "s"),
        "-" if calibration is None else value_text(calibration.median, "s"),
    ]


def tables(rows: list[Row]) -> list[Table]:
    """One table a case, the environment below the last."""
    found = step_tables(rows)
    if found:
        found[-1].caption += f"\n{environment_text(rows)}"
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Time of a step over plain's against the bytes it holds over plain's; operations where nothing was timed."""
    if all(row.quantity != "step time" for row in rows):
        generic_plot([row for row in rows if row.quantity == "operations"], path)
        return
    figure, axes = new_figure(width=9.0, height=5.0)
    ratios = {(row.case, row.method, row.quantity): row.ratio_median for row in rows}
    for method in dict.fromkeys(row.method for row in rows):
        points = [
            (ratios[case, method, "held bytes"], ratios[case, method, "step time"])
            for case, other, quantity in ratios
            if other == method and quantity == "step time" and ratios[case, method, "step time"] is not None
        ]
        if points:
            axes.plot([held for held, _ in points], [time for _, time in points], "o", label=method, markersize=4)
    axes.set_xscale("log")
    axes.set_xlabel("bytes held by autograd over plain's")
    axes.set_ylabel("time of a step over plain's")
    axes.legend(fontsize=7)
    save_figure(figure, path)
