"""How the rows of the suite `finetune` are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import Interval, paired_interval
from benchmarks.results import Row
from benchmarks.step_tables import step_tables
from benchmarks.tables import Table, bytes_text, environment_text, new_figure, save_figure, significant

PLAIN, PUBLISHED = "plain", "published, energy 0.7"
AT_PUBLISHED, AT_SHARE = "lance, at the published form's bytes", "lance, at 1/100 of the bytes"
SIGNS_AT_PUBLISHED = "lance, 1 bit, at the published form's bytes"
SIGNS_AT_SHARE = "lance, 1 bit and fewer operations, at 1/100 of the bytes"
# Lanes of the claims: trained layers, recipe, least mean and least lower bound of ours minus plain.
AGAINST_PLAIN = (
    ("last4", "3 epochs", -1.0, -2.0),
    ("all", "3 epochs", -1.0, -2.0),
    ("last4", "15 epochs", -0.5, -1.5),
    ("all", "15 epochs", -0.5, -1.5),
)
RIVALS = ("HOSVD", "ASI", "gradient filtering")


def tables(rows: list[Row]) -> list[Table]:
    """What was to be shown, accuracies, gradients, and one training step."""
    found = [_claims(rows)]
    found += [_accuracies(rows, layers, recipe) for layers, recipe in _lanes(rows)]
    found += [_at_published_bytes(rows), _gradients(rows)]
    found = [table for table in found if table.rows]
    found += step_tables([row for row in rows if row.case.startswith(("operations: ", "step: "))])
    if found:
        found[-1].caption = "\n".join(filter(None, [found[-1].caption, environment_text(rows)]))
    return found


def _accuracy_rows(rows: Iterable[Row], layers: str, recipe: str) -> dict[str, Row]:
    return {
        row.method: row
        for row in rows
        if row.quantity == "test accuracy" and (row.details["layers"], row.details["recipe"]) == (layers, recipe)
    }


def _lanes(rows: Iterable[Row]) -> list[tuple[str, str]]:
    lanes = [(row.details["layers"], row.details["recipe"]) for row in rows if row.quantity == "test accuracy"]
    return list(dict.fromkeys(lanes))


def _last(row: Row) -> list[float]:
    return [curve[-1] for curve in row.details["curves"]]


def _minus(one: Row, other: Row) -> Interval:
    """Difference over the seeds that both have."""
    seeds = [seed for seed in one.details["seeds"] if seed in other.details["seeds"]]
    values = [dict(zip(row.details["seeds"], _last(row))) for row in (one, other)]
    return paired_interval(*[[found[seed] for seed in seeds] for found in values])


def _paired(lane: Mapping[str, Row], *names: str) -> bool:
    """Whether the rows are there and trained the same network: pretraining rounds by the processor."""
    return all(name in lane for name in names) and len({lane[name].environment["hardware"] for name in names}) == 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _counted(row: Row) -> float:
    return _mean(row.details["counted_bytes"])


def _ratio(row: Row) -> str:
    counted, dense = _counted(row), row.details["dense_bytes"]
    return f"{significant(dense / counted)}x ({bytes_text(counted)})" if counted < dense else "-"


def _claims(rows: list[Row]) -> Table:
    table = Table("What was to be shown", ("claim", "found", "target", ""))

    def add(claim: str, found: str, target: str, met: bool) -> None:
        table.rows.append((claim, found, target, "met" if met else "missed"))

    gains = _gains(rows)
    if gains:
        least, mean = min(gain for gain, *_ in gains), _mean([gain for gain, *_ in gains])
        add(
            "gradient cosine of ours minus the published form's at its bytes, its energies "
            f"{min(e for _, e, _ in gains):g} to {max(e for _, e, _ in gains):g}, every layer",
            f"{mean:+.3f} on average, {least:+.3f} at least, {sum(gain <= 0 for gain, *_ in gains)} of {len(gains)} "
            "not higher",
            "higher everywhere, +0.05 on average",
            least > 0 and mean >= 0.05,
        )
    lane = _accuracy_rows(rows, "last4", "3 epochs")
    for name in (AT_PUBLISHED, SIGNS_AT_PUBLISHED):
        if _paired(lane, name, PUBLISHED):
            difference = _minus(lane[name], lane[PUBLISHED])
            fits = _counted(lane[name]) <= _counted(lane[PUBLISHED])
            bytes_of = _ratio(lane[PUBLISHED]), _ratio(lane[name])
            add(
                f"accuracy minus the published form's ({bytes_of[0]}), last4, 3 epochs: {name} ({bytes_of[1]})",
                str(difference),
                "lower bound +3",
                difference.low >= 3 and fits,
            )
    for layers, recipe, mean, lower in AGAINST_PLAIN:
        lane = _accuracy_rows(rows, layers, recipe)
        for name in (AT_SHARE, SIGNS_AT_SHARE):
            if _paired(lane, name, PLAIN):
                difference = _minus(lane[name], lane[PLAIN])
                add(
                    f"accuracy minus plain's, {layers}, {recipe}: {name} ({_ratio(lane[name])})",
                    str(difference),
                    f"mean {mean:g}, lower bound {lower:g}",
                    difference.mean >= mean and difference.low >= lower,
                )
    _claim_rivals(rows, add)
    return table


def _claim_rivals(rows: list[Row], add: Any) -> None:
    lane = _accuracy_rows(rows, "last4", "3 epochs")
    for name in (AT_SHARE, SIGNS_AT_SHARE):
        rivals = {rival: row for rival, row in lane.items() if rival.startswith(RIVALS) and _paired(lane, name, rival)}
        if rivals:
            best = max(rivals, key=lambda rival: _mean(_last(rivals[rival])))
            difference = _minus(lane[name], rivals[best])
            add(
                f"accuracy minus the best rival's, {best} ({_ratio(rivals[best])}): {name} ({_ratio(lane[name])})",
                str(difference),
                "at least 0",
                difference.mean >= 0,
            )
    cosines = {row.method: row.median for row in rows if row.case == "gradients: last4, every method"}
    means = {
        row.method: _mean(list(row.details["cosines"].values()))
        for row in rows
        if row.method in cosines and row.case == "gradients: last4, every method"
    }
    compared = {name: value for name, value in means.items() if name.startswith(RIVALS)}
    if compared and AT_SHARE in means:
        best = max(compared, key=lambda name: compared[name])
        gain = means[AT_SHARE] - compared[best]
        claim = f"gradient cosine minus the best rival's, {best}, last4: {AT_SHARE}"
        add(claim, f"{gain:+.3f}", "at least 0", gain >= 0)


def _gains(rows: list[Row]) -> list[tuple[float, float, str]]:
    """Cosine of ours minus the published form's, the form's energy, and the layer."""
    by_energy: dict[float, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.quantity == "gradient cosine" and "energy" in row.details:
            by_energy.setdefault(row.details["energy"], {})[row.details["form"]] = row.details["cosines"]
    return [
        (found["lance"][layer] - found["published"][layer], energy, layer)
        for energy, found in by_energy.items()
        for layer in found["published"]
    ]


def _accuracies(rows: list[Row], layers: str, recipe: str) -> Table:
    lane = _accuracy_rows(rows, layers, recipe)
    table = Table(
        f"Test accuracy after fine-tuning: {layers}, {recipe}",
        ("method", "counted", "test accuracy", "minus plain", "by epoch", "seeds"),
    )
    for name, row in lane.items():
        curve = [_mean(values) for values in zip(*row.details["curves"])]
        shown = curve if len(curve) <= 5 else curve[:: len(curve) // 5]
        difference = str(_minus(row, lane[PLAIN])) if name != PLAIN and _paired(lane, name, PLAIN) else ""
        epochs = " ".join(f"{value:.1f}" for value in shown)
        seeds = len(row.details["seeds"])
        counted = "-" if name.startswith("LoRA") else _ratio(row)
        table.rows.append((name, counted, f"{_mean(_last(row)):.2f} %", difference, epochs, str(seeds)))
    table.caption = (
        "Means over the seeds; differences with their 95% interval by Student's t over paired seeds, which differ in "
        "the head's start and the order of the batches and share one pretrained network. Counted: what is kept in "
        "place of the compressed layers' inputs, factors included where every step has its own.\n"
        f"Pretrained and measured on: {', '.join(dict.fromkeys(row.environment['hardware'] for row in lane.values()))}."
    )
    return table


def _at_published_bytes(rows: list[Row]) -> Table:
    table = Table(
        "Gradient cosine by layer at the published form's bytes: published / ours",
        ("published form's energy", "counted", "mean"),
    )
    chosen = [row for row in rows if row.quantity == "gradient cosine" and "energy" in row.details]
    if chosen:
        table.columns = (*table.columns, *chosen[0].details["cosines"])
    for energy in dict.fromkeys(row.details["energy"] for row in chosen):
        pair = {row.details["form"]: row.details for row in chosen if row.details["energy"] == energy}
        one, ours = pair["published"], pair["lance"]
        layers = [f"{one['cosines'][name]:.3f} / {ours['cosines'][name]:.3f}" for name in one["cosines"]]
        means = [_mean(list(found["cosines"].values())) for found in (one, ours)]
        counted = f"{significant(one['dense_bytes'] / one['counted_bytes'])}x"
        table.rows.append((f"{energy:g}", counted, f"{means[0]:.3f} / {means[1]:.3f}", *layers))
    return table


def _gradients(rows: list[Row]) -> Table:
    table = Table(
        "Weight gradients before training, last4, mean over layers and batches",
        ("method", "counted", "cosine", "relative error"),
    )
    for row in rows:
        if row.case == "gradients: last4, every method":
            details = row.details
            counted = f"{significant(details['dense_bytes'] / details['counted_bytes'])}x"
            cosine = _mean(list(details["cosines"].values()))
            error = _mean(list(details["relative_errors"].values()))
            table.rows.append((row.method, counted, f"{cosine:.4f}", f"{error:.3f}"))
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Test accuracy over counted bytes and over the time of a step, one line of axes for each way of training."""
    lanes = [lane for lane in _lanes(rows) if lane[1] == "3 epochs"] or _lanes(rows)[:1]
    figure, axes = new_figure(width=11.0, height=4.2 * max(len(lanes), 1), columns=2, lines=max(len(lanes), 1))
    for (over_bytes, over_time), (layers, recipe) in zip(axes, lanes):
        lane = _accuracy_rows(rows, layers, recipe)
        times = {
            row.method: row.ratio_median or 1.0
            for row in rows
            if row.quantity == "step time" and row.case == f"step: {layers}"
        }
        for name, row in lane.items():
            values = _last(row)
            line = over_bytes.errorbar(
                _counted(row), _mean(values), [[_mean(values) - min(values)], [max(values) - _mean(values)]],
                marker="o", linestyle="none", label=name,
            )  # fmt: skip
            if name in times:
                over_time.plot(times[name], _mean(values), "o", color=line[0].get_color())
        over_bytes.set_xscale("log")
        over_bytes.set_title(f"{layers}, {recipe}; bars: least and most of the seeds", fontsize=9)
        over_bytes.set_xlabel("counted bytes a step")
        over_bytes.set_ylabel("test accuracy, %")
        over_bytes.legend(fontsize=5, loc="lower right")
        over_time.set_xlabel("time of a step over plain's")
        over_time.set_ylabel("test accuracy, %")
    save_figure(figure, path)
