"""The README's tables are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks import readme


def test_readme_shows_the_committed_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    shown = {match["suite"] for match in readme.MARKED.finditer(text)}
    assert shown == {"continual", "cpu", "demo", "finetune", "gpu", "layers", "memory", "models", "ops"}
    assert readme.render(text) == text
    assert readme.main(["--check"]) == 0


def test_marked_part_is_replaced_and_the_rest_kept() -> None:
    text = "before\n<!-- results: cpu -->\nold\n<!-- end of results -->\nafter\n"
    fresh = readme.render(text)
    assert fresh.startswith("before\n<!-- results: cpu -->\n### ")
    assert fresh.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in fresh


def test_marker_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cpu"):
        readme.render("<!-- results: cpu -->\n<!-- end of results -->", tmp_path)
