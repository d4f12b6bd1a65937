"""The suites `ops`, `layers` and `models`: every case's work is right before it is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import environment, methods
from benchmarks.methods.steps import measure_steps
from benchmarks.models import MODELS
from benchmarks.registry import Context
from benchmarks.results import make_rows
from benchmarks.step_tables import plot, tables
from benchmarks.suites import layers, models, ops, ops_tables

CLOSE = {
    "tucker_project": 1e-3,
    "tucker_reconstruct": 1e-3,
    "mode_gram": 1e-3,
    "convolution_weight_grad": 1e-3,
    "linear_weight_grad": 1e-3,
    "patch_weight_grad": 1e-3,
    "relu": 0,
    "hardtanh": 0,
    "leaky_relu": 0,
    "activation, gelu": 1e-5,
    "max_pool": 0,
    "avg_pool": 1e-5,
    "adaptive_avg_pool": 1e-5,
    "batch_norm_frozen": 1e-5,
    "layer_norm": 1e-4,
    "rms_norm": 1e-4,
    "attention": 1e-4,
}


def context(suite: str, case: str) -> Context:
    return Context(suite, case, environment.current(), quick=True)


@pytest.mark.parametrize("name", list(ops.SUITE.cases))
def test_operators_and_their_naive_forms_agree(name: str) -> None:
    make = ops.SUITE.cases[name].args[0]
    one = make(1, 0)
    assert one.touched > 0
    assert one.elements > 0
    found, naive = one.ours(), one.naive()
    if name in CLOSE:
        torch.testing.assert_close(found.reshape(naive.shape), naive, rtol=CLOSE[name], atol=CLOSE[name])
    elif name in ("convolution", "linear"):
        for ours, plain in zip(found, naive):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    elif name in ("pack_core", "quantize_rows"):
        for ours, plain in zip(*(result if isinstance(result, tuple) else (result,) for result in (found, naive))):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1)
    elif name == "unpack_core":
        torch.testing.assert_close(found, naive)
    elif name == "patch_project":
        torch.testing.assert_close(found.flatten(2), naive, rtol=1e-3, atol=1e-3)
    elif name == "gram_eigh":
        torch.testing.assert_close(found[0].flip(0).double(), naive[0], rtol=1e-4, atol=1e-2)
    else:
        assert name in ("dropout", "mode_grams_", "patch_gram_")


def test_an_operators_case_and_its_table(tmp_path) -> None:
    rows = ops.SUITE.cases["relu"](context("ops", "relu"))
    assert {(row.method, row.quantity) for row in rows} == {
        ("naive", "time"), ("lance", "time"), ("floor", "time over floor"), ("lance", "time over floor"),
        ("lance", "slope"),
    }  # fmt: skip
    floor = next(row for row in rows if row.method == "floor")
    # Input and output, float32, of the larger of the two sizes.
    assert floor.details["bytes"] == 2 * 4 * 4 * 64 * 56 * 56
    (table,) = ops_tables.tables(rows)
    assert [row[0] for row in table.rows] == ["relu"]
    ops_tables.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.mark.parametrize("name", layers.SHAPES)
def test_layers_get_inputs_and_all_gradients(name: str) -> None:
    shape = layers.SHAPES[name]
    size = (2, *shape.size[1:])
    if "Llama" in name:
        shape, size = layers.linear(2, 9, 8, 12), (2, 9, 8)
    x = layers.inputs(size, 0)
    assert x.shape == size
    assert (x >= 0).all()
    assert not torch.equal(x, layers.inputs(size, 1))
    model = layers.Single(shape.make())
    output = model(x)
    assert output.dim() == 2
    gradients = torch.autograd.grad(output.sum(), list(model.parameters()))
    assert all(gradient.any() for gradient in gradients)


def test_a_layers_step_is_measured_for_every_method_that_fits(tmp_path) -> None:
    shape = layers.convolution(2, 8, 4, 10, 3)
    depthwise = layers.convolution(2, 8, 10, 10, 3, groups=10)
    rows = layers.case(shape, context("layers", "step: one")) + layers.case(depthwise, context("layers", "step: two"))
    by_case = {case: {row.method for row in rows if row.case == case} for case in ("step: one", "step: two")}
    assert by_case["step: one"] == set(layers.MAKERS)
    assert by_case["step: two"] == set(layers.MAKERS) - {"gradient filtering, R=4"}
    counted = {row.method: row.median for row in rows if row.case == "step: one" and row.quantity == "counted bytes"}
    assert counted["plain"] == 2 * 4 * 8 * 8 * 4
    assert counted["gradient filtering, R=4"] == counted["plain"] / 16
    text = "\n".join(table.markdown() for table in tables(rows))
    assert "One training step: one" in text
    plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


def test_operations_of_a_step_by_hand() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    loader = [(torch.randn(5, 8), torch.zeros(5, dtype=torch.int64))]
    rows = measure_steps(context("layers", "step: hand"), model, ["0"], loader, {"plain": methods.plain})
    operations = next(row for row in rows if row.quantity == "operations")
    assert operations.details["forward"] == 2 * 5 * (8 * 6 + 6 * 4)
    assert operations.details["backward"] == 2 * 5 * (8 * 6 + 2 * 6 * 4)
    assert operations.details["decomposition"] == 0


@pytest.mark.parametrize("name", models.CHOICES)
def test_last_layers_of_models_are_chosen(name: str) -> None:
    model = MODELS[name]()
    for layers_ in models.CHOICES[name]:
        chosen = models.choose_layers(model, layers_)
        if layers_ != "all":
            assert len(chosen) == int(layers_[-1])
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert {f"{key}.weight" for key in chosen} < trained
        heads = {key.rpartition(".")[0] for key in trained} - set(chosen)
        assert len(heads) == 1
        assert "classifier" in heads.pop()


def test_tables_say_which_targets_were_met() -> None:
    rows = []
    for quantity, unit in (("operations", "FLOP"), ("step time", "s")):
        rows += make_rows(
            "models",
            "step: ResNet-18, all",
            {"plain": [10.0], "lance": [7.6]},
            environment=environment.current(),
            quick=True,
            quantity=quantity,
            unit=unit,
            baseline="plain",
            targets={"lance": 0.8 if quantity == "step time" else 0.75},
        )
    rows = [replace(row, details={"decomposition": 0}) for row in rows]
    (table,) = tables(rows)
    assert "operations of lance over plain's: 0.76 (target at most 0.75, missed)." in table.caption
    assert "step time of lance over plain's: 0.76 (target at most 0.8, met)." in table.caption
