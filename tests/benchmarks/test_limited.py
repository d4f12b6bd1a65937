"""The fine-tuning under a memory limit, small: plain PyTorch runs out of memory, compressed activations do not."""

from __future__ import annotations

from benchmarks import limited


def test_ours_finishes_where_plain_does_not():
    results = limited.run_both(
        ["--megabytes", "600", "--batch", "32", "--size", "96", "--steps", "2", "--threads", "1"]
    )
    assert not results["plain"]["finished"]
    assert "memory" in str(results["plain"]["error"]).lower()
    assert results["lance"]["finished"]
    assert results["lance"]["steps"] == 2
