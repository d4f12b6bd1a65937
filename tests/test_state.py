"""States move in all directions, files are whole or absent, and what does not fit changes nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import lance_kernels as lance
from lance_kernels.nn._state import absolute_name, relative_name
from lance_kernels.state import atomic_save
from tests.models import images, vit


def network():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5))


def data(count=6):
    return torch.randn(count, 3, 8, 8), torch.arange(count) % 5


def calibrated(model=None, **config):
    model = network() if model is None else model
    lance.compress_(model, lance.LanceConfig(**config))
    lance.calibrate(model, [data()[0]], progress=False)
    return model


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def step_gradients(model):
    x, labels = torch.linspace(-1, 1, 6 * 192).view(6, 3, 8, 8), torch.arange(6) % 5
    loss = nn.functional.cross_entropy(model(x), labels)
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same_gradients(first, second):
    assert all(torch.equal(a, b) for a, b in zip(step_gradients(first), step_gradients(second)))


def test_plain_state_into_a_calibrated_model_keeps_the_factors():
    model, plain = calibrated(), network()
    factors = [layer.factors for layer in (model[0], model[3])]
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model[0].weight, plain[0].weight)
    for layer, before in zip((model[0], model[3]), factors):
        assert all(a is b for a, b in zip(layer.factors, before))


def test_calibrated_state_into_a_plain_model():
    model, plain = calibrated(), network()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match=r"dropped \d+ entries \(factors\) of 2 compressed layers"):
        state = lance.plain_state_dict(model.state_dict())
    plain.load_state_dict(state)
    assert same(plain.state_dict(), state)


@pytest.mark.filterwarnings("error")
def test_a_plain_state_stays_as_it_is():
    state = network().state_dict()
    assert same(lance.plain_state_dict(state), state)


@pytest.mark.parametrize("core_bits", [4, 1, None])
@pytest.mark.parametrize("way", ["memory", "weights_only", "safetensors"])
def test_calibrated_state_into_an_uncalibrated_model(core_bits, way):
    model = calibrated(core_bits=core_bits, budget_bytes=3000)
    state = model.state_dict()
    if way == "weights_only":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    if way == "safetensors":
        state = load(save(state))
    fresh = network()
    lance.compress_(fresh, lance.LanceConfig(core_bits=core_bits))
    fresh.load_state_dict(state)
    assert [layer.lance_core_bits for layer in (fresh[0], fresh[3])] == [
        layer.lance_core_bits for layer in (model[0], model[3])
    ]
    assert_same_gradients(fresh, model)


def test_a_layer_that_keeps_every_mode_stays_calibrated():
    model = calibrated(energy=1.0, core_bits=8)
    assert all(factor is None for factor in model[0].factors)
    fresh = network()
    lance.compress_(fresh, lance.LanceConfig(core_bits=8))
    fresh.load_state_dict(model.state_dict())
    assert fresh[0].is_calibrated
    assert_same_gradients(fresh, model)


def test_calibrated_state_replaces_other_ranks():
    model, other = calibrated(energy=0.9), calibrated(energy=0.3)
    other.load_state_dict(model.state_dict())
    assert_same_gradients(other, model)


def test_an_uncalibrated_state_is_plain():
    model = network()
    keys = list(model.state_dict())
    lance.compress_(model)
    assert list(model.state_dict()) == keys


def test_assigning_to_a_model_on_meta():
    model = calibrated()
    with torch.device("meta"):
        fresh = network()
    lance.compress_(fresh)
    fresh.load_state_dict(model.state_dict(), assign=True)
    assert_same_gradients(fresh, model)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_modules(way):
    model = calibrated()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert_same_gradients(other, model)
    other.load_state_dict(calibrated().state_dict())
    lance.revert_(other)
    other.load_state_dict(network().state_dict())


@pytest.mark.parametrize("optimizer_type", [torch.optim.AdamW, torch.optim.SGD])
def test_a_stopped_and_resumed_run_has_the_same_bits(tmp_path, optimizer_type):
    torch.manual_seed(1)
    batches = [data() for _ in range(6)]

    def train(model, optimizer, some):
        for x, labels in some:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

    model = calibrated()
    optimizer = optimizer_type(model.parameters(), lr=0.01)
    train(model, optimizer, batches[:3])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(model, optimizer, batches[3:])

    resumed = network()
    lance.compress_(resumed)
    second = optimizer_type(resumed.parameters(), lr=0.01)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(resumed, second, batches[3:])
    assert same(everything(resumed), everything(model))


def changed(state, key, value):
    return {**state, key: value}


HOSTILE = {
    "wrong feature size": ("3.lance_factor_1of2", lambda f: f[:-1], "expected size 512"),
    "rank above size": ("3.lance_factor_1of2", lambda f: torch.ones(512, 513), "1 <= rank <= size"),
    "no matrix": ("3.lance_factor_1of2", lambda f: f.flatten(), "expected a floating"),
    "integers": ("3.lance_factor_1of2", lambda f: f.long(), "int64 of shape"),
    "no tensor": ("3.lance_factor_1of2", lambda f: "factor", "is a str"),
    "NaN": ("3.lance_factor_1of2", lambda f: f * torch.nan, "NaN or infinity"),
    "infinity": ("3.lance_factor_1of2", lambda f: f.index_fill(0, torch.tensor([0]), torch.inf), "NaN or infinity"),
    "not orthonormal": ("3.lance_factor_1of2", lambda f: 3 * f, "not orthonormal"),
    "other number of modes": ("0.lance_factor_1of3", lambda f: torch.eye(3), "mode 1 of 3"),
    "mode out of range": ("3.lance_factor_7of2", lambda f: torch.eye(512), "mode 7 of 2"),
    "far too many modes": ("3.lance_factor_1of1000", lambda f: torch.eye(512), "no name of a factor"),
    "no form": ("3.lance_form", lambda f: torch.zeros(2), "expected two integers"),
    "bits out of range": ("3.lance_form", lambda f: torch.tensor([2, 5]), "expected two integers"),
    "modes of the form": ("3.lance_form", lambda f: torch.tensor([3, 4]), "modes"),
    "owner that is not there": (
        "3.lance_owner",
        lambda f: torch.tensor(list(b".hi"), dtype=torch.uint8),
        "names '.hi'",
    ),
    "owner out of the model": ("3.lance_owner", lambda f: torch.tensor(list(b"...0"), dtype=torch.uint8), "names"),
    "owner that is the layer": ("3.lance_owner", lambda f: torch.tensor(list(b".3"), dtype=torch.uint8), "names"),
    "owner that is no name": ("3.lance_owner", lambda f: torch.tensor([255, 254], dtype=torch.uint8), "in UTF-8"),
    "wrong weight": ("3.weight", lambda f: f[:, :-1], "3.weight has shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_states_change_nothing(case):
    key, change, message = HOSTILE[case]
    model = calibrated(energy=0.8)
    before, bits = everything(model), [layer.lance_core_bits for layer in (model[0], model[3])]
    other = calibrated(energy=0.5).state_dict()
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**other, key: change(other.get(key))})
    assert same(everything(model), before)
    assert [layer.lance_core_bits for layer in (model[0], model[3])] == bits


def test_a_layer_alone_refuses_too():
    layer = lance.nn.Linear(6, 3)
    layer.set_factors([None, torch.eye(6)[:, :2]])
    state = {**layer.state_dict(), "lance_factor_1of2": torch.full((6, 2), torch.nan)}
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        layer.load_state_dict(state)
    assert torch.equal(layer.factors[1], torch.eye(6)[:, :2])


def test_a_foreign_state_is_refused_by_name():
    model = calibrated()
    before = everything(model)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({"encoder.weight": torch.zeros(3)})
    assert same(everything(model), before)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "empty", "other content", "code", "hostile"])
def test_damaged_calibrations(tmp_path, damage):
    model = network()
    lance.compress_(model)
    found = lance.calibrate(model, [data()[0]], progress=False)
    path = tmp_path / "spectra.pt"
    found.save(path)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        path.write_bytes(bytes(range(256)) * 20)
    elif damage == "text":
        path.write_text("not a calibration\n")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other content":
        torch.save([1, 2, 3], path)
    elif damage == "code":
        torch.save(network(), path)
    else:
        found.layers["0"].eigenvalues[1] = torch.full((3,), torch.nan)
        found.save(path)
    with pytest.raises(ValueError, match=r"Calibration.load: .*spectra.pt"):
        lance.Calibration.load(path)


def test_saving_replaces_a_file_whole(tmp_path):
    path = tmp_path / "state.pt"
    atomic_save({"value": 1}, path)

    class Unpicklable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_save(Unpicklable(), path)
    assert torch.load(path, weights_only=True) == {"value": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
    with pytest.raises(FileNotFoundError):
        atomic_save(1, tmp_path / "absent" / "state.pt")


@pytest.mark.parametrize("move", ["half", "bfloat16", "double", "float"])
def test_moves_of_dtype_keep_wide_factors(move):
    model = calibrated()
    getattr(model, move)()
    expected = torch.float64 if move == "double" else torch.float32
    assert model[3].factors[1].dtype == expected
    x = data()[0].to(model[0].weight.dtype)
    model(x).sum().backward()
    assert model[0].weight.grad.dtype == model[0].weight.dtype
    model.float()
    assert model[3].factors[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "own", "relative"),
    [
        ("a.b.query", "a.b.key", ".query"),
        ("query", "key", ".query"),
        ("block.conv", "block.down.0", "..conv"),
        ("block.down.0", "block.conv", ".down.0"),
        ("x.y.z", "a.b.c", "...x.y.z"),
        ("a", "a.b", "..a"),
    ],
)
def test_relative_names(name, own, relative):
    assert relative_name(name, own) == relative
    assert absolute_name(relative, own) == name


def test_shared_factors_are_saved_once():
    model = vit()
    lance.compress_(model, lance.LanceConfig())
    lance.calibrate(model, [images()[0]], progress=False)
    state = model.state_dict()
    pointers = [value.data_ptr() for key, value in state.items() if "lance_factor" in key]
    assert len(pointers) == len(set(pointers))
    owners = [key for key in state if key.endswith("lance_owner")]
    # Key and value of two blocks use the query's.
    assert len(owners) == 4
    fresh = vit()
    lance.compress_(fresh)
    fresh.load_state_dict(load(save(state)))
    assert same(fresh.state_dict(), state)
    wrapped = nn.Sequential(fresh)
    wrapped.load_state_dict({f"0.{key}": value for key, value in state.items()})
    x, labels = images()
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x).logits, labels), list(model.parameters()))
    for one in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        actual = torch.autograd.grad(nn.functional.cross_entropy(one(x).logits, labels), list(one.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
        assert lance.held_bytes(one, x) == lance.held_bytes(model, x)


class Pair(nn.Module):
    """Two layers of one input, and one more in a part of its own."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.part = nn.ModuleDict({"v": nn.Linear(8, 8)})

    def forward(self, x):
        return self.q(x) + self.k(x) * self.part["v"](x)


POINTS = torch.linspace(-2, 2, 400).view(50, 8).sin()


def paired(**config):
    model = nn.Sequential(Pair())
    lance.compress_(model, lance.LanceConfig(energy=0.6, **config))
    lance.calibrate(model, [POINTS], progress=False)
    assert model[0].k.lance_source is model[0].part["v"].lance_source is model[0].q
    return model


def pair_gradients(model):
    x = POINTS.to(next(model.parameters()).dtype)
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


@pytest.mark.parametrize("budget", [None, 200])
def test_a_part_is_loaded_by_itself(budget):
    model = paired(budget_bytes=budget)
    fresh = nn.Sequential(Pair())
    lance.compress_(fresh)
    fresh[0].load_state_dict(model[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(pair_gradients(model), pair_gradients(fresh)))
    assert fresh[0].part["v"].lance_source is fresh[0].q
    fresh = nn.Sequential(Pair())
    lance.compress_(fresh)
    fresh[0].part.load_state_dict(model[0].part.state_dict())
    assert torch.equal(fresh[0].part["v"].factors[1], model[0].q.factors[1])
    alone = {key.removeprefix("0.k."): value for key, value in model.state_dict().items() if key.startswith("0.k.")}
    with pytest.raises(RuntimeError, match=r"names '\.q', which has no factors in this state"):
        fresh[0].k.load_state_dict(alone)


@pytest.mark.parametrize("budget", [None, 200])
def test_an_owner_that_is_reverted_hands_its_factors_on(budget):
    model = paired(budget_bytes=budget)
    expected = pair_gradients(model)
    lance.revert_(model[0].q)
    assert type(model[0].q) is nn.Linear
    found = pair_gradients(model)
    assert all(torch.equal(a, b) for a, b in list(zip(expected, found))[2:])
    model.load_state_dict(model.state_dict())


def test_an_owner_that_is_replaced_leaves_its_factors_to_the_others():
    model = paired()
    model[0].q = nn.Linear(8, 8)
    expected = pair_gradients(model)
    fresh = copy.deepcopy(model)
    for _ in range(2):
        state = model.state_dict()
        fresh.load_state_dict(load(save(state)))
        assert same(fresh.state_dict(), state)
    assert fresh[0].part["v"].lance_source is fresh[0].k
    assert all(torch.equal(a, b) for a, b in zip(expected, pair_gradients(fresh)))
    model.double()
    assert model[0].k.factors[1].dtype == torch.float64
    assert all(gradient.isfinite().all() for gradient in pair_gradients(model))


def test_a_model_whose_owner_is_plain_takes_the_factors_to_the_others():
    model = paired()
    fresh = nn.Sequential(Pair())
    lance.compress_(fresh, lance.LanceConfig(exclude_modules=["q"]))
    result = fresh.load_state_dict(model.state_dict(), strict=False)
    assert {key.rpartition(".")[0] for key in result.unexpected_keys} == {"0.q"}
    assert fresh[0].part["v"].lance_source is fresh[0].k
    found = list(zip(pair_gradients(model), pair_gradients(fresh)))
    assert all(torch.equal(a, b) for a, b in found[2:])


def test_new_factors_of_an_owner_are_new_for_the_others_too():
    model = paired()
    factor = torch.linalg.qr(torch.randn(8, 3))[0]
    model[0].q.set_factors([None, factor])
    assert torch.equal(model[0].k.factors[1], factor)
