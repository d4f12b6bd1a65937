"""The runner: registry, schema, resuming, merging and the tables made from the files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import demo_tables, environment
from benchmarks.registry import SUITES, Context, Suite, register
from benchmarks.results import Results, Row, make_rows, validate
from benchmarks.runner import Options, markdown, run
from benchmarks.suites import cpu
from benchmarks.tables import significant, value_text
from benchmarks.timing import QUICK, interleave

RESULTS = environment.ROOT / "benchmarks" / "results"


def rows_of(context: Context, value: float) -> list[Row]:
    return make_rows(
        context.suite,
        context.case,
        {"plain": [value, 2 * value], "lance": [value / 2, value]},
        environment=context.environment,
        quick=context.quick,
        baseline="plain",
        targets={"lance": 0.4},
    )


class Counting:
    """A suite of three cases that counts calls and can be interrupted in the second."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.interrupt = False
        self.suite = Suite("counting", "Counting", "python -m benchmarks --suite counting")
        for name in ("first", "second", "third"):
            self.suite.case(name)(self._measure(name))

    def _measure(self, name: str) -> Callable[[Context], list[Row]]:
        def measure(context: Context) -> list[Row]:
            if self.interrupt and name == "second":
                raise KeyboardInterrupt
            self.calls.append(name)
            return rows_of(context, 1.0)

        return measure


@pytest.fixture
def counting() -> Counting:
    return Counting()


def test_registry_refuses_two_of_a_name(counting: Counting) -> None:
    with pytest.raises(ValueError, match="two cases named first"):
        counting.suite.case("first")(lambda context: [])
    with pytest.raises(ValueError, match="two suites are named cpu"):
        register(Suite("cpu", "", ""))


def test_cases_are_selected_by_shell_pattern(counting: Counting) -> None:
    assert counting.suite.select("*ir*") == ["first", "third"]
    assert counting.suite.select("none") == []


def test_cpu_suite_has_every_layer_of_its_table() -> None:
    for question in ("weight gradient", "whole step", "projection", "over published"):
        assert len(cpu.SUITE.select(f"{question}: *")) == 6
    assert cpu.SUITE.select("model step: ResNet-18*")
    assert cpu.SUITE.select("model step: MobileNetV2*")
    assert cpu.SUITE.select("calibration: ResNet-18*")
    assert cpu.SUITE.select("growth: *")


def test_interrupted_run_goes_on_at_the_next_case(counting: Counting, tmp_path: Path) -> None:
    counting.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run(counting.suite, Options(tmp_path))
    assert counting.calls == ["first"]
    assert not (tmp_path / "counting" / "results.json").exists()

    counting.interrupt = False
    messages: list[str] = []
    rows = run(counting.suite, Options(tmp_path), messages.append)
    assert counting.calls == ["first", "second", "third"]
    assert "resuming after 1 of 3" in messages[0]
    assert [row.case for row in rows] == ["first", "first", "second", "second", "third", "third"]
    assert not (tmp_path / "counting" / "partial.json").exists()


@pytest.mark.parametrize("change", [{"seed": 5}, {"quick": True}, {"threads": 1}, {"restart": True}])
def test_other_options_start_afresh(counting: Counting, tmp_path: Path, change: dict[str, object]) -> None:
    counting.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        run(counting.suite, Options(tmp_path))
    counting.interrupt = False
    run(counting.suite, Options(tmp_path, **change))
    assert counting.calls == ["first", "first", "second", "third"]


def test_damaged_partial_file_starts_afresh(counting: Counting, tmp_path: Path) -> None:
    (tmp_path / "counting").mkdir()
    (tmp_path / "counting" / "partial.json").write_text('{"identity"')
    messages: list[str] = []
    run(counting.suite, Options(tmp_path), messages.append)
    assert counting.calls == ["first", "second", "third"]
    assert "not readable" in messages[0]


def test_one_case_replaces_its_own_rows_only(counting: Counting, tmp_path: Path) -> None:
    run(counting.suite, Options(tmp_path, seed=1))
    counting.suite.cases["second"] = lambda context: rows_of(context, 3.0)
    rows = run(counting.suite, Options(tmp_path, pattern="second"))
    assert [(row.case, row.median) for row in rows if row.method == "plain"] == [
        ("first", 1.5),
        ("second", 4.5),
        ("third", 1.5),
    ]


def test_unreadable_results_are_found_before_measuring(counting: Counting, tmp_path: Path) -> None:
    (tmp_path / "counting").mkdir()
    (tmp_path / "counting" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json holds no benchmark results"):
        run(counting.suite, Options(tmp_path))
    assert counting.calls == []


def test_no_matching_case_is_an_error(counting: Counting, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no case that matches 'x'"):
        run(counting.suite, Options(tmp_path, pattern="x"))


def test_written_rows_follow_the_schema(counting: Counting, tmp_path: Path) -> None:
    run(counting.suite, Options(tmp_path, threads=1))
    path = tmp_path / "counting" / "results.json"
    for row in json.loads(path.read_text())["rows"]:
        validate(row)
        assert row["threads"] == 1
        assert row["hardware"]
        assert row["torch"]
        assert row["commit"]
    results = Results.read(path)
    results.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert (tmp_path / "counting" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median": "fast"}, "median"),
        ({"seed": 1.5}, "seed"),
        ({"extra": 1}, "extra"),
        ({"commit": None}, "commit"),
    ],
)
def test_wrong_rows_are_refused(change: dict[str, object], message: str) -> None:
    context = Context("suite", "case", environment.current())
    row = rows_of(context, 1.0)[0].as_dict()
    with pytest.raises(ValueError, match=message):
        validate({**row, **change})
    del row["hardware"]
    with pytest.raises(ValueError, match="hardware"):
        validate(row)


def test_file_without_results_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"results\.json holds no benchmark results"):
        Results.read(path)


def test_ratios_pair_the_same_round() -> None:
    rows = make_rows(
        "suite",
        "case",
        {"plain": [1.0, 10.0, 100.0], "lance": [0.5, 4.0, 60.0]},
        environment=environment.current(),
        quick=False,
        baseline="plain",
    )
    assert rows[0].baseline is None
    assert rows[1].ratio_median == pytest.approx(0.5)
    assert rows[1].ratio_p10 == pytest.approx(0.42)
    assert rows[1].ratio_p90 == pytest.approx(0.58)
    with pytest.raises(ValueError, match="longer"):
        make_rows(
            "suite",
            "case",
            {"plain": [1.0, 2.0], "lance": [1.0]},
            environment=environment.current(),
            quick=False,
            baseline="plain",
        )


def test_every_round_measures_every_method() -> None:
    order: list[str] = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, QUICK)
    assert len(samples["a"]) == len(samples["b"]) >= QUICK.least_rounds
    assert sorted(order[-2:]) == ["a", "b"]


def test_numbers_are_written_without_exponents() -> None:
    assert [significant(value) for value in (1234.5, 0.01234, 12.34, 0.0)] == ["1230", "0.0123", "12.3", "0"]
    assert [value_text(value, "s") for value in (2.5, 2.5e-3, 2.5e-5)] == ["2.5 s", "2.5 ms", "25 µs"]


def test_command_line_lists_and_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command_line.main(["--list", "--suite", "cpu"]) == 0
    assert "whole step: linear 768->3072" in capsys.readouterr().out
    assert command_line.main(["--case", "nothing", "--output", str(tmp_path)]) == 2
    assert "no case" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", ["*: linear 192*", "growth: tucker_project, conv*", "*: conv 64*"])
def test_quick_cpu_suite_runs(pattern: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--suite", "cpu", "--quick", "--case", pattern, "--output", str(tmp_path)]
    assert command_line.main(arguments) == 0
    results = Results.read(tmp_path / "cpu" / "results.json")
    assert {row.case for row in results.rows} == set(cpu.SUITE.select(pattern))
    assert all(row.quick and row.median != 0 for row in results.rows)
    assert "smoke test" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["cpu", "demo"])
def test_committed_tables_are_made_from_the_committed_rows(name: str) -> None:
    rows = Results.read(RESULTS / name / "results.json").rows
    assert not any(row.quick for row in rows)
    assert (RESULTS / name / "table.md").read_text(encoding="utf-8") == markdown(SUITES[name], rows)
    assert SUITES[name].tables is not None
    assert demo_tables.SUITE is SUITES["demo"]
