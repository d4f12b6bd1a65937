"""The registry of suites and cases that the runner, the tables and the README read."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Environment
from benchmarks.results import Row, make_rows
from benchmarks.tables import Table, generic_plot, generic_tables
from benchmarks.timing import QUICK, Effort


@dataclass(frozen=True)
class Context:
    """What a case may depend on.

    Attributes:
        suite: name of the running suite.
        case: name of the running case.
        environment: goes into every row.
        quick: cut the case down to a smoke test.
        seed: seed of random numbers.
        data: file or folder of images, for cases that want real ones.
        device: type of the device to measure.
        backbone: name of a pretrained network of timm or torchvision to fine-tune in place of the benchmarks' own.
    """

    suite: str
    case: str
    environment: Environment
    quick: bool = False
    seed: int = 0
    data: Path | None = None
    device: str = "cpu"
    backbone: str | None = None

    @property
    def effort(self) -> Effort:
        """How long to measure."""
        return QUICK if self.quick else Effort()

    def rows(self, samples: dict[str, list[float]], **settings: Any) -> list[Row]:
        """`make_rows` for this case: one row a method, with the context's seed unless `seed` is given.

        Args:
            samples: for each method one value a repeat.
            **settings: further arguments of `make_rows`.
        """
        common = {"environment": self.environment, "quick": self.quick, "seed": self.seed}
        return make_rows(self.suite, self.case, samples, **{**common, **settings})


Measure = Callable[[Context], list[Row]]


@dataclass
class Suite:
    """A named set of cases and the way their rows are shown.

    Attributes:
        name: the suite's name; its results lie in a folder of this name.
        title: heading of its tables.
        command: command that measures the suite.
        cases: measuring functions by name, in the order in which they run.
        tables: tables of a list of rows.
        plot: draws a list of rows to a file.
        devices: types of device that its cases can run on.
    """

    name: str
    title: str
    command: str
    cases: dict[str, Measure] = field(default_factory=dict)
    tables: Callable[[list[Row]], list[Table]] = generic_tables
    plot: Callable[[list[Row], Path], None] = generic_plot
    devices: tuple[str, ...] = ("cpu",)

    def case(self, name: str) -> Callable[[Measure], Measure]:
        """Decorator that adds a measuring function under `name`.

        Raises:
            ValueError: the name is taken.
        """

        def add(measure: Measure) -> Measure:
            if name in self.cases:
                raise ValueError(f"suite {self.name} has two cases named {name}")
            self.cases[name] = measure
            return measure

        return add

    def select(self, pattern: str) -> list[str]:
        """Names of the cases that match a shell pattern, in order."""
        return [name for name in self.cases if fnmatch.fnmatchcase(name, pattern)]


SUITES: dict[str, Suite] = {}


def register(suite: Suite) -> Suite:
    """Makes a suite known to the runner, the tables and the README.

    Raises:
        ValueError: another suite has its name.
    """
    if suite.name in SUITES:
        raise ValueError(f"two suites are named {suite.name}")
    SUITES[suite.name] = suite
    return suite
