"""The GPU suite, tried out on the CPU: rows, floors, and what ncu prints."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import dram, shapes
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.device import copies_for, measure
from benchmarks.results import Results


def test_floors_are_those_of_the_counted_bytes():
    projections = [shapes.projection_floor(layer, 2) for layer in (shapes.WIDE, shapes.IMAGE_56, shapes.IMAGE_14)]
    assert [round(seconds * 1e6) for seconds in projections] == [359, 137, 34]
    assert round(shapes.weight_grad_floor(shapes.WIDE, 2) * 1e6) == 370
    # 128 x 256 x 28 x 28 gradients, cores of 128 x 32 x 6 x 6 and a weight of 256 x 256 x 3 x 3, two bytes each.
    counted = 2 * (128 * 256 * 784 + 128 * 32 * 36 + 256 * 256 * 9) / 3.0e12
    assert shapes.weight_grad_floor(shapes.CONV_28, 2) == pytest.approx(counted)


def test_a_trial_writes_each_case_and_keeps_the_others(tmp_path, capsys):
    path = tmp_path / "results.json"
    trial = ["--device", "cpu", "--quick", "--output", str(path)]
    for pattern in ("projection: 256x1024*", "linear step: D=192*", "*weight gradient: 512*", "accuracy: 512*"):
        assert main([*trial, "--case", pattern]) == 0
    results = Results.read(path)
    assert {row.case.split(":")[0] for row in results.rows} == {
        "projection",
        "linear step",
        "convolution weight gradient",
        "accuracy",
    }
    assert all(row.quick and row.median > 0 for row in results.rows)
    over_floor = [row for row in results.rows if row.quantity == "time over floor"]
    assert [row.target for row in over_floor] == pytest.approx([1 / 0.75, 1 / 0.6])
    assert "written to" in capsys.readouterr().out


def test_bad_command_lines_are_refused(capsys):
    assert main(["--case", "nothing*"]) == 2
    assert main(["--device", "cpu"]) == 2
    assert "--quick" in capsys.readouterr().err
    assert main(["--list", "--case", "model step*"]) == 2
    assert main(["--list", "--models", "--case", "model step*"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


def test_samples_of_one_round_are_side_by_side():
    seen = []
    methods = {name: lambda copy, name=name: seen.append((name, copy)) for name in ("a", "b")}
    samples = measure(methods, [1, 2], "cpu", rounds=5, seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    assert sorted(seen) == sorted([(name, copy) for name in "ab" for copy in (1, 2)] * 3)
    with pytest.raises(ValueError, match="copies is empty"):
        measure(methods, [], "cpu", rounds=1, seconds=0.0)


def test_copies_outgrow_the_cache():
    assert copies_for(2**40) == 1
    assert copies_for(2**26) * 2**26 >= 2 * 50e6


def test_what_ncu_prints_is_read():
    output = (
        "==PROF== Connected\nstreamed 1000\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","project_kernel","dram__bytes_read.sum","Kbyte","1,024.5"\n'
    )
    assert dram.parse(output) == (1024500.0, 1000.0)
    with pytest.raises(ValueError, match="ncu counted nothing"):
        dram.parse("streamed 1000\n")
