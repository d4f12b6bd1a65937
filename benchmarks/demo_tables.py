"""How the rows of the fine-tuning demo are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.registry import Suite, register
from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    bytes_text,
    environment_text,
    new_figure,
    ratio_text,
    save_figure,
    significant,
    value_text,
)

LAYERS = {
    "last4": "the last four convolutions and the head are trained, everything before and every batch norm is frozen",
    "all": "all convolutions and the head are trained, every batch norm is frozen",
}


def tables(rows: list[Row]) -> list[Table]:
    """One table a case: a line a method."""
    return [_table([row for row in rows if row.case == case]) for case in dict.fromkeys(row.case for row in rows)]


def _table(rows: list[Row]) -> Table:
    values = {(row.method, row.quantity): row for row in rows}
    methods = list(dict.fromkeys(row.method for row in rows))
    table = Table(
        title=f"Fine-tuning on the other half of the classes: {rows[0].case}",
        columns=("method", "test accuracy", "counted", "held by autograd", "step time", "gradient cosine"),
        caption=_caption(rows, values, methods),
    )
    plain = methods[0]
    for method in methods:
        accuracy, held = values[method, "test accuracy"], values[method, "held bytes"].median
        counted, held_text, time = "-", bytes_text(held), value_text(values[method, "step time"].median, "s")
        if method != plain:
            compression = significant(values[method, "counted compression"].median)
            counted = f"{compression}x ({bytes_text(accuracy.details['counted_bytes'])})"
            held_text += f" ({significant(values[plain, 'held bytes'].median / held)}x less)"
            time = ratio_text(values[method, "step time"])
        cosines = [values[method, f"gradient cosine {when} training"].median for when in ("before", "after")]
        cosine = " / ".join(f"{value:.3f}" for value in cosines)
        table.rows.append((method, f"{accuracy.median:.1f} %", counted, held_text, time, cosine))
    return table


def _caption(rows: list[Row], values: dict[tuple[str, str], Row], methods: list[str]) -> str:
    facts = {method: values[method, "test accuracy"].details for method in methods}
    plain, first = facts[methods[0]], facts[methods[1]]
    seeds = len(plain["seeds"])
    lines = [
        *(f"{method}: {_form(facts[method])}." for method in methods[1:]),
        f"Batch {plain['batch']}, {plain['epochs']} epochs, {seeds} {'seed' if seeds == 1 else 'seeds (medians)'}; "
        f"{LAYERS[plain['layers']]}.",
        f"Counted: inputs of the {len(plain['compressed'])} compressed convolutions, "
        f"{bytes_text(first['dense_bytes'])} a batch, over the cores kept in their place (factors, shared by all "
        "steps, left out). Held by autograd: everything kept for one step, parameters and buffers left out, "
        "each storage once. Step time: over plain's in the same round. Gradient cosine: to the dense weight gradient, "
        "mean over layers and batches, before / after training.",
    ]
    without = [method for method in methods[1:] if facts[method]["companions"] == "none"]
    if without:
        held = values[methods[0], "held bytes"].median
        falls = [held / values[method, "held bytes"].median for method in without]
        counted = max(values[method, "counted compression"].median for method in without)
        least, most = significant(min(falls)), significant(max(falls))
        falling = least if least == most else f"{least} to {most}"
        lines.append(
            f"Held bytes fall only {falling} times without companions ({', '.join(without)}), although up to "
            f"{significant(counted)} times fewer are counted: batch norm still keeps its input and ReLU its output. "
            "They fall once companions stand in for those modules."
        )
    lines.append(f"Command: `{plain['command']}`. {environment_text(rows)}")
    return "\n".join(lines)


def _form(details: dict[str, Any]) -> str:
    """Energy, core, batch mode and companions of a method in words."""
    batch = "batch mode kept" if details["batch_mode"] == "keep" else "batch mode compressed"
    return (
        f"energy {details['energy']:g}, {details['core_bits'] or 32}-bit cores, {batch}, companions "
        f"{details['companions']}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """For each case, accuracy by epoch and accuracy over held bytes."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = new_figure(width=10.0, height=3.6 * len(cases), columns=2, lines=len(cases))
    for (curves, bytes_axes), case in zip(axes, cases):
        chosen = {(row.method, row.quantity): row for row in rows if row.case == case}
        for method in dict.fromkeys(method for method, _ in chosen):
            row = chosen[method, "test accuracy"]
            epochs = range(1, len(row.details["curve"]) + 1)
            (line,) = curves.plot(epochs, row.details["curve"], marker=".", label=method)
            counted = row.details["counted_bytes"] or row.details["dense_bytes"]
            held = chosen[method, "held bytes"].median
            if counted:
                bytes_axes.plot(counted, row.median, "o", color=line.get_color())
            bytes_axes.plot(held, row.median, "s", mfc="none", color=line.get_color())
        curves.set_title(case, fontsize=9)
        curves.set_xlabel("epoch of fine-tuning")
        curves.set_ylabel("test accuracy, %")
        curves.legend(fontsize=7)
        bytes_axes.set_title("filled: counted bytes, open: held by autograd", fontsize=9)
        bytes_axes.set_xscale("log")
        bytes_axes.set_xlabel("bytes a step")
        bytes_axes.set_ylabel("test accuracy, %")
    save_figure(figure, path)


SUITE = register(
    Suite(
        name="demo",
        title="Fine-tuning with compressed activations",
        command="python -m benchmarks.demo",
        tables=tables,
        plot=plot,
    )
)
