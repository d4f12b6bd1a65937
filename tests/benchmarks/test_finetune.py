"""The suite `finetune`: its task, its cases on digits, and what its tables say."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn

from benchmarks import environment, methods
from benchmarks.data import digits
from benchmarks.finetune import Recipe
from benchmarks.pretrained import backbone, pretrained
from benchmarks.registry import Context
from benchmarks.results import Row, make_rows
from benchmarks.suites import finetune, finetune_tables, models


def context(case: str) -> Context:
    return Context("finetune", case, environment.current(), quick=True)


def test_pretrained_networks_are_read_where_they_were_left(tmp_path) -> None:
    images, recipe = digits(), Recipe(1, 64, 0.05)
    made = pretrained(images, recipe, 3, widths=(4, 8), depths=(1, 1), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    again = pretrained(images, recipe, 3, widths=(4, 8), depths=(1, 1), folder=tmp_path)
    assert file.stat().st_mtime_ns == before
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    pretrained(images, Recipe(1, 32, 0.05), 3, widths=(4, 8), depths=(1, 1), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("layers", ["last2", "last4"])
def test_the_cut_network_gives_the_whole_ones_gradients(layers: str) -> None:
    whole, _, images = finetune.parts(None, "all", True, 0)
    cut, names, features = finetune.parts(None, layers, True, 0)
    assert len(names) == int(layers[-1])
    for model in (whole, cut):
        model.replace_head(images.classes, torch.Generator().manual_seed(0))
        model.eval()
    batch = images.train.images[:16], images.train.labels[:16]
    through = features.train.images[:16], features.train.labels[:16]
    for expected, found in zip(methods.gradients(whole, names, batch), methods.gradients(cut, names, through)):
        torch.testing.assert_close(found, expected)


def test_seeds_differ_in_head_and_order_and_methods_do_not() -> None:
    one, again, other = (finetune.task(context(""), "last4", finetune.SHORT, seed) for seed in (0, 0, 1))
    assert torch.equal(one.model.head.weight, again.model.head.weight)
    assert torch.equal(one.loader[0][1], again.loader[0][1])
    assert not torch.equal(one.model.head.weight, other.model.head.weight)
    assert not torch.equal(one.loader[0][1], other.loader[0][1])


def test_cases_on_digits_and_their_tables(tmp_path) -> None:
    rows: list[Row] = []
    for name in (finetune.PLAIN, finetune.PUBLISHED, finetune.AT_PUBLISHED, finetune.AT_SHARE, "HOSVD every step"):
        case = f"accuracy: last4, {finetune.SHORT}: {name}"
        rows += finetune.SUITE.cases[case](context(case))
    rows += finetune.SUITE.cases["gradients: all"](context("gradients: all"))
    assert all(0 < row.median <= 100 for row in rows)
    counted = {row.method: row.details["counted_bytes"] for row in rows if row.quantity == "test accuracy"}
    assert counted[finetune.AT_PUBLISHED] <= counted[finetune.PUBLISHED]
    found = [row.details for row in rows if row.quantity == "gradient cosine"]
    for one, ours in zip(found[::2], found[1::2], strict=True):
        assert (one["form"], ours["form"], one["energy"]) == ("published", "lance", ours["energy"])
        assert ours["counted_bytes"] <= one["counted_bytes"]
    text = "\n".join(table.markdown() for table in finetune_tables.tables(rows))
    for words in (
        "What was to be shown",
        "minus plain's, last4, 3 epochs",
        "best rival's, HOSVD every step",
        "published",
    ):
        assert words in text
    finetune_tables.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def accuracies(
    method: str, layers: str, recipe: str, values: list[float], counted: int, hardware: str = "here"
) -> list[Row]:
    details = {
        "layers": layers,
        "recipe": recipe,
        "seeds": list(range(len(values))),
        "curves": [[value] for value in values],
        "counted_bytes": [counted] * len(values),
        "dense_bytes": 10_000,
    }
    return make_rows(
        "finetune",
        f"accuracy: {layers}, {recipe}: {method}",
        {method: values},
        environment=replace(environment.current(), hardware=hardware),
        quick=True,
        quantity="test accuracy",
        unit="%",
        details={method: details},
    )


def test_claims_are_met_and_missed_as_the_rows_say() -> None:
    lane = ("last4", "3 epochs")
    rows = accuracies("plain", *lane, [90.0, 91.0, 92.0], 10_000)
    rows += accuracies(finetune.PUBLISHED, *lane, [80.0, 81.1, 82.0], 40)
    rows += accuracies(finetune.AT_PUBLISHED, *lane, [86.0, 87.0, 88.0], 39)
    rows += accuracies(finetune.AT_SHARE, *lane, [88.0, 90.5, 91.0], 100)
    rows += accuracies("ASI, 4 bits", *lane, [87.0, 90.0, 91.0], 100)
    rows += accuracies(finetune.SIGNS_AT_PUBLISHED, *lane, [86.0, 87.0, 88.0], 41)
    rows += accuracies(finetune.SIGNS_AT_SHARE, *lane, [89.5, 90.5, 91.5], 100)
    table = finetune_tables.tables(rows)[0]
    states = {(row[0].split(",")[0].split(" (")[0], row[0].split(": ")[1].split(" (")[0]): row[3] for row in table.rows}
    assert states == {
        ("accuracy minus the published form's", finetune.AT_PUBLISHED): "met",  # +5.97 on average, spread 0.06
        ("accuracy minus the published form's", finetune.SIGNS_AT_PUBLISHED): "missed",  # more bytes
        ("accuracy minus plain's", finetune.AT_SHARE): "missed",  # -1.17
        ("accuracy minus plain's", finetune.SIGNS_AT_SHARE): "met",  # -0.5
        ("accuracy minus the best rival's", finetune.AT_SHARE): "met",
        ("accuracy minus the best rival's", finetune.SIGNS_AT_SHARE): "met",
    }


def test_networks_of_two_processors_are_not_compared() -> None:
    lane = ("last4", "3 epochs")
    rows = accuracies("plain", *lane, [90.0, 91.0, 92.0], 10_000)
    rows += accuracies(finetune.AT_SHARE, *lane, [90.0, 91.0, 93.0], 100, hardware="elsewhere")
    rows += accuracies("ASI, 4 bits", *lane, [87.0, 90.0, 91.0], 100)
    (accuracy,) = finetune_tables.tables(rows)  # no claim to show
    assert {row[0]: row[3] != "" for row in accuracy.rows} == {
        "plain": False,
        finetune.AT_SHARE: False,
        "ASI, 4 bits": True,
    }
    assert "here, elsewhere" in accuracy.caption


class FakeLibrary(ModuleType):
    """Stands in for timm or torchvision.models: networks by name, and what was asked of them."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(name)
        self.known = known
        self.__spec__ = ModuleSpec(name, None)

    def is_model(self, name: str) -> bool:
        return name in self.known

    def list_models(self) -> list[str]:
        return self.known

    def create_model(self, name: str, pretrained: bool, num_classes: int) -> nn.Module:
        assert pretrained
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, num_classes))

    def get_model(self, name: str, weights: str) -> nn.Module:
        assert weights == "DEFAULT"
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 1000))


def test_backbones_come_from_the_library_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", FakeLibrary("timm", ["one"]))
    monkeypatch.setitem(sys.modules, "torchvision", FakeLibrary("torchvision", []))
    monkeypatch.setitem(sys.modules, "torchvision.models", FakeLibrary("torchvision.models", ["one", "two"]))
    for name in ("one", "two"):
        model = backbone(name, 5)
        assert model[2].out_features == 5
        assert models.choose_layers(model, "all") == ["1"]
    with pytest.raises(ValueError, match="'three'; installed: timm, torchvision"):
        backbone("three", 5)


def test_without_a_library_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="neither timm nor torchvision is installed"):
        backbone("one", 5)


def test_a_backbone_is_fine_tuned_whole_on_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    )
    monkeypatch.setattr(finetune, "backbone", lambda name, classes: made)
    model, names, data = finetune.parts(None, "all", True, 0, "cpu", "any")
    assert (model, names, data.classes) == (made, ["0"], 10)
    assert data.train.images.mean().abs() < 1e-4
    task = finetune.Task(model, names, data, "all", Recipe(1, 64, 0.01), 0)
    assert task.model[4].out_features == 10
    assert methods.dense_bytes(task.model, names, task.loader[0]) == 64 * 16 * 16 * 4
