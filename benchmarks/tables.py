"""Tables and plots, made from rows of results and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import Row

SECOND_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


@dataclass
class Table:
    """A title, a heading and cells of text, printed as Markdown or by rich.

    Attributes:
        title: what the table shows.
        columns: heading.
        rows: cells.
        caption: paragraphs below the table, a line each.
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    caption: str = ""

    def markdown(self) -> str:
        """The table in Markdown, title and caption included."""
        lines = [f"**{self.title}**", "", _markdown_line(self.columns), _markdown_line(["---"] * len(self.columns))]
        lines += [_markdown_line(row) for row in self.rows]
        if self.caption:
            lines += ["", *"\n\n".join(self.caption.splitlines()).splitlines()]
        return "\n".join(lines)

    def rich(self) -> Any:
        """The table as a `rich.table.Table`."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=self.caption or None, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def value_text(value: float, unit: str) -> str:
    """A number and its unit, to three significant digits; seconds in a fitting multiple."""
    if unit == "s":
        scale, unit = next((entry for entry in SECOND_UNITS if abs(value) >= entry[0]), SECOND_UNITS[-1])
        value /= scale
    return f"{significant(value)} {unit}".strip()


def significant(value: float, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without an exponent."""
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def bytes_text(count: float) -> str:
    """A number of bytes in kB or MB (powers of ten)."""
    return f"{significant(count / 1e6)} MB" if count >= 1e6 else f"{significant(count / 1e3)} kB"


def ratio_text(row: Row) -> str:
    """A row's ratio to its baseline with its spread, as in `0.12 (0.11 to 0.14)`."""
    ratio = row.ratio
    return "-" if ratio is None else f"{ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})"


def missed(row: Row) -> bool:
    """Whether a row has a target and is above it."""
    reached = row.median if row.ratio_median is None else row.ratio_median
    return row.target is not None and reached > row.target


def environment_text(rows: Sequence[Row]) -> str:
    """Hardware, threads, versions and commits of the rows, in one sentence for each that occurs."""
    sentences = ["A smoke test: sizes and rounds are cut down."] if any(row.quick for row in rows) else []
    for environment in {tuple(sorted(row.environment.items())): row.environment for row in rows}.values():
        commit = str(environment["commit"])[:10] + (" with local changes" if environment["dirty"] else "")
        sentences.append(
            f"{environment['hardware']}, {environment['threads']} threads, {environment['wait_policy']} waiting, "
            f"PyTorch {environment['torch']}, Python {environment['python']}, lance_kernels {environment['lance']} "
            f"(kernels: {environment['kernels']}), commit {commit}."
        )
    return " ".join(sentences)


def generic_tables(rows: list[Row]) -> list[Table]:
    """One table of all rows: case, method, value, ratio to the baseline and target."""
    table = Table(
        title="Measured (median and, for ratios, 10th to 90th percentile of interleaved rounds)",
        columns=("case", "method", "value", "over baseline", "target"),
        caption=environment_text(rows),
    )
    for row in rows:
        target = "" if row.target is None else f"at most {row.target:g}"
        table.rows.append((row.case, row.method, value_text(row.median, row.unit), ratio_text(row), target))
    return [table]


def generic_plot(rows: list[Row], path: Path) -> None:
    """Bars of every ratio with its 10th to 90th percentile, targets as marks."""
    pairs = [(row, row.ratio) for row in rows if row.ratio is not None]
    compared, ratios = [row for row, _ in pairs], [ratio for _, ratio in pairs]
    figure, axes = new_figure(width=9.0, height=1.2 + 0.28 * max(len(compared), 3))
    positions = range(len(compared))
    axes.barh(
        positions,
        [ratio.median for ratio in ratios],
        xerr=[[ratio.median - ratio.p10 for ratio in ratios], [ratio.p90 - ratio.median for ratio in ratios]],
        color=["tab:orange" if missed(row) else "tab:blue" for row in compared],
        error_kw={"elinewidth": 0.8, "capsize": 2},
    )
    targets = [(position, row.target) for position, row in zip(positions, compared) if row.target is not None]
    heights, marks = [position for position, _ in targets], [target for _, target in targets]
    axes.plot(marks, heights, "k|", markersize=9, label="target (orange: missed)")
    axes.set_yticks(positions, [f"{row.case}: {row.method}" for row in compared], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ratio to the baseline of the same round")
    if targets:
        axes.legend(loc="lower right", fontsize=7)
    save_figure(figure, path)


def new_figure(width: float, height: float, columns: int = 1, lines: int | None = None) -> tuple[Any, Any]:
    """A figure and its axes (an array of lines of axes when `lines` is given), drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines or 1, columns, squeeze=lines is None)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG without a date, so that equal results give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
