"""The fine-tuning demo, cut down, and its network."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import demo, environment
from benchmarks.data import Split
from benchmarks.finetune import batches
from benchmarks.network import ResidualNetwork, convolutions, freeze_for_fine_tuning, train_mode
from benchmarks.results import Results


@pytest.fixture
def network() -> ResidualNetwork:
    return ResidualNetwork(1, 5, (4, 6, 8), (1, 1, 2))


def test_last_four_convolutions_and_head_are_trained(network: ResidualNetwork) -> None:
    names = freeze_for_fine_tuning(network, "last4")
    assert names == convolutions(network)[-4:]
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.weight" for name in names} | {"head.weight", "head.bias"}
    train_mode(network, frozen_norms=True)
    assert not any(module.training for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))


def test_all_convolutions_are_trained(network: ResidualNetwork) -> None:
    assert freeze_for_fine_tuning(network, "all") == convolutions(network)
    assert not network.stem[1].weight.requires_grad


def test_equal_seeds_give_equal_batches() -> None:
    split = Split(torch.arange(10.0), torch.arange(10))
    first, second = (
        [labels.tolist() for _, labels in batches(split, 4, torch.Generator().manual_seed(3))] for _ in range(2)
    )
    assert first == second
    assert [len(labels) for labels in first] == [4, 4]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.demo", *arguments]
    return subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("layers", ["last4", "all"])
def test_quick_demo(layers: str, tmp_path: Path) -> None:
    done = run_demo("--quick", "--layers", layers, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Fine-tuning on the other half" in done.stdout
    rows = {(row.method, row.quantity): row for row in Results.read(tmp_path / "demo" / "results.json").rows}
    methods = (demo.PLAIN, demo.PUBLISHED, demo.OURS, demo.OURS_SMALL)
    assert {method for method, _ in rows} == set(methods)
    for method in methods[1:]:
        assert rows[method, "counted compression"].median > 1
        assert 0 < rows[method, "gradient cosine before training"].median <= 1
        assert rows[method, "step time"].ratio_median > 0
        least = 4 if rows[method, "test accuracy"].details["companions"] == "exact" else 0.99
        assert rows[demo.PLAIN, "held bytes"].median > least * rows[method, "held bytes"].median
    counted = {method: rows[method, "test accuracy"].details["counted_bytes"] for method in methods}
    assert 0 < counted[demo.OURS_SMALL] <= counted[demo.OURS]
    assert rows[demo.PLAIN, "gradient cosine after training"].median == pytest.approx(1)
    assert (tmp_path / "demo" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "table.md").exists()


def test_data_error_names_the_file_and_ends_with_two(tmp_path: Path) -> None:
    path = tmp_path / "absent.npz"
    done = run_demo("--data", str(path))
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {path}: no such file"


def test_command_leaves_out_defaults_and_folders() -> None:
    options = demo._parser().parse_args(["--data", "/some/where/images.npz", "--epochs", "4", "--seed", "0"])
    assert demo._command(options) == "python -m benchmarks.demo --data images.npz --epochs 4"
