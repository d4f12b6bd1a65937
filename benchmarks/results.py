"""The schema of results: rows, their files, and what makes a row valid."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import Environment

ENVIRONMENT_FIELDS: dict[str, type] = {
    "device": str,
    "hardware": str,
    "threads": int,
    "wait_policy": str,
    "torch": str,
    "python": str,
    "lance": str,
    "kernels": str,
    "commit": str,
    "dirty": bool,
}


@dataclass(frozen=True)
class Spread:
    """Median and 10th and 90th percentile of a sample."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of `values`."""
        p10, median, p90 = np.percentile(list(values), [10, 50, 90])
        return cls(float(median), float(p10), float(p90))


@dataclass(frozen=True)
class Row:
    """One measured quantity of one method in one case.

    Attributes:
        suite: the suite the case belongs to.
        case: the case's name, unique within its suite.
        method: what was measured, unique within its case and quantity.
        quantity: name of the quantity, such as `time` or `test accuracy`.
        unit: unit of `median`, `p10` and `p90`.
        median: median over the repeats.
        p10: 10th percentile over the repeats.
        p90: 90th percentile over the repeats.
        repeats: number of repeats.
        quick: whether the case was cut down to a smoke test.
        seed: seed of the random numbers, where there is one.
        baseline: method of the same case to which the ratio fields compare.
        ratio_median: median over the repeats of this method's value over the baseline's of the same repeat.
        ratio_p10: 10th percentile of the same.
        ratio_p90: 90th percentile of the same.
        target: what `ratio_median` (`median`, where there is no baseline) should be at most.
        details: further numbers or words of the case, such as sizes and ranks.
        environment: device, hardware, threads, versions and commit.
    """

    suite: str
    case: str
    method: str
    quantity: str
    unit: str
    median: float
    p10: float
    p90: float
    repeats: int
    quick: bool
    seed: int | None = None
    baseline: str | None = None
    ratio_median: float | None = None
    ratio_p10: float | None = None
    ratio_p90: float | None = None
    target: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> Spread | None:
        """The ratio to the baseline, where there is one."""
        if self.ratio_median is None or self.ratio_p10 is None or self.ratio_p90 is None:
            return None
        return Spread(self.ratio_median, self.ratio_p10, self.ratio_p90)

    def as_dict(self) -> dict[str, Any]:
        """The row as one flat JSON object; the environment's fields stand beside the row's own."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "environment"}
        return {**own, **self.environment}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row of a JSON object written by `as_dict`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        validate(values)
        own = {entry.name for entry in fields(cls)} - {"environment"}
        return cls(
            **{name: value for name, value in values.items() if name in own},
            environment={name: values[name] for name in ENVIRONMENT_FIELDS},
        )


ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "suite": (str,),
    "case": (str,),
    "method": (str,),
    "quantity": (str,),
    "unit": (str,),
    "median": (int, float),
    "p10": (int, float),
    "p90": (int, float),
    "repeats": (int,),
    "quick": (bool,),
    "seed": (int, type(None)),
    "baseline": (str, type(None)),
    "ratio_median": (int, float, type(None)),
    "ratio_p10": (int, float, type(None)),
    "ratio_p90": (int, float, type(None)),
    "target": (int, float, type(None)),
    "details": (dict,),
}


def validate(row: dict[str, Any]) -> None:
    """Refuses a JSON object that is not a row.

    Raises:
        ValueError: a field is missing, unknown or of the wrong type; the message names it.
    """
    expected = {**ROW_FIELDS, **{name: (kind,) for name, kind in ENVIRONMENT_FIELDS.items()}}
    missing, unknown = expected.keys() - row.keys(), row.keys() - expected.keys()
    if missing or unknown:
        raise ValueError(f"row has missing fields {sorted(missing)} and unknown fields {sorted(unknown)}")
    for name, kinds in expected.items():
        if not isinstance(row[name], kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"row field {name} is {row[name]!r}; expected {names}")


@dataclass(frozen=True)
class Results:
    """Rows of one suite, with the command that measures them again."""

    suite: str
    command: str
    rows: list[Row]

    def write(self, path: Path) -> None:
        """Writes the rows to `path`, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"suite": self.suite, "command": self.command, "rows": [row.as_dict() for row in self.rows]}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads what `write` wrote.

        Raises:
            ValueError: the file holds no results.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row.from_dict(row) for row in content["rows"]]
            return cls(content["suite"], content["command"], rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no benchmark results ({error}); move it away or mend it") from error


def make_rows(
    suite: str,
    case: str,
    samples: dict[str, list[float]],
    *,
    environment: Environment,
    quick: bool,
    quantity: str = "time",
    unit: str = "s",
    seed: int | None = None,
    baseline: str | None = None,
    targets: Mapping[str, float | None] | None = None,
    details: dict[str, dict[str, Any]] | None = None,
) -> list[Row]:
    """One row a method from paired samples.

    Args:
        suite: the suite's name.
        case: the case's name.
        samples: for each method one value a repeat; the same repeat of two methods was measured side by side.
        environment: where it was measured.
        quick: whether the case was cut down.
        quantity: name of the quantity.
        unit: unit of the values.
        seed: seed of the random numbers.
        baseline: method to which the others are compared.
        targets: by method, what its ratio to the baseline (its median, without a baseline) should be at most.
        details: by method, further numbers.
    """
    rows = []
    for method, values in samples.items():
        spread = Spread.of(values)
        ratio = None
        if baseline is not None and method != baseline:
            ratio = Spread.of(value / reference for value, reference in zip(values, samples[baseline], strict=True))
        rows.append(
            Row(
                suite=suite,
                case=case,
                method=method,
                quantity=quantity,
                unit=unit,
                median=spread.median,
                p10=spread.p10,
                p90=spread.p90,
                repeats=len(values),
                quick=quick,
                seed=seed,
                baseline=baseline if ratio is not None else None,
                ratio_median=ratio.median if ratio else None,
                ratio_p10=ratio.p10 if ratio else None,
                ratio_p90=ratio.p90 if ratio else None,
                target=(targets or {}).get(method),
                details=(details or {}).get(method, {}),
                environment=environment.as_dict(),
            )
        )
    return rows
