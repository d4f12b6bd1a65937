"""`calibrate` finds the HOSVD of the layers' inputs and leaves everything else as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lance_kernels as lance
from tests.ops.cases import assert_near


def compressed(model, **config):
    lance.compress_(model, lance.LanceConfig(**{"core_bits": None, "companions": "none", **config}))
    return model


def small():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(216, 5),
    )


def calibrated(model, batches, **arguments):
    return lance.calibrate(model, batches, progress=False, **arguments)


def test_factors_are_the_leading_singular_vectors_over_all_batches():
    model = compressed(nn.Sequential(nn.Conv2d(5, 4, 3)), energy=0.8)
    batches = [torch.randn(size, 5, 6, 7) * torch.arange(1, 8) for size in (4, 1, 7)]
    found = calibrated(model, batches)
    together = torch.cat(batches).double()
    for mode in (1, 2, 3):
        unfolding = together.movedim(mode, 0).flatten(1)
        vectors, values, _ = torch.linalg.svd(unfolding, full_matrices=False)
        assert_near(found.layers["0"].eigenvalues[mode], values.square(), factor=10)
        energy = values.square().cumsum(0) / values.square().sum()
        rank = int((energy < 0.8).sum()) + 1
        factor = model[0].factors[mode]
        if rank == unfolding.shape[0]:
            assert factor is None
        else:
            assert factor.shape == (unfolding.shape[0], rank)
            assert_near(factor @ factor.mT, (vectors[:, :rank] @ vectors[:, :rank].mT).float(), factor=100)


def test_every_sample_weighs_the_same():
    data = torch.randn(12, 6)
    models = [compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.7) for _ in range(2)]
    calibrated(models[0], [data])
    calibrated(models[1], [data[:1], data[1:8], data[8:]])
    assert_near(models[0][0].factors[1], models[1][0].factors[1], factor=100)


def test_state_is_restored_even_when_the_loader_raises():
    model = compressed(small())
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def broken():
        yield torch.randn(2, 3, 8, 8)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        calibrated(model, broken())
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    assert not model[0].is_calibrated


def test_training_mode_and_running_statistics_survive():
    model = compressed(small()).train()
    mean = model[1].running_mean.clone()
    calibrated(model, [torch.randn(2, 3, 8, 8)])
    assert model.training
    assert torch.equal(model[1].running_mean, mean)
    assert all(parameter.grad is None for parameter in model.parameters())


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, values, labels=None):
        return self.fc(input=values) if labels is None else self.fc(values)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "forward_fn"])
def test_any_kind_of_batch(kind):
    x = torch.randn(4, 6)
    batch = {
        "tensor": x,
        "tuple": (x, torch.zeros(4)),
        "list": [x, torch.zeros(4)],
        "dict": {"values": x, "labels": torch.zeros(4)},
        "forward_fn": (torch.zeros(4), x),
    }[kind]
    model = compressed(Keyword())
    forward_fn = (lambda model, batch: model(batch[1])) if kind == "forward_fn" else None
    calibrated(model, iter([batch]), forward_fn=forward_fn)
    assert model.fc.is_calibrated


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_that_has_run_is_calibrated(whole):
    model = compressed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), energy=0.5)
    run = torch.compile(model, backend="aot_eager") if whole else model
    if not whole:
        model[0] = torch.compile(model[0], backend="aot_eager")
    x = torch.randn(9, 6)
    with torch.no_grad():
        run.eval()(x)
    assert not calibrated(run, [x]).uncalled
    gradients = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(layer.is_calibrated for layer in layers)
    plain = nn.Sequential(*layers)
    for mine, expected in zip(gradients, torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))):
        assert_near(mine, expected)


def test_max_batches_stops_the_loader():
    drawn = []

    def loader():
        for index in range(10):
            drawn.append(index)
            yield torch.randn(2, 6)

    assert calibrated(compressed(nn.Sequential(nn.Linear(6, 3))), loader(), max_batches=3).batches == 3
    assert len(drawn) == 3


def test_fixed_batch_uses_whole_batches_only():
    model = compressed(nn.Sequential(nn.Linear(6, 3)), batch_mode="fixed")
    found = calibrated(model, [torch.randn(4, 6), torch.randn(4, 6), torch.randn(1, 6)])
    assert found.layers["0"].eigenvalues[0].shape == (4,)
    assert model[0].factors[0].shape[0] == 4


def test_modes_whose_size_varies_are_kept():
    model = compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.5)
    found = calibrated(model, [torch.randn(2, 5, 6), torch.randn(2, 7, 6), torch.randn(2, 5, 6)])
    assert found.layers["0"].varied == (1,)
    factors = model[0].factors
    assert factors[0] is None
    assert factors[1] is None
    assert factors[2] is not None
    model(torch.randn(3, 9, 6)).sum().backward()


def test_inputs_of_another_number_of_modes_share_the_feature_mode():
    model = compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.5)
    batches = [torch.randn(2, 5, 6), torch.randn(4, 6)]
    found = calibrated(model, batches)
    gram = sum(batch.reshape(-1, 6).mT.double() @ batch.reshape(-1, 6).double() for batch in batches)
    assert_near(found.layers["0"].eigenvalues[2], torch.linalg.eigvalsh(gram).flip(0), factor=10)


def test_modules_never_called_are_listed_and_left_plain():
    model = compressed(nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)}))
    with pytest.warns(UserWarning, match="no batch reached idle"):
        found = calibrated(model, [torch.randn(2, 6)], forward_fn=lambda model, batch: model["used"](batch))
    assert found.uncalled == ["idle"]
    assert not model["idle"].is_calibrated


def test_layers_that_the_next_calibration_does_not_reach_become_plain():
    model = compressed(nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)}), energy=0.5)
    calibrated(model, [torch.randn(9, 6)], forward_fn=lambda model, x: model["used"](x) + model["idle"](x.exp()))
    assert model["idle"].is_calibrated
    with pytest.warns(UserWarning, match="no batch reached idle; these layers stay plain"):
        calibrated(model, [torch.randn(9, 6)], forward_fn=lambda model, x: model["used"](x))
    assert model["used"].is_calibrated
    assert not model["idle"].is_calibrated


def test_factors_found_in_inference_mode_train():
    model = compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.5)
    with torch.inference_mode():
        calibrated(model, [torch.randn(9, 6)])
    model(torch.randn(9, 6)).sum().backward()
    assert model[0].is_calibrated


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_names_the_layer_and_leaves_the_factors(bad):
    model = compressed(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), energy=0.6)
    calibrated(model, [torch.randn(8, 6)])
    before = [layer.factors[1].clone() for layer in model]
    poisoned = torch.randn(2, 6)
    poisoned[0, 0] = bad
    with pytest.raises(RuntimeError, match=r"layer '0', mode 1 of its input: lance::gram_eigh: gram holds NaN"):
        calibrated(model, [poisoned])
    assert all(torch.equal(layer.factors[1], factor) for layer, factor in zip(model, before))


def test_refusals():
    with pytest.raises(ValueError, match="no compressed layers"):
        calibrated(nn.Linear(6, 3), [torch.randn(2, 6)])
    with pytest.raises(ValueError, match="loader gave no batch"):
        calibrated(compressed(nn.Sequential(nn.Linear(6, 3))), [])
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=rf"calibrate: max_batches is {wrong}; expected at least 1, or None"):
            calibrated(compressed(nn.Sequential(nn.Linear(6, 3))), [torch.randn(2, 6)], max_batches=wrong)
    with pytest.raises(RuntimeError, match="squares of float32 values above 1e19 are infinite"):
        calibrated(compressed(nn.Sequential(nn.Linear(6, 3))), [torch.full((2, 6), 2e19)])


def test_a_loader_that_does_not_know_its_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(torch.randn(4, 6))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert calibrated(compressed(nn.Sequential(nn.Linear(6, 3))), loader, max_batches=None).batches == 2


def test_every_part_keeps_to_the_budget_of_its_own_configuration():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    lance.compress_(model[0], lance.LanceConfig(energy=0.9, core_bits=8))
    lance.compress_(model[1], lance.LanceConfig(budget_bytes=150))
    lance.compress_(model[2], lance.LanceConfig(budget_bytes=30))
    x = torch.randn(12, 6)
    calibrated(model, [x])
    rows = lance.report(model, x).layers
    assert model[0].lance_core_bits == 8
    assert rows[0].counted_bytes > 30
    assert 30 < rows[1].counted_bytes <= 150
    assert 0 < rows[2].counted_bytes <= 30
    before = [layer.factors for layer in model]
    model[2].lance_config = lance.LanceConfig(budget_bytes=1)
    with pytest.raises(ValueError, match="the least"):
        calibrated(model, [x])
    assert all(a is b for layer, old in zip(model, before) for a, b in zip(layer.factors, old))


def test_other_ranks_without_the_data(tmp_path):
    model = compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.5)
    found = calibrated(model, [torch.randn(20, 6)])
    found.save(tmp_path / "spectra.pt")
    loaded = lance.Calibration.load(tmp_path / "spectra.pt")
    ranks = loaded.apply(model, lance.LanceConfig(rank_pattern={"0": (None, 2)}))
    assert ranks == {"0": [None, 2]}
    assert model[0].factors[1].shape == (6, 2)
    with pytest.raises(ValueError, match=r"no compressed layers \['0'\]"):
        loaded.apply(compressed(nn.ModuleDict({"other": nn.Linear(6, 3)})))
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no calibration"):
        lance.Calibration.load(tmp_path / "other.pt")


def test_applying_without_a_budget_forgets_the_bits_of_an_earlier_plan():
    model = compressed(nn.Sequential(nn.Linear(6, 3)), energy=0.5, core_bits=8)
    found = calibrated(model, [torch.randn(20, 6)])
    assert model[0].lance_core_bits == 8
    found.apply(model, lance.LanceConfig(budget_bytes=40, rounding_weight=1.0))
    assert model[0].lance_core_bits == 2
    found.apply(model)
    assert model[0].lance_core_bits == 8
    found.apply(model, lance.LanceConfig(core_bits=None))
    assert model[0].lance_core_bits == 0


@pytest.mark.parametrize("size", [(2, 3, 8, 8), (3, 8, 8)])
def test_unbatched_convolution_inputs(size):
    model = compressed(nn.Sequential(nn.Conv2d(3, 4, 3)), energy=0.5)
    found = calibrated(model, [torch.randn(size)])
    assert len(found.layers["0"].size) == 4


def test_zero_inputs_give_rank_one():
    model = compressed(nn.Sequential(nn.Linear(6, 3)))
    calibrated(model, [torch.zeros(4, 6)])
    assert model[0].factors[1].shape == (6, 1)
