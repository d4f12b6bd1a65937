"""Suite `finetune`: accuracy, gradients, bytes, operations and time of every method on one fine-tuning task.

A network is pretrained on the first half of a data set's classes, once, and fine-tuned on the other half. What comes
before the trained layers is frozen and there is no augmentation, so its output is computed once for all methods.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from torch import nn

import lance_kernels as lance
from benchmarks import methods
from benchmarks.data import Images, Split, load
from benchmarks.finetune import Recipe, batches, train
from benchmarks.methods import Batch, Method
from benchmarks.methods.steps import measure_steps
from benchmarks.network import freeze_for_fine_tuning, restart_head, train_mode
from benchmarks.pretrained import backbone, pretrained
from benchmarks.registry import Context, Suite, register
from benchmarks.results import Row
from benchmarks.suites import finetune_tables
from benchmarks.suites.models import OPERATIONS, TIMES, choose_layers

PRETRAIN = Recipe(6, 64, 0.05)
SHORT, LONG, PAPERS = "3 epochs", "15 epochs", "paper's recipe"
# The third is the paper's: SGD at 0.05, batch 128, 100 calibration batches, energy 0.7.
RECIPES = {SHORT: Recipe(3, 64, 0.02), LONG: Recipe(15, 64, 0.02), PAPERS: Recipe(3, 128, 0.05)}
# Every second training image, so that the claims take about an hour of one core.
EVERY = 2
SEEDS = 5
CALIBRATION_BATCHES = 100
SHARE = 100
PLAIN, PUBLISHED = "plain", "published, energy 0.7"
AT_PUBLISHED, AT_SHARE = "lance, at the published form's bytes", f"lance, at 1/{SHARE} of the bytes"
SIGNS_AT_PUBLISHED = "lance, 1 bit, at the published form's bytes"
SIGNS_AT_SHARE = f"lance, 1 bit and fewer operations, at 1/{SHARE} of the bytes"
# Operations of projections and weight gradients over the dense weight gradients', for a step within `OPERATIONS`.
MAX_WORK = {"last2": 0.6, "last4": 0.6, "all": 0.25}

SUITE = register(
    Suite(
        "finetune",
        "Fine-tuning: every method on the same task",
        "python -m benchmarks --suite finetune --data PATH --threads 1",
        tables=finetune_tables.tables,
        plot=finetune_tables.plot,
        devices=("cpu", "cuda"),
    )
)


class Task:
    """One seed's fine-tuning: the layers that are trained, their input data, a fresh head.

    Attributes:
        model: the trained part of the network, its last layers, in training mode.
        names: its convolutions.
        layers: which of the whole network's they are, as `parts` takes it.
        data: the frozen part's outputs in place of images.
        recipe: how to train.
        seed: seed of head and order.
    """

    def __init__(
        self, start: nn.Module, names: list[str], data: Images, layers: str, recipe: Recipe, seed: int
    ) -> None:
        self.model, self.names, self.data = copy.deepcopy(start), names, data
        self.layers, self.recipe, self.seed = layers, recipe, seed
        restart_head(self.model, data.classes, torch.Generator().manual_seed(seed))
        train_mode(self.model, frozen_norms=True)

    @cached_property
    def loader(self) -> list[Batch]:
        """Batches to calibrate on."""
        found = []
        for batch in batches(self.data.train, self.recipe.batch, torch.Generator().manual_seed(self.seed)):
            found.append(batch)
            if len(found) == CALIBRATION_BATCHES:
                break
        return found

    @cached_property
    def dense_bytes(self) -> int:
        """What a plain step keeps for the layers' weight gradients."""
        return methods.dense_bytes(self.model, self.names, self.loader[0])

    @cache  # noqa: B019 - a task lives as long as its case
    def published_bytes(self, energy: float = 0.7) -> int:
        """What a step of the published form keeps."""
        model = methods.published(energy).apply(self.model, self.names, self.loader)
        return methods.counted_bytes(model, self.names, self.loader[0])


@cache
def parts(
    data: Path | None, layers: str, quick: bool, seed: int, device: str = "cpu", name: str | None = None
) -> tuple[nn.Module, list[str], Images]:
    """The pretrained network cut before its first trained block, and what the part before makes of the data.

    A backbone of timm or torchvision stays whole, and is fine-tuned on all classes.

    Args:
        data: file or folder of images.
        layers: `last2`, `last4` or `all`.
        quick: pretrain a tiny network shortly.
        seed: of pretraining.
        device: where both are put.
        name: of a backbone; None for the benchmarks' own network.

    Returns:
        The part to train, names of its layers, and half of the second half of the classes' images as its inputs.
    """
    images = load(data)
    if name is not None:
        whole = backbone(name, images.classes).to(device)
        return whole, choose_layers(whole, layers), _scaled(images, device)
    if quick:
        model = pretrained(images, Recipe(4, 32, 0.05), seed, widths=(8, 8, 16), depths=(1, 1, 2))
    else:
        model = pretrained(images, PRETRAIN, seed)
    _, second = images.halves()
    every = slice(None, None, EVERY)
    second = replace(second, train=Split(second.train.images[every], second.train.labels[every]))
    chosen = freeze_for_fine_tuning(model, layers)
    if layers == "all":
        return model.to(device), chosen, second.to(device)
    first = int(chosen[0].split(".")[1])
    trunk = nn.Sequential(model.stem, model.blocks[:first]).eval()
    model.stem, model.blocks = nn.Identity(), model.blocks[first:]  # a slice keeps the blocks' names

    def through(split: Split) -> Split:
        with torch.no_grad():
            return Split(torch.cat([trunk(part) for part in split.images.split(256)]), split.labels)

    cut = Images(second.name, through(second.train), through(second.test), second.classes)
    return model.to(device), chosen, cut.to(device)


def _scaled(images: Images, device: str) -> Images:
    """All classes, scaled by mean and deviation of the training images."""
    mean = images.train.images.mean((0, 2, 3), keepdim=True)
    deviation = images.train.images.std((0, 2, 3), keepdim=True)
    train, test = (Split((part.images - mean) / deviation, part.labels) for part in (images.train, images.test))
    return Images(images.name, train, test, images.classes).to(device)


def task(context: Context, layers: str, recipe: str, seed: int) -> Task:
    """The task of one seed of fine-tuning; all seeds start from the one network of the context's seed."""
    chosen = Recipe(1, 64, 0.01) if context.quick else RECIPES[recipe]
    made = parts(context.data, layers, context.quick, context.seed, context.device, context.backbone)
    return Task(*made, layers, chosen, seed)


Make = Callable[[Task], Method]
CLAIMS: dict[str, Make] = {
    PLAIN: lambda task: methods.plain(),
    PUBLISHED: lambda task: methods.published(0.7),
    AT_PUBLISHED: lambda task: methods.ours(budget_bytes=task.published_bytes()),
    AT_SHARE: lambda task: methods.ours(budget_bytes=task.dense_bytes // SHARE),
    SIGNS_AT_PUBLISHED: lambda task: methods.ours(budget_bytes=task.published_bytes(), core_bits=1),
    SIGNS_AT_SHARE: lambda task: methods.ours(
        budget_bytes=task.dense_bytes // SHARE, core_bits=1, max_work=MAX_WORK[task.layers]
    ),
}
RIVALS: dict[str, Make] = {
    "HOSVD every step": lambda task: methods.hosvd(budget_bytes=task.dense_bytes // SHARE),
    "HOSVD every step, 4 bits": lambda task: methods.hosvd(bits=4, budget_bytes=task.dense_bytes // SHARE),
    "ASI": lambda task: methods.asi(budget_bytes=task.dense_bytes // SHARE),
    "ASI, 4 bits": lambda task: methods.asi(bits=4, budget_bytes=task.dense_bytes // SHARE),
    "gradient filtering, R=4": lambda task: methods.gradient_filtering(4),
    "gradient filtering, R=4, 4 bits": lambda task: methods.gradient_filtering(4, 4),
    "published, 4 bits": lambda task: methods.published(0.85, 4),
    "published, 1 bit": lambda task: methods.published(0.9, 1),
    "gradient filtering, R=2, 1 bit": lambda task: methods.gradient_filtering(2, 1),
    "LoRA, rank 8": lambda task: methods.lora(8),
}
IN_4_BITS = ("HOSVD every step, 4 bits", "ASI, 4 bits", "gradient filtering, R=4, 4 bits")
FORMS: dict[str, Make] = {
    f"lance, energy 0.85, {bits or 32} bits": partial(
        lambda bits, task: methods.ours(energy=0.85, core_bits=bits), bits
    )
    for bits in (None, 8, 4, 2)
}
FORMS["lance, energy 0.85, 4 bits, no companions"] = lambda task: methods.ours(energy=0.85, companions="none")
ENERGIES = (0.5, 0.7, 0.85, 0.95)
GRADIENT_ENERGIES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Outcome:
    """What one seed gave."""

    curve: list[float]
    counted: int
    dense: int


def accuracy_case(layers: str, recipe: str, name: str, make: Make, seeds: int, context: Context) -> list[Row]:
    """Test accuracy after fine-tuning by one method with several seeds; seeds are the same for all methods."""
    outcomes = []
    numbers = range(context.seed, context.seed + (1 if context.quick else seeds))
    for seed in numbers:
        work = task(context, layers, recipe, seed)
        model = make(work).apply(work.model, work.names, work.loader)
        counted = methods.counted_bytes(model, work.names, work.loader[0])
        title = f"{context.case}, seed {seed}"
        curve = train(model, work.data, work.recipe, seed, title, frozen_norms=True)
        outcomes.append(Outcome(curve, counted, work.dense_bytes))
    details = {
        "layers": layers,
        "recipe": recipe,
        "seeds": list(numbers),
        "curves": [outcome.curve for outcome in outcomes],
        "counted_bytes": [outcome.counted for outcome in outcomes],
        "dense_bytes": outcomes[0].dense,
    }
    return context.rows(
        {name: [o.curve[-1] for o in outcomes]}, quantity="test accuracy", unit="%", details={name: details}
    )


def gradients_case(layers: str, context: Context) -> list[Row]:
    """Gradient cosine of ours at the bytes of the published form at several energies, by layer.

    Each form is calibrated once; the batches of the gradients are in another order than those of calibration.
    """
    work = task(context, layers, SHORT, context.seed)
    published, ours = lance.LanceConfig.published(), lance.LanceConfig(companions="none")
    forms: dict[str, tuple[nn.Module, lance.Calibration]] = {}
    for name, config in (("published", published), ("lance", ours)):
        model = copy.deepcopy(work.model)
        lance.compress_(model, replace(config, target_modules=work.names))
        forms[name] = model, lance.calibrate(model, work.loader, max_batches=CALIBRATION_BATCHES, progress=False)
    rows = []
    for energy in GRADIENT_ENERGIES:
        model, calibration = forms["published"]
        calibration.apply(model, replace(published, energy=energy))
        budget = methods.counted_bytes(model, work.names, work.loader[0])
        model, calibration = forms["lance"]
        lance.plan(model, calibration, budget).apply(model, calibration)
        for name, (model, _) in forms.items():
            rows += _gradient_rows(context, work, f"{name}, energy {energy:g}", model, {"form": name, "energy": energy})
    return rows


def rivals_gradients_case(context: Context) -> list[Row]:
    """Gradient cosine of every method before training, ours at a share of the bytes and at each rival's."""
    work = task(context, "last4", SHORT, context.seed)
    makers = {name: make(work) for name, make in {**CLAIMS, **RIVALS}.items() if not name.startswith("LoRA")}
    rows = []
    for name, method in makers.items():
        model = method.apply(work.model, work.names, work.loader)
        rows += _gradient_rows(context, work, name, model, {"form": name})
    return rows


def _gradient_rows(
    context: Context, work: Task, name: str, model: nn.Module, details: dict[str, float | str]
) -> list[Row]:
    count = 2 if context.quick else 8
    order = torch.Generator().manual_seed(work.seed + 1)
    tested = [batch for batch, _ in zip(batches(work.data.train, work.recipe.batch, order), range(count))]
    cosines, relative = methods.errors(model, work.model, work.names, tested)
    found = {
        **details,
        "counted_bytes": methods.counted_bytes(model, work.names, work.loader[0]),
        "dense_bytes": work.dense_bytes,
        "cosines": cosines,
        "relative_errors": relative,
    }
    return context.rows({name: list(cosines.values())}, quantity="gradient cosine", unit="", details={name: found})


def steps_case(layers: str, timed: bool, context: Context) -> list[Row]:
    """Bytes and operations of one step and, when `timed`, its time, all methods in turns."""
    work = task(context, layers, SHORT, context.seed)
    chosen = {**CLAIMS, **RIVALS, **FORMS, "checkpointed by block": lambda task: methods.checkpointed()}
    makers = {name: partial(make, work) for name, make in chosen.items()}
    targets = {"operations": OPERATIONS[layers], "step time": TIMES[layers]}
    aims = {quantity: dict.fromkeys((AT_SHARE, SIGNS_AT_SHARE), most) for quantity, most in targets.items()}
    return measure_steps(context, work.model, work.names, work.loader[:10], makers, aims, timed=timed)


def _register() -> None:
    def accuracy(layers: str, recipe: str, makers: dict[str, Make], seeds: int) -> None:
        for name, make in makers.items():
            case = f"accuracy: {layers}, {recipe}: {name}"
            SUITE.case(case)(partial(accuracy_case, layers, recipe, name, make, seeds))

    SUITE.case("gradients: all")(partial(gradients_case, "all"))
    SUITE.case("gradients: last4, every method")(rivals_gradients_case)
    for layers in ("last4", "all"):
        SUITE.case(f"operations: {layers}")(partial(steps_case, layers, False))
        SUITE.case(f"step: {layers}")(partial(steps_case, layers, True))
    in_4_bits = {name: make for name, make in RIVALS.items() if name in IN_4_BITS}
    others = {name: make for name, make in RIVALS.items() if name not in IN_4_BITS}
    shares = {name: CLAIMS[name] for name in (PLAIN, AT_SHARE, SIGNS_AT_SHARE)}
    accuracy("last4", SHORT, CLAIMS, SEEDS)
    accuracy("last4", SHORT, in_4_bits, SEEDS)
    accuracy("last4", LONG, shares, SEEDS)
    accuracy("all", SHORT, {**shares, PUBLISHED: CLAIMS[PUBLISHED]}, SEEDS)
    accuracy("all", LONG, shares, SEEDS)
    accuracy("last4", SHORT, others, 3)
    accuracy("last4", SHORT, {**FORMS, **sweep()}, 1)
    accuracy("last2", SHORT, CLAIMS, 1)
    accuracy("last4", PAPERS, CLAIMS, 1)


def sweep() -> dict[str, Make]:
    """Both forms over the energies, for the plots of accuracy over bytes."""
    found: dict[str, Make] = {}
    for energy in ENERGIES:
        if energy != 0.7:
            found[f"published, energy {energy:g}"] = partial(lambda energy, task: methods.published(energy), energy)
        if energy != 0.85:
            name = f"lance, energy {energy:g}, 4 bits"
            found[name] = partial(lambda energy, task: methods.ours(energy=energy), energy)
    return found


_register()
