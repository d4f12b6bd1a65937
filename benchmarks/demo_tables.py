"""How the rows of the fine-tuning demo are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.registry import Suite, register
from benchmarks.results import Row
from benchmarks.tables import Table, bytes_text, environment_text, new_figure, ratio_text, save_figure, significant

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
        columns=(
            "method",
            "energy",
            "core",
            "companions",
            "test accuracy",
            "counted bytes",
            "counted compression",
            "held by autograd",
            "step time over plain",
            "gradient cosine, first / last step",
        ),
        caption=_caption(rows, values, methods),
    )
    for method in methods:
        details = values[method, "test accuracy"].details
        cosines = [values[method, f"gradient cosine, {which} step"].median for which in ("first", "last")]
        held = values[method, "held bytes"].median
        plain = values[methods[0], "held bytes"].median
        table.rows.append(
            (
                method,
                *_form(details),
                f"{values[method, 'test accuracy'].median:.1f} %",
                "-" if method == methods[0] else bytes_text(details["counted_bytes"]),
                f"{significant(values[method, 'counted compression'].median)}x",
                f"{bytes_text(held)} ({plain / held:.2f}x less)" if method != methods[0] else bytes_text(held),
                "1" if method == methods[0] else ratio_text(values[method, "step time"]),
                " / ".join(f"{cosine:.3f}" for cosine in cosines),
            )
        )
    return table


def _form(details: dict[str, Any]) -> tuple[str, str, str]:
    """Energy, core and companions of a method, empty for plain backpropagation."""
    if "energy" not in details:
        return "", "", ""
    core = f"{details['core_bits'] or 32} bits, batch {'kept' if details['batch_mode'] == 'keep' else 'fixed'}"
    return f"{details['energy']:g}", core, details["companions"]


def _caption(rows: list[Row], values: dict[tuple[str, str], Row], methods: list[str]) -> str:
    details = values[methods[0], "test accuracy"].details
    seeds = len(details["seeds"])
    sentences = [
        f"Batch {details['batch']}, {details['epochs']} epochs, {seeds} {'seed' if seeds == 1 else 'seeds (medians)'}; "
        f"{LAYERS[details['layers']]}. Counted bytes are the cores and factors kept in place of the inputs of the "
        f"{len(details['compressed'])} compressed convolutions "
        f"({bytes_text(values[methods[1], 'test accuracy'].details['dense_bytes'])} a batch); held bytes are all that "
        "autograd keeps for one step, each storage once."
    ]
    plain = values[methods[0], "held bytes"].median
    without = [method for method in methods[1:] if values[method, "test accuracy"].details["companions"] == "none"]
    if without:
        least, most = (pick(plain / values[method, "held bytes"].median for method in without) for pick in (min, max))
        counted = max(values[method, "counted compression"].median for method in without)
        sentences.append(
            f"Without companions (rows with `none`), held bytes fall only {least:.2f} to {most:.2f} times although up "
            f"to {significant(counted)} times fewer are counted: batch norm and ReLU still keep their own input and "
            "output. Held bytes fall once companions for those modules are on."
        )
    sentences.append(f"`{details['command']}`. {environment_text(rows)}")
    return " ".join(sentences)


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
