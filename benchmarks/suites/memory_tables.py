"""How the rows of the suite `memory` are shown: plain over each form, the gradient cosine beside it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    bytes_text,
    environment_text,
    missed,
    new_figure,
    ratio_text,
    save_figure,
    significant,
    value_text,
)


def tables(rows: list[Row]) -> list[Table]:
    """What is held, what a process needs, and the gradient at a budget of bytes."""
    found = [_bytes_table("Held by autograd between forward and backward", rows, "held: ")]
    found.append(_bytes_table("Peak resident memory of two steps in a fresh process", rows, "peak: "))
    found.append(_step_table(rows))
    found.append(_accuracy_table(rows))
    found.append(_curve_table(rows))
    found = [table for table in found if table.rows]
    if found:
        found[-1].caption = "\n".join(part for part in (found[-1].caption, environment_text(rows)) if part)
    return found


def _bytes_table(title: str, rows: list[Row], prefix: str) -> Table:
    table = Table(title, ("model", "form", "bytes", "plain over it", "target", "gradient cosine"))
    chosen = [row for row in rows if row.case.startswith(prefix)]
    cosines = {(row.case, row.method): row.median for row in chosen if row.quantity == "gradient cosine"}
    for row in chosen:
        if row.quantity not in ("held bytes", "peak bytes"):
            continue
        over = "1" if row.ratio_median is None else significant(1 / row.ratio_median)
        target = "" if row.target is None else f"at least {1 / row.target:.3g}, {'missed' if missed(row) else 'met'}"
        cosine = cosines.get((row.case, row.method))
        cells = (bytes_text(row.median), over, target, "" if cosine is None else f"{cosine:.4f}")
        table.rows.append((row.case.removeprefix(prefix), row.method, *cells))
    notes = [
        f"{row.case.removeprefix(prefix)}, {row.method}: {significant(row.median)} times the masks, offsets and cores "
        f"that have to be held (target at most {row.target:g}, {'missed' if missed(row) else 'met'})."
        for row in chosen
        if row.quantity == "held over implied"
    ]
    settings = {
        f"{row.case.removeprefix(prefix)}: with `{name}={value}` for every form."
        for row in chosen
        for name, value in row.details.get("allocator", {}).items()
    }
    table.caption = "\n".join(notes + sorted(settings))
    return table


def _step_table(rows: list[Row]) -> Table:
    """Time of a step over plain, and of one with packed cores over one without."""
    table = Table(
        "Time of a training step, eager", ("model", "form", "time", "over plain", "target", "over 32-bit cores")
    )
    chosen = [row for row in rows if row.case.startswith("step: ")]
    packing = {(row.case, row.method): row for row in chosen if row.quantity == "time over 32-bit cores"}
    for row in chosen:
        if row.quantity != "time":
            continue
        target = "" if row.target is None else f"at most {row.target:g}, {'missed' if missed(row) else 'met'}"
        other = packing.get((row.case, row.method))
        last = ""
        if other is not None:
            last = f"{ratio_text(other)}, at most {other.target:g}, {'missed' if missed(other) else 'met'}"
        cells = (value_text(row.median, row.unit), ratio_text(row), target, last)
        table.rows.append((row.case.removeprefix("step: "), row.method, *cells))
    return table


def _accuracy_table(rows: list[Row]) -> Table:
    """Test accuracy with quantized companions, and its paired difference to plain."""
    table = Table(
        "Test accuracy from scratch with quantized companions, no layer compressed",
        ("network", "form", "median accuracy", "mean minus plain", "95% interval", "target"),
    )
    for row in rows:
        if not row.case.startswith("accuracy: "):
            continue
        cells = ("", "", "")
        if "difference" in row.details:
            mean, low, high, least = (row.details[key] for key in ("difference", "low", "high", "least"))
            verdict = f"at least {least:g}, {'met' if mean >= least else 'missed'}"
            cells = (f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}", verdict)
        name = row.case.removeprefix("accuracy: ").removesuffix(", quantized companions")
        table.rows.append((name, row.method, f"{row.median:.1f} %", *cells))
    return table


def _curve_table(rows: list[Row]) -> Table:
    chosen = [row for row in rows if row.case.startswith("curve: ")]
    methods = list(dict.fromkeys(row.method for row in chosen if row.quantity == "gradient cosine"))
    table = Table("Gradient cosine at equal bytes, fine-tuning network", ("bytes over the inputs'", *methods))
    for case in dict.fromkeys(row.case for row in chosen):
        cells = {row.method: row for row in chosen if row.case == case and row.quantity == "gradient cosine"}
        if cells:
            values = [f"{cells[method].median:.4f}" if method in cells else "-" for method in methods]
            table.rows.append((case.removeprefix("curve: "), *values))
    table.caption = "\n".join(
        f"{row.case.removeprefix('curve: ')}, {row.method}, {row.quantity}: {value_text(row.median, row.unit)}"
        + ("" if "least" not in row.details else f" (target at least {row.details['least']:g})")
        for row in chosen
        if row.quantity != "gradient cosine"
    )
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Bars of plain over each form, and the curves in `curve.png` beside it."""
    chosen = [row for row in rows if row.quantity == "held bytes" and row.ratio_median is not None]
    figure, axes = new_figure(width=9.0, height=1.2 + 0.25 * max(len(chosen), 3))
    positions = range(len(chosen))
    axes.barh(positions, [1 / (row.ratio_median or 1.0) for row in chosen])
    marks = [(position, 1 / row.target) for position, row in zip(positions, chosen) if row.target is not None]
    axes.plot([mark for _, mark in marks], [position for position, _ in marks], "k|", markersize=9, label="target")
    axes.set_yticks(positions, [f"{row.case.removeprefix('held: ')}: {row.method}" for row in chosen], fontsize=7)
    axes.invert_yaxis()
    if chosen:
        axes.set_xscale("log")
    axes.set_xlabel("bytes held by plain PyTorch over bytes held")
    if marks:
        axes.legend(loc="lower right", fontsize=7)
    save_figure(figure, path)
    curve = [row for row in rows if row.case.startswith("curve: ") and row.quantity == "gradient cosine"]
    if curve:
        figure, axes = new_figure(width=7.0, height=4.5)
        for method in dict.fromkeys(row.method for row in curve):
            points = sorted((row.details["share"], row.median) for row in curve if row.method == method)
            axes.semilogx([share for share, _ in points], [value for _, value in points], marker=".", label=method)
        axes.set_xlabel("bytes over the inputs'")
        axes.set_ylabel("gradient cosine")
        axes.legend(fontsize=8)
        save_figure(figure, path.with_name("curve.png"))
