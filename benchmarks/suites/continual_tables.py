"""How the rows of the suite `continual` are shown: what was to be shown, every method's figures, curves, matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.intervals import Interval, paired_interval
from benchmarks.results import Row
from benchmarks.tables import (
    Table,
    bytes_text,
    environment_text,
    new_figure,
    save_figure,
    significant,
    value_text,
)

GPM, OURS, PLAIN, JOINT = "GPM", "lance", "plain", "joint"
ENERGIES = (0.8, 0.9, 0.95, 0.97)
ACCURACY, BACKWARD, FORWARD = "average accuracy", "backward transfer", "forward transfer"
NEW, MEMORY, HELD, TIME = "new task accuracy", "task memory", "held bytes", "step time"
WORKING = "working memory"


def at_energy(method: str, energy: float) -> str:
    """Name of a method that protects a share of the energy."""
    return f"{method}, energy {energy:g}"


HEADLINE = at_energy(OURS, 0.97)
BARE = f"{HEADLINE}, no companions"
# Largest ratios to plain (held bytes) and to GPM (step time).
TARGETS: dict[str, dict[str, float | None]] = {HELD: {HEADLINE: 0.2, BARE: 0.9}, TIME: {HEADLINE: 0.8}}
LEAST_ACCURACY, MOST_MEMORY, LEAST_NEW = -1.0, 0.9, -2.0
PLOTTED = (PLAIN, "EWC", "replay", "published LANCE", at_energy(GPM, 0.97), HEADLINE)


class _Experiment:
    """The rows of one sequence of tasks: by quantity and method one value a seed, seeds in order."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name = name
        self.rows = [row for row in rows if row.case.startswith(f"{name}: seed ")]
        self.seeds = sorted({row.seed for row in self.rows if row.seed is not None})
        self.by_seed = {(row.quantity, row.method, row.seed): row for row in self.rows}

    def of(self, quantity: str, method: str) -> list[Row]:
        """Rows of a method, a seed each; empty where it has none."""
        found = [self.by_seed.get((quantity, method, seed)) for seed in self.seeds]
        return [row for row in found if row is not None]

    def values(self, quantity: str, method: str) -> list[float]:
        """Values of a method, a seed each."""
        return [row.median for row in self.of(quantity, method)]

    def mean(self, quantity: str, method: str) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values(quantity, method)))

    def minus(self, quantity: str, one: str, other: str) -> Interval:
        """Difference of two methods over seeds."""
        return paired_interval(self.values(quantity, one), self.values(quantity, other))

    def ratio(self, quantity: str, method: str, other: str) -> float:
        """Largest ratio of any seed."""
        return max(a / b for a, b in zip(self.values(quantity, method), self.values(quantity, other), strict=True))

    def above_curve(self, energy: float, quantity: str) -> Interval:
        """Ours minus GPM's curve over the logarithm of task memory, at ours' bytes, seed by seed."""
        ours, curve = [], []
        for seed in self.seeds:
            points = sorted(
                (self.by_seed[MEMORY, method, seed].median, self.by_seed[quantity, method, seed].median)
                for method in (at_energy(GPM, step) for step in ENERGIES)
            )
            at = self.by_seed[MEMORY, at_energy(OURS, energy), seed].median
            curve.append(float(np.interp(np.log(at), np.log([p[0] for p in points]), [p[1] for p in points])))
            ours.append(self.by_seed[quantity, at_energy(OURS, energy), seed].median)
        return paired_interval(ours, curve)

    def claims(self) -> Table:
        """What was to be shown, at every energy."""
        table = Table(f"{self.name}: what was to be shown", ("", "energy", "reached", "target"))
        for energy in ENERGIES:
            ours, gpm = at_energy(OURS, energy), at_energy(GPM, energy)
            difference = self.minus(ACCURACY, ours, gpm)
            _add(table, "average accuracy minus GPM's", energy, str(difference), difference.low >= LEAST_ACCURACY, "-1")
        for energy in ENERGIES:
            ratio = self.ratio(MEMORY, at_energy(OURS, energy), at_energy(GPM, energy))
            _add(table, "task memory over GPM's", energy, significant(ratio), ratio <= MOST_MEMORY, "0.9")
        for quantity in (ACCURACY, BACKWARD):
            for energy in ENERGIES:
                above = self.above_curve(energy, quantity)
                what = f"{quantity} above GPM's curve over task memory"
                _add(table, what, energy, above, above.mean >= 0, "0")
        for energy in ENERGIES:
            new = self.minus(NEW, at_energy(OURS, energy), PLAIN)
            _add(table, "accuracy on a new task minus plain's", energy, new, new.low >= LEAST_NEW, "-2")
        for method, what in ((HEADLINE, "bytes held over plain's"), (BARE, "bytes held, without companions")):
            ratio, most = self.ratio(HELD, method, PLAIN), TARGETS[HELD][method]
            assert most is not None
            _add(table, what, 0.97, significant(ratio), ratio <= most, f"{most:g}")
        times = [row.ratio_median for row in self.of(TIME, HEADLINE) if row.ratio_median is not None]
        ratio, most = float(np.median(times)), TARGETS[TIME][HEADLINE]
        assert most is not None
        _add(table, "time of a step over GPM's", 0.97, significant(ratio), ratio <= most, f"{most:g}")
        return table

    def figures(self) -> Table:
        """Every method's figures."""
        bytes_held = (MEMORY, WORKING, "held by autograd")
        columns = ("method", ACCURACY, BACKWARD, FORWARD, NEW, *bytes_held, "step", "step over GPM's")
        table = Table(f"{self.name}: every method", columns)
        for method in dict.fromkeys(row.method for row in self.rows if row.quantity in (ACCURACY, HELD)):
            times = self.of(TIME, method)
            ratios = [row.ratio_median for row in times if row.ratio_median is not None]
            alone = method == at_energy(GPM, 0.97) and times
            table.rows.append(
                (
                    method,
                    *(self._spread(quantity, method) for quantity in (ACCURACY, BACKWARD, FORWARD, NEW)),
                    *(self._bytes(quantity, method) for quantity in (MEMORY, WORKING, HELD)),
                    value_text(float(np.median([row.median for row in times])), "s") if times else "-",
                    f"{np.median(ratios):.2f}" if ratios else "1" if alone else "-",
                )
            )
        first = self.of(ACCURACY, PLAIN)[0]
        recipe, images = first.details["recipe"], first.details["images"]
        table.caption = (
            f"{len(images)} tasks of {images[0]} training images, {recipe['epochs']} epochs a task, batch "
            f"{recipe['batch']}, SGD at {recipe['learning_rate']:g} (momentum {recipe['momentum']:g}, cosine to zero), "
            f"seeds {', '.join(map(str, self.seeds))}: mean, and deviation over seeds."
        )
        return table

    def matrix(self, method: str) -> np.ndarray[Any, Any]:
        """Accuracy matrix, mean over seeds."""
        return np.mean([row.details["matrix"] for row in self.of(ACCURACY, method)], axis=0)

    def _spread(self, quantity: str, method: str) -> str:
        values = self.values(quantity, method)
        if not values:
            return "-"
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        return f"{np.mean(values):.2f}{spread}"

    def _bytes(self, quantity: str, method: str) -> str:
        values = self.values(quantity, method)
        return bytes_text(float(np.mean(values))) if values else "-"


def tables(rows: list[Row]) -> list[Table]:
    """Claims and figures of every sequence of tasks, and the time of a step of the papers' network."""
    found = []
    for name in _experiments(rows):
        found += [_Experiment(name, rows).claims(), _Experiment(name, rows).figures()]
    apart = [row for row in rows if row.case.startswith("step: ")]
    if apart:
        found.append(_steps(apart))
    if found:
        found[-1].caption = "\n".join(filter(None, [found[-1].caption, WORDS, environment_text(rows)]))
    return found


WORDS = (
    "Differences are means over paired seeds with 95% intervals (Student's t); a target holds for the lower bound, "
    "for curves for the mean. Ratios of bytes are the largest of any seed. A step is timed, and bytes held are "
    "counted, at the beginning of the last task (bytes also at that of the first, the larger is shown), methods in "
    "turns. lance keeps cores of energy 0.99 in 4 bits, on Split CIFAR-10 of energy 0.997 in 8 bits. Task memory: "
    "Fisher information and weighted parameters (EWC), images (replay), bases (GPM, published LANCE), packed bases "
    "and remembered products (lance). Working memory is made from it and held while training: projections (GPM), "
    "orthonormal columns and probes (lance). GPM's curve is interpolated over the logarithm of bytes, and level "
    "beyond its ends."
)


def _experiments(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.case.split(":", 1)[0] for row in rows if ": seed " in row.case))


def _add(table: Table, what: str, energy: float, reached: Interval | str, met: bool, bound: str) -> None:
    most = "at most" if "over GPM's" in what or "held" in what else "at least"
    unknown = isinstance(reached, Interval) and reached.high == float("inf")
    verdict = "" if unknown else ", met" if met else ", missed"
    table.rows.append((what, f"{energy:g}", str(reached), f"{most} {bound}{verdict}"))


def _steps(rows: Sequence[Row]) -> Table:
    table = Table("AlexNet-like network of the papers: time of a step", ("method", "time", "over GPM's", "target"))
    for row in rows:
        target = ""
        if row.target is not None and row.ratio_median is not None:
            target = f"at most {row.target:g}, {'met' if row.ratio_median <= row.target else 'missed'}"
        ratio = (
            "1" if row.ratio_median is None else f"{row.ratio_median:.2f} ({row.ratio_p10:.2f} to {row.ratio_p90:.2f})"
        )
        table.rows.append((row.method, value_text(row.median, "s"), ratio, target))
    table.caption = "Batch 64 of Split CIFAR-10, width 64, no dropout, at the beginning of the third task."
    return table


def plot(rows: list[Row], path: Path) -> None:
    """Accuracy and backward transfer over task memory; the accuracy matrices in `matrices.png` beside it."""
    experiments = [_Experiment(name, rows) for name in _experiments(rows)]
    if not experiments:
        return
    figure, axes = new_figure(width=11.0, height=3.2 * len(experiments), columns=2, lines=len(experiments))
    for line, experiment in zip(axes, experiments):
        for axis, quantity in zip(line, (ACCURACY, BACKWARD)):
            _curves(axis, experiment, quantity)
    axes[0][0].legend(fontsize=7)
    save_figure(figure, path)
    _matrices(experiments, path.with_name("matrices.png"))


def _curves(axis: Any, experiment: _Experiment, quantity: str) -> None:
    for method, style in ((GPM, "s-"), (OURS, "o-")):
        names = [at_energy(method, energy) for energy in ENERGIES]
        memory = [experiment.mean(MEMORY, name) / 1e3 for name in names]
        spread = [float(np.std(experiment.values(quantity, name))) for name in names]
        axis.errorbar(memory, [experiment.mean(quantity, n) for n in names], spread, fmt=style, capsize=2, label=method)
    for method in ("EWC", "replay", "published LANCE"):
        axis.plot(experiment.mean(MEMORY, method) / 1e3, experiment.mean(quantity, method), "^", label=method)
    levels = (PLAIN, JOINT) if quantity == ACCURACY else (PLAIN,)
    for method, line in zip(levels, (":", "--")):
        axis.axhline(experiment.mean(quantity, method), linestyle=line, color="gray", linewidth=0.8, label=method)
    axis.set_xscale("log")
    axis.set_xlabel("task memory (kB)")
    axis.set_ylabel(quantity)
    axis.set_title(experiment.name, fontsize=9)


def _matrices(experiments: Sequence[_Experiment], path: Path) -> None:
    figure, axes = new_figure(2.6 * len(PLOTTED), 2.8 * len(experiments), len(PLOTTED), len(experiments))
    for line, experiment in zip(axes, experiments):
        found = [experiment.matrix(method) for method in PLOTTED]
        least = min(float(matrix.min()) for matrix in found)
        for axis, method, matrix in zip(line, PLOTTED, found):
            image = axis.imshow(matrix, vmin=least, vmax=100, cmap="viridis")
            axis.set_title(f"{experiment.name}\n{method}", fontsize=7)
            axis.set_xlabel("tested on task", fontsize=7)
            axis.set_ylabel("after task", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
        figure.colorbar(image, ax=list(line), shrink=0.8, label="accuracy (%)")
    save_figure(figure, path)
