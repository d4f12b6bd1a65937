"""Ranks from eigenvalues."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import lance_kernels as lance
from lance_kernels._candidates import selectable
from lance_kernels._ranks import ROUNDING, ROUNDING_SELECTED, choose_ranks, cosine_kept, cosine_selected, energy_rank
from lance_kernels.ops.pack_core import packed_bytes


@given(values=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=20), energy=st.floats(0.01, 1.0))
def test_energy_rank_is_the_smallest_that_suffices(values, energy):
    eigenvalues = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = energy_rank(eigenvalues, energy)
    total = eigenvalues.sum()
    assert 1 <= rank <= len(values)
    assert eigenvalues[:rank].sum() >= energy * total * (1 - 1e-9)
    if rank > 1:
        assert eigenvalues[: rank - 1].sum() < energy * total


def test_zero_spectrum_has_rank_one():
    assert energy_rank(torch.zeros(5), 0.9) == 1


def spectra(*sizes):
    return [None, *(torch.arange(size, 0, -1.0) for size in sizes)]


def test_a_mode_at_full_rank_is_kept():
    assert choose_ranks("fc", spectra(4), lance.LanceConfig(energy=1.0)) == [None, None]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (0.5, [None, 4, 19]),
        (3, [None, 3, 3]),
        ((None, 2, None), [None, 2, None]),
    ],
)
def test_rank_pattern(rule, expected):
    config = lance.LanceConfig(energy=0.9, rank_pattern={"other": 1, "fc": rule})
    assert choose_ranks("block.fc", spectra(12, 64), config) == expected


def test_rank_pattern_of_another_length_is_refused():
    config = lance.LanceConfig(rank_pattern={"fc": (None, 2)})
    with pytest.raises(ValueError, match=r"gives 2 ranks for layer 'fc'; expected 3"):
        choose_ranks("fc", spectra(4, 5), config)


def test_limits():
    config = lance.LanceConfig(energy=0.5, rank_multiple=8, max_rank=20)
    assert choose_ranks("fc", spectra(12, 64, 128), config) == [None, 4, 20, 20]
    assert choose_ranks("fc", spectra(12, 64), lance.LanceConfig(energy=0.5, rank_multiple=8)) == [None, 4, 24]


def budgeted(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten()
    )
    model.append(torch.nn.Linear(8 * 36, 5))
    lance.compress_(model, lance.LanceConfig(companions="none"))
    x = torch.randn(4, 6, 8, 8) * torch.linspace(2, 0.1, 8) * torch.linspace(3, 0.1, 6)[:, None, None]
    return model, lance.calibrate(model, [x], progress=False), x


@pytest.mark.parametrize("share", [0.004, 0.02, 0.1, 0.3, 2.0])
def test_plan_stays_within_its_budget_and_says_what_is_held(share):
    model, calibration, x = budgeted()
    dense = sum(4 * torch.Size(spectrum.size).numel() for spectrum in calibration.layers.values())
    planned = lance.plan(model, calibration, int(share * dense))
    assert planned.bytes <= share * dense
    planned.apply(model, calibration)
    result = lance.report(model, x)
    assert result.counted_bytes == planned.bytes
    assert [layer.counted_bytes for layer in result.layers] == [layer.bytes for layer in planned.layers.values()]
    assert [layer.dense_bytes for layer in result.layers] == [layer.dense_bytes for layer in planned.layers.values()]
    assert "of" in str(planned)
    assert planned.to_dict()["bytes"] == planned.bytes


def test_more_budget_never_predicts_more_error():
    model, calibration, _ = budgeted()
    config = lance.LanceConfig(rounding_weight=1.0)
    budgets = (600, 1200, 5000, 20000, 100000)
    errors = [lance.plan(model, calibration, budget, config=config).predicted_error for budget in budgets]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.002 < errors[0]


def test_plan_beats_every_single_energy_and_width_by_its_own_measure():
    model, calibration, _ = budgeted()
    by_cosine = lance.LanceConfig(rounding_weight=1.0)
    for energy in (0.5, 0.7, 0.9):
        for width in (8, 4, 2):
            error = size = 0.0
            for name, spectrum in calibration.layers.items():
                ranks = choose_ranks(name, spectrum.eigenvalues, lance.LanceConfig(energy=energy))
                kept = energy_kept = 1.0
                feature = 1 if len(spectrum.size) == 4 else len(spectrum.size) - 1
                for mode, (values, rank) in enumerate(zip(spectrum.eigenvalues, ranks)):
                    if values is not None and rank is not None:
                        share = np.array(float(values[:rank].sum() / values.sum()))
                        kept *= float(cosine_kept(share, mode == feature))
                        energy_kept *= float(share)
                rounding = ROUNDING
                if selectable(spectrum):
                    kept, rounding = float(cosine_selected(np.array(1 - energy_kept))), ROUNDING_SELECTED
                full = [extent if rank is None else rank for rank, extent in zip(ranks, spectrum.size)]
                size += packed_bytes(full, width)
                error += 1 - kept * (1 - rounding[width])
            planned = lance.plan(model, calibration, int(size), config=by_cosine)
            assert planned.predicted_error * 3 <= error + 1e-9


def test_rounding_that_counts_less_buys_more_values_in_fewer_bits():
    model, calibration, _ = budgeted()
    by_cosine, by_accuracy = (
        lance.plan(model, calibration, 1200, config=lance.LanceConfig(rounding_weight=weight)) for weight in (1.0, 0.2)
    )
    assert by_cosine.predicted_error <= by_accuracy.predicted_error
    widths = [[layer.core_bits or 32 for layer in planned.layers.values()] for planned in (by_cosine, by_accuracy)]
    assert sum(widths[1]) < sum(widths[0])
    assert lance.plan(model, calibration, 1200).to_dict() == by_accuracy.to_dict()


@pytest.mark.parametrize("budget", [1200, 6000])
def test_operations_of_a_plan_are_those_counted_and_stay_within_their_limit(budget):
    model, calibration, x = budgeted()
    free = lance.plan(model, calibration, budget)
    for max_work in (0.6, 0.4, 0.25):
        config = lance.LanceConfig(max_work=max_work)
        planned = lance.plan(model, calibration, budget, config=config)
        assert planned.bytes <= budget
        assert planned.work <= max_work < free.work
        planned.apply(model, calibration)
        with FlopCounterMode(display=False) as compressed:
            model(x).sum().backward()
        with lance.exact(model), FlopCounterMode(display=False) as dense:
            model(x).sum().backward()
        layers = planned.layers.values()
        saved = sum(layer.dense_flops - layer.flops for layer in layers)
        assert dense.get_total_flops() - compressed.get_total_flops() == saved
    errors = [
        lance.plan(model, calibration, budget, config=lance.LanceConfig(max_work=work, rounding_weight=1.0))
        for work in (None, 0.5, 0.3, 0.2)
    ]
    assert [e.predicted_error for e in errors] == sorted(e.predicted_error for e in errors)


def test_layers_of_one_input_share_its_projection_operations():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(16, 8) for name in ("gate", "up")})
    model.forward = lambda x: model["gate"](x) * model["up"](x)
    lance.compress_(model, lance.LanceConfig(companions="none"))
    calibration = lance.calibrate(model, [torch.randn(4, 6, 16)], progress=False)
    assert calibration.shared
    planned = lance.plan(model, calibration, 300, config=lance.LanceConfig(max_work=0.5))
    assert planned.work <= 0.5
    assert planned.layers["gate"].dense_flops == 2 * (2 * 4 * 6 * 16 * 8)
    assert planned.layers["up"].dense_flops == planned.layers["up"].flops == 0


def test_a_limit_below_ranks_of_one_gives_ranks_of_one():
    model, calibration, _ = budgeted()
    planned = lance.plan(model, calibration, 6000, config=lance.LanceConfig(max_work=1e-6))
    assert all(set(layer.ranks[1:]) == {1} for layer in planned.layers.values())


def test_plan_can_be_worked_out_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    lance.compress_(model, lance.LanceConfig(companions="none"))
    x = torch.diag(torch.tensor([2.0, 1.0, 0.1, 0.01]))
    calibration = lance.calibrate(model, [x], progress=False)
    # Two of four features for four samples, in float32.
    planned = lance.plan(model, calibration, 4 * 4 * 2, bits=(None,))
    assert planned.layers["0"].ranks == [None, 2]
    assert planned.layers["0"].bytes == 32
    assert planned.predicted_error == pytest.approx(1 - float(cosine_kept(np.array(5 / 5.0101), True)), abs=1e-6)


def test_impossible_budget_says_the_least():
    model, calibration, _ = budgeted()
    with pytest.raises(ValueError, match=r"budget_bytes is 3; the least .* take is (\d+)") as caught:
        lance.plan(model, calibration, 3)
    least = int(str(caught.value).split()[-1])
    assert lance.plan(model, calibration, least).bytes == least


def test_limits_and_patterns_bind_the_plan_too():
    model, calibration, _ = budgeted()
    config = lance.LanceConfig(max_rank=3, rank_pattern={"2": (None, 2, 2, None)})
    planned = lance.plan(model, calibration, 10**6, config=config)
    assert planned.layers["0"].ranks == [None, 3, 3, 3]
    assert planned.layers["2"].ranks == [None, 2, 2, None]


def test_plan_for_another_model_is_refused():
    model, calibration, _ = budgeted()
    other = torch.nn.Sequential(torch.nn.Linear(4, 3))
    lance.compress_(other)
    with pytest.raises(ValueError, match="model has no compressed layers"):
        lance.plan(other, calibration, 10**6)
    planned = lance.plan(model, calibration, 10**6)
    with pytest.raises(ValueError, match="has no layers"):
        planned.apply(other, calibration)


@pytest.mark.parametrize("core_bits", [4, 1, None])
def test_budget_in_the_config(core_bits):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    config = lance.LanceConfig(budget_bytes=150, core_bits=core_bits, companions="none")
    lance.compress_(model, config)
    x = torch.randn(6, 8) * torch.linspace(3, 0.1, 8)
    lance.calibrate(model, [x], progress=False)
    result = lance.report(model, x)
    assert 0 < result.counted_bytes <= 150
    widths = {layer.lance_core_bits for layer in model}
    assert widths == {0} if core_bits is None else widths == {1} if core_bits == 1 else widths <= {8, 4, 2}
    with pytest.raises(ValueError, match="the least"):
        lance.calibrate(model, [torch.randn(1000, 8)], progress=False)


def test_layers_of_one_input_are_planned_and_counted_once():
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)

        def forward(self, x):
            return self.gate(x) * self.up(x)

    model = Gated()
    lance.compress_(model, lance.LanceConfig(companions="none"))
    x = torch.randn(4, 6, 16) * torch.linspace(3, 0.1, 16)
    calibration = lance.calibrate(model, [x], progress=False)
    planned = lance.plan(model, calibration, 150)
    assert planned.bytes <= 150
    assert planned.layers["gate"].ranks == planned.layers["up"].ranks
    assert {planned.layers["gate"].bytes, planned.layers["up"].bytes} == {0, planned.bytes}
    planned.apply(model, calibration)
    assert lance.report(model, x, lambda y: y.sum()).counted_bytes == planned.bytes


def test_layers_called_several_times_keep_to_the_budget(tmp_path):
    class Again(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(6, 6, 3, padding=1), torch.nn.Linear(6, 6)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.conv(x))
            x = x.mean((2, 3))
            return self.fc(torch.tanh(self.fc(x)))

    model, x = Again(), torch.randn(4, 6, 8, 8)
    lance.compress_(model, lance.LanceConfig(companions="none", budget_bytes=900, max_work=0.8))
    calibration = lance.calibrate(model, [x], progress=False)
    assert [spectrum.calls for spectrum in calibration.layers.values()] == [3, 2]
    planned = lance.plan(model, calibration, 900)
    result = lance.report(model, x)
    assert planned.bytes == result.counted_bytes <= 900
    for row in result.layers:
        assert planned.layers[row.name].bytes == row.counted_bytes
        assert planned.layers[row.name].dense_bytes == row.dense_bytes
    with FlopCounterMode(display=False) as core:
        model(x).sum().backward()
    with lance.exact(model), FlopCounterMode(display=False) as dense:
        model(x).sum().backward()
    saved = sum(layer.dense_flops - layer.flops for layer in planned.layers.values())
    assert dense.get_total_flops() - core.get_total_flops() == saved
    calibration.save(tmp_path / "new.pt")
    content = torch.load(tmp_path / "new.pt")
    for spectrum in content["layers"].values():
        del spectrum["calls"]
    torch.save(content, tmp_path / "old.pt")
    assert {spectrum.calls for spectrum in lance.Calibration.load(tmp_path / "old.pt").layers.values()} == {1}


@pytest.mark.parametrize("batch_size", [12, 24, 30, 5])
def test_a_fixed_batch_factor_is_counted_for_every_batch_of_its_size(batch_size):
    model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    lance.compress_(model, lance.LanceConfig(batch_mode="fixed", core_bits=8))
    x = (torch.randn(12, 3) @ torch.randn(3, 80) + 0.01 * torch.randn(12, 80)).view(12, 5, 16)
    calibration = lance.calibrate(model, [x], progress=False)
    planned = lance.plan(model, calibration, 400, batch_size=batch_size)
    planned.apply(model, calibration)
    assert planned.layers["0"].ranks[0] is not None
    assert lance.report(model, torch.randn(batch_size, 5, 16)).counted_bytes == planned.bytes <= 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": ()}, r"plan: bits is \(\); expected"),
        ({"bits": (3,)}, r"plan: bits is \(3,\); expected"),
        ({"bits": (True,)}, r"plan: bits is \(True,\); expected"),
        ({"batch_size": -3}, "plan: batch_size is -3; expected"),
        ({"batch_size": 2.5}, "plan: batch_size is 2.5; expected"),
    ],
)
def test_plan_names_the_argument_that_is_out_of_range(arguments, message):
    model, calibration, _ = budgeted()
    with pytest.raises(ValueError, match=message):
        lance.plan(model, calibration, 5000, **arguments)
    assert lance.plan(model, calibration, 5000, bits=iter((8, 4))).bytes <= 5000
