"""Two measurements beside each other."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks import environment
from benchmarks.compare import comparison, earlier
from benchmarks.results import Results, make_rows


def rows(suite="demo", **values):
    return make_rows(
        suite,
        "case",
        {name: [value] for name, value in values.items()},
        environment=environment.current(),
        quick=True,
        baseline="plain",
    )


def test_both_and_their_ratio_are_shown():
    table = comparison(rows(plain=2.0, ours=1.0), rows(plain=4.0, ours=1.0, new=3.0), "before")
    assert [row[1:] for row in table.rows] == [
        ("plain", "time", "2 s", "4 s", "2", "", ""),
        ("ours", "time", "1 s", "1 s", "1", "0.5", "0.25"),
    ]
    assert "2 of 3 values now and of 2 then" in table.caption


def test_earlier_rows_come_from_a_file_or_a_revision(tmp_path):
    repository = tmp_path / "repository"
    path = repository / "benchmarks" / "results" / "demo" / "results.json"
    Results("demo", "command", rows(plain=2.0)).write(path)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, "-C", str(repository), *arguments], check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    Results("demo", "command", rows(plain=3.0)).write(path)
    assert earlier("HEAD", "demo", repository)[0].median == 2.0
    assert earlier(str(path), "demo", repository)[0].median == 3.0
    with pytest.raises(ValueError, match="'nowhere' is no file, and git has no nowhere:benchmarks/results/demo"):
        earlier("nowhere", "demo", repository)
    with pytest.raises(ValueError, match="suite 'demo'; expected 'cpu'"):
        earlier(str(path), "cpu", repository)
