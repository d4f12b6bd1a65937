"""The main job: fine-tune a pretrained network with compressed activations, beside plain backpropagation.

A small residual network is pretrained on half of the classes of a data set and fine-tuned on the other half with plain
backpropagation, in the form of the paper, and in ours, from the same start and with the same batches in the same order.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lance_kernels as lance
from benchmarks import environment, readme
from benchmarks.data import DataError, Images, load
from benchmarks.demo_tables import SUITE
from benchmarks.finetune import Recipe, batches, counted_bytes, loss_of, step, train
from benchmarks.network import ResidualNetwork, freeze_for_fine_tuning, train_mode
from benchmarks.results import Row, make_rows
from benchmarks.runner import existing, publish
from benchmarks.timing import QUICK, Effort, interleave

PLAIN, PUBLISHED, OURS, OURS_SMALL = "plain", "published", "lance", "lance, lower energy"
FALLING_ENERGIES = (0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@dataclass(frozen=True)
class Settings:
    """How to run the demo.

    Attributes:
        pretrain: recipe on the first half of the classes.
        finetune: recipe on the second half.
        layers: `last4` or `all`.
        seeds: a pretraining and a fine-tuning each.
        widths: channels of the network's stages.
        depths: blocks of the network's stages.
        calibration_batches: most batches of the calibration.
        report_batches: batches over which gradient cosines are averaged.
        effort: how long to time the training step.
        quick: whether this is a smoke test.
    """

    pretrain: Recipe
    finetune: Recipe
    layers: str
    seeds: Sequence[int]
    widths: Sequence[int]
    depths: Sequence[int]
    calibration_batches: int = 100
    report_batches: int = 4
    effort: Effort = field(default_factory=lambda: Effort(seconds=12.0, least_rounds=11, most_rounds=200))
    quick: bool = False


@dataclass
class Outcome:
    """What one method gave with one seed."""

    curve: list[float]
    first: dict[str, Any]
    last: dict[str, Any]
    model: nn.Module
    config: lance.LanceConfig | None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from rich.console import Console

    options = _parser().parse_args(argv)
    output = options.output or environment.ROOT / ("build/benchmarks" if options.quick else "benchmarks/results")
    try:
        existing(SUITE, output)
        images = load(options.data)
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    rows = run(images, _settings(options, images), _command(options))
    publish(SUITE, output, {rows[0].case: rows})
    readme.update(output)
    console = Console()
    for table in SUITE.tables(rows):
        console.print(table.rich())
    console.print(f"written to {output / SUITE.name}")
    return 0


def run(images: Images, settings: Settings, command: str) -> list[Row]:
    """Pretrains and fine-tunes with every method and every seed.

    Args:
        images: the data set.
        settings: how to run.
        command: command line that does the same again, kept in the rows.

    Returns:
        Rows of test accuracy, counted compression, bytes held, step time and gradient cosine for each method.
    """
    first, second = images.halves()
    outcomes: list[dict[str, Outcome]] = []
    for seed in settings.seeds:
        torch.manual_seed(seed)
        model = ResidualNetwork(images.train.images.shape[1], first.classes, settings.widths, settings.depths)
        train(model, first, settings.pretrain, seed, f"seed {seed}: pretrain", frozen_norms=False)
        model.replace_head(second.classes, torch.Generator().manual_seed(seed))
        names = freeze_for_fine_tuning(model, settings.layers)
        outcomes.append(_fine_tune_all(model, names, second, settings, seed))
    times = _time_steps(outcomes[-1], second, settings)
    return _rows(images.name, outcomes, times, settings, command, names)


def _fine_tune_all(
    start: ResidualNetwork, names: list[str], data: Images, settings: Settings, seed: int
) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for method in (PLAIN, PUBLISHED, OURS, OURS_SMALL):
        model, config = copy.deepcopy(start), None
        if method == PUBLISHED:
            config = replace(lance.LanceConfig.published(energy=0.7), target_modules=names)
        elif method == OURS:
            config = lance.LanceConfig(target_modules=names)
        elif method == OURS_SMALL:
            config = _within(start, names, outcomes[PUBLISHED].first["counted_bytes"], data, settings, seed)
        if config is not None:
            _compress(model, config, data, settings, seed)
        count = 1 if method == PLAIN else settings.report_batches
        before = _report(model, data, settings.finetune.batch, seed, count)
        curve = train(model, data, settings.finetune, seed, f"seed {seed}: {method}", frozen_norms=True)
        outcomes[method] = Outcome(
            curve, before, _report(model, data, settings.finetune.batch, seed, count), model, config
        )
    return outcomes


def _compress(
    model: nn.Module, config: lance.LanceConfig, data: Images, settings: Settings, seed: int
) -> lance.Calibration:
    """Compresses and calibrates `model` on training batches."""
    lance.compress_(model, config)
    generator = torch.Generator().manual_seed(seed)
    loader = [images for images, _ in batches(data.train, settings.finetune.batch, generator)]
    return lance.calibrate(model, loader, max_batches=min(settings.calibration_batches, len(loader)))


def _within(
    start: ResidualNetwork, names: list[str], most_bytes: int, data: Images, settings: Settings, seed: int
) -> lance.LanceConfig:
    """Our form at the highest energy whose packed cores take at most `most_bytes`, or at the lowest tried."""
    model, config = copy.deepcopy(start), lance.LanceConfig(target_modules=names)
    calibration = _compress(model, config, data, settings, seed)
    for energy in FALLING_ENERGIES:
        config = replace(config, energy=energy)
        if counted_bytes(calibration, calibration.apply(model, config), config.core_bits) <= most_bytes:
            break
    return config


def _report(model: nn.Module, data: Images, batch: int, seed: int, count: int) -> dict[str, Any]:
    """Bytes of the first of `count` training batches, and the gradient cosine averaged over them."""
    train_mode(model, frozen_norms=True)
    generator = torch.Generator().manual_seed(seed + 1)
    reports = []
    for images, labels in batches(data.train, batch, generator):
        reports.append(lance.report(model, images, loss_of(labels)))
        if len(reports) == count:
            break
    cosines = [report.gradient_cosine for report in reports if report.gradient_cosine is not None]
    return {
        "counted_bytes": reports[0].counted_bytes,
        "dense_bytes": reports[0].dense_bytes,
        "held_bytes": reports[0].held_bytes,
        "gradient_cosine": sum(cosines) / len(cosines) if cosines else 1.0,
    }


def _time_steps(outcomes: dict[str, Outcome], data: Images, settings: Settings) -> dict[str, list[float]]:
    """Seconds of a training step of every method, timed side by side."""
    images, labels = next(batches(data.train, settings.finetune.batch, torch.Generator().manual_seed(0)))
    methods = {}
    for name, outcome in outcomes.items():
        model = train_mode(outcome.model, frozen_norms=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

        def one(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            step(model, optimizer, images, labels)

        methods[name] = one
    return interleave(methods, settings.effort)


def _rows(
    name: str,
    outcomes: list[dict[str, Outcome]],
    times: dict[str, list[float]],
    settings: Settings,
    command: str,
    layers: list[str],
) -> list[Row]:
    methods = list(outcomes[0])
    details = {
        method: {
            "command": command,
            "layers": settings.layers,
            "compressed": layers,
            **_config_details(outcomes[0][method], layers),
            "batch": settings.finetune.batch,
            "epochs": settings.finetune.epochs,
            "seeds": list(settings.seeds),
            "curve": [round(sum(values) / len(values), 3) for values in zip(*(o[method].curve for o in outcomes))],
            **outcomes[0][method].first,
        }
        for method in methods
    }

    def of(quantity: str, unit: str, pick: Any) -> list[Row]:
        return make_rows(
            SUITE.name,
            f"{name}, {settings.layers}",
            {method: [pick(outcome[method]) for outcome in outcomes] for method in methods},
            environment=environment.current(),
            quick=settings.quick,
            quantity=quantity,
            unit=unit,
            seed=settings.seeds[0],
            details=details if quantity == "test accuracy" else None,
        )

    rows = of("test accuracy", "%", lambda outcome: outcome.curve[-1])
    rows += of("counted compression", "x", lambda outcome: _compression(outcome.first))
    rows += of("held bytes", "B", lambda outcome: outcome.first["held_bytes"])
    rows += of("gradient cosine before training", "", lambda outcome: outcome.first["gradient_cosine"])
    rows += of("gradient cosine after training", "", lambda outcome: outcome.last["gradient_cosine"])
    return rows + make_rows(
        SUITE.name,
        f"{name}, {settings.layers}",
        times,
        environment=environment.current(),
        quick=settings.quick,
        quantity="step time",
        seed=settings.seeds[-1],
        baseline=PLAIN,
    )


def _compression(report: dict[str, Any]) -> float:
    return report["dense_bytes"] / report["counted_bytes"] if report["counted_bytes"] else 1.0


def _config_details(outcome: Outcome, layers: list[str]) -> dict[str, Any]:
    """The form a method had; `companions` is what the model really got, not what was asked for."""
    if outcome.config is None:
        return {}
    modules = {name: type(module).__module__ for name, module in outcome.model.named_modules()}
    swapped = [name for name, origin in modules.items() if origin.startswith("lance_kernels.") and name not in layers]
    names = ("energy", "core_bits", "batch_mode", "companions")
    details = {name: getattr(outcome.config, name) for name in names}
    return details if swapped else {**details, "companions": "none"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="npz file of CIFAR-10 JPEGs or MNIST arrays (default: digits)")
    parser.add_argument("--layers", choices=("last4", "all"), default="last4", help="convolutions that are trained")
    parser.add_argument("--epochs", type=int, help="epochs of fine-tuning (default 10 for digits, else 3)")
    parser.add_argument("--pretrain-epochs", type=int, help="epochs of pretraining (default 8 for digits, else 6)")
    parser.add_argument("--batch", type=int, help="images a step (default 64)", default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of fine-tuning (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; accuracies are medians over them")
    parser.add_argument("--threads", type=int, default=2, help="threads within an operator (default 2)")
    parser.add_argument("--output", type=Path, help="folder of the results (default benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="one epoch of a tiny network: a smoke test, not a result")
    return parser


def _settings(options: argparse.Namespace, images: Images) -> Settings:
    small = images.train.images.shape[-1] <= 16
    pretrain = options.pretrain_epochs or (1 if options.quick else 8 if small else 6)
    finetune = options.epochs or (1 if options.quick else 10 if small else 3)
    seeds = range(options.seed, options.seed + options.seeds)
    common = {
        "pretrain": Recipe(pretrain, options.batch, 0.05),
        "finetune": Recipe(finetune, options.batch, options.learning_rate),
        "layers": options.layers,
        "seeds": seeds,
    }
    if options.quick:
        return Settings(
            **common,
            widths=(8, 8, 16),
            depths=(1, 1, 2),
            calibration_batches=2,
            report_batches=1,
            effort=QUICK,
            quick=True,
        )
    if small:
        return Settings(**common, widths=(32, 64, 128), depths=(1, 1, 2))
    return Settings(**common, widths=(32, 64, 128, 256), depths=(1, 1, 1, 2))


def _command(options: argparse.Namespace) -> str:
    """The command line that gives the same rows, the data file without its folder."""
    words = ["python", "-m", "benchmarks.demo"]
    defaults = vars(_parser().parse_args([]))
    for name, value in vars(options).items():
        if value == defaults[name] or name == "output":
            continue
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
