"""Results of several folders put together."""

from __future__ import annotations

from benchmarks import environment
from benchmarks.merge import main
from benchmarks.results import Results, make_rows


def write(path, suite, **values):
    rows = []
    for case, value in values.items():
        for quantity in ("time", "time over floor", "slope"):
            rows += make_rows(
                suite,
                case,
                {"lance": [value]},
                environment=environment.current(),
                quick=True,
                quantity=quantity,
                details={"lance": {"elements": [1, 2], "seconds": [1.0, 2.0]}},
            )
    Results(suite, "command", rows).write(path)
    return str(path)


def test_cases_are_joined_and_later_files_win(tmp_path):
    first = write(tmp_path / "one.json", "ops", relu=1.0, mode_gram=1.5)
    second = write(tmp_path / "two.json", "ops", relu=3.0)
    assert main([first, second, "--output", str(tmp_path / "results")]) == 0
    rows = Results.read(tmp_path / "results" / "ops" / "results.json").rows
    found = {row.case: row.median for row in rows if (row.method, row.quantity) == ("lance", "time")}
    assert found == {"relu": 3.0, "mode_gram": 1.5}
    assert (tmp_path / "results" / "ops" / "table.md").exists()


def test_what_is_no_result_is_refused(tmp_path, capsys):
    assert main([write(tmp_path / "one.json", "nothing", relu=1.0)]) == 2
    assert "'nothing'; expected one of" in capsys.readouterr().err
    assert main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json" in capsys.readouterr().err
