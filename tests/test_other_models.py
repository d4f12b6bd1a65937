"""Models that nobody here wrote, from `compress_` to `revert_`; what becomes of them is in docs/models.md."""

from __future__ import annotations

import pytest

from tests.other_models import MODELS, PAGE, check


@pytest.mark.parametrize("name", MODELS)
def test_everything(name):
    row = check(name)
    assert row["compressed"] > 0
    # What is compressed and what is left is as the page says; figures in bits may differ between machines.
    written = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in written.strip("|").split("|")]
    assert cells[1:4] == [str(row["compressed"]), str(row["shared"]), row["left"]]
