"""Runs the cases of a suite, keeps what is done when interrupted, and writes results, table and plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import environment
from benchmarks.registry import Context, Suite
from benchmarks.results import Results, Row


@dataclass(frozen=True)
class Options:
    """How to run a suite.

    Attributes:
        output: folder in which each suite has a folder of results.
        pattern: shell pattern of the cases to run.
        quick: cut every case down to a smoke test.
        threads: threads PyTorch uses within an operator.
        seed: seed of random numbers.
        restart: forget what an interrupted run has measured.
        data: file or folder of images, for cases that want real ones.
        device: type of the device to measure.
        backbone: pretrained network of timm or torchvision for the suites that fine-tune.
    """

    output: Path
    pattern: str = "*"
    quick: bool = False
    threads: int = 2
    seed: int = 0
    restart: bool = False
    data: Path | None = None
    device: str = "cpu"
    backbone: str | None = None


def run(suite: Suite, options: Options, say: Callable[[str], None] = print) -> list[Row]:
    """Measures the selected cases of a suite.

    Each finished case is kept in `<output>/<suite>/partial.json` at once. A later call with the same options, versions
    and code goes on at the next case. At the end the rows replace those of the same cases in `results.json`, and table
    and plot are drawn from that file.

    Args:
        suite: the suite.
        options: how to run it.
        say: receives messages for the user.

    Returns:
        All rows of the suite's results, those of earlier runs of other cases included.

    Raises:
        ValueError: no case matches the pattern, the suite does not run on the device, or its results cannot be read.
    """
    names = suite.select(options.pattern)
    if not names:
        raise ValueError(f"suite {suite.name} has no case that matches {options.pattern!r}; it has {list(suite.cases)}")
    if options.device not in suite.devices:
        raise ValueError(f"suite {suite.name} runs on {', '.join(suite.devices)}; got device {options.device!r}")
    existing(suite, options.output)  # a file that cannot be read is better found before hours of measuring
    folder = options.output / suite.name
    partial = folder / "partial.json"
    torch.set_num_threads(options.threads)
    here = environment.current(options.device)
    identity = _identity(options, here)
    done = {} if options.restart else _read_partial(partial, identity, say)
    if resumed := [name for name in names if name in done]:
        say(f"{suite.name}: resuming after {len(resumed)} of {len(names)} cases ({partial})")

    progress = tqdm(names, desc=suite.name, unit="case", dynamic_ncols=True)
    for name in progress:
        if name in done:
            continue
        progress.set_postfix_str(name)
        context = Context(
            suite.name,
            name,
            here,
            quick=options.quick,
            seed=options.seed,
            data=options.data,
            device=options.device,
            backbone=options.backbone,
        )
        torch.manual_seed(options.seed)
        done[name] = suite.cases[name](context)
        _write_partial(partial, identity, done)

    rows = publish(suite, options.output, {name: done[name] for name in names})
    partial.unlink()
    return rows


def publish(suite: Suite, output: Path, measured: dict[str, list[Row]]) -> list[Row]:
    """Puts newly measured cases into a suite's results and draws its table and plot.

    Args:
        suite: the suite.
        output: folder in which the suite has a folder of results.
        measured: rows by case; they replace the rows of the same cases.

    Returns:
        All rows of the suite.
    """
    folder = output / suite.name
    cases: dict[str, list[Row]] = {}
    for row in existing(suite, output):
        cases.setdefault(row.case, []).append(row)
    # A case that measures nothing, for want of its data, keeps what it had.
    cases.update({name: found for name, found in measured.items() if found})
    # A case that the suite no longer has is dropped; a suite without a list of cases keeps all.
    rows = [row for name in suite.cases or cases for row in cases.get(name, [])]
    Results(suite.name, suite.command, rows).write(folder / "results.json")
    present(suite, folder)
    return rows


def existing(suite: Suite, output: Path) -> list[Row]:
    """Rows of a suite that `output` has already.

    Raises:
        ValueError: the file that should hold them does not.
    """
    path = output / suite.name / "results.json"
    return Results.read(path).rows if path.exists() else []


def present(suite: Suite, folder: Path) -> None:
    """Draws `table.md` and `plot.png` of a suite from the `results.json` beside them."""
    rows = Results.read(folder / "results.json").rows
    (folder / "table.md").write_text(markdown(suite, rows), encoding="utf-8")
    suite.plot(rows, folder / "plot.png")


def markdown(suite: Suite, rows: list[Row]) -> str:
    """All tables of a suite with its title and the command that measures it again."""
    parts = [f"### {suite.title}", f"Measured by `{suite.command}`."]
    parts += [table.markdown() for table in suite.tables(rows)]
    return "\n\n".join(parts) + "\n"


def _identity(options: Options, here: environment.Environment) -> dict[str, Any]:
    """What must be equal for an interrupted run to be gone on with."""
    return {
        **here.as_dict(),
        "code": environment.code_state()[1],
        "quick": options.quick,
        "seed": options.seed,
        "data": options.data and options.data.name,
        "backbone": options.backbone,
    }


def _read_partial(path: Path, identity: dict[str, Any], say: Callable[[str], None]) -> dict[str, list[Row]]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != identity:
            say(f"{path}: left by a run with other options, versions or code; starting afresh")
            return {}
        return {name: [Row.from_dict(row) for row in rows] for name, rows in content["cases"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        say(f"{path}: not readable ({error}); starting afresh")
        return {}


def _write_partial(path: Path, identity: dict[str, Any], done: dict[str, list[Row]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = {name: [row.as_dict() for row in rows] for name, rows in done.items()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"identity": identity, "cases": cases}), encoding="utf-8")
    temporary.replace(path)
