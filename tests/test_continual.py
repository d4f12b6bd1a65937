"""`NullSpaceLearner`: what it guarantees under every optimizer, what it compresses, freezes and says."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

import lance_kernels as lance
from lance_kernels.continual.layers import PatchConvolution
from tests.continual_cases import assert_protected, drifts, learner_of, network, task, train, weights
from tests.ranks import process_group

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd with momentum and decay": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adam with decay": lambda p: torch.optim.Adam(p, lr=3e-3, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1, fused=True),
}


def clip(model):
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


@pytest.mark.parametrize("clips", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_protected_directions_stay(kind, clips):
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    learner = learner_of(model, optimizer)
    for number in range(3):
        data = task(number)
        learner.begin_task(data)
        before = weights(learner)
        train(model, optimizer, data, 30, clip if clips else None)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)


@pytest.mark.parametrize("autocast", [False, True], ids=["medium precision", "step within autocast"])
def test_protected_directions_stay_where_products_are_rounded(autocast):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer)
    first, second = [[(torch.randn(48, 64), torch.randint(0, 5, (48,)))] for _ in range(2)]
    learner.begin_task(first)
    learner.end_task(first)
    learner.begin_task(second)
    before = weights(learner)
    try:
        torch.set_float32_matmul_precision("highest" if autocast else "medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            train(model, optimizer, second, 20)
    finally:
        torch.set_float32_matmul_precision("highest")
    # Not every processor rounds at "medium": what is brought back in float64 shows anywhere.
    assert_protected(learner, before, 1e-6 if autocast else 5e-8)


def test_outputs_of_earlier_tasks_stay():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    learner = learner_of(model, optimizer, energy=1 - 1e-9)
    first = task(0, batches=1)
    learner.begin_task(first)
    train(model, optimizer, first, 20)
    with pytest.warns(UserWarning, match="no direction is free in 0, 2"):
        learner.end_task(first)
    with torch.no_grad():
        expected = model(first[0][0])
    second = task(1, batches=1)
    learner.begin_task(second)
    before = weights(learner)
    train(model, optimizer, second, 30)
    moved = [float((now - before[name]).norm() / now.norm()) for name, now in weights(learner).items()]
    assert max(moved) >= 1e-2
    with torch.no_grad():
        assert torch.allclose(model(first[0][0]), expected, atol=1e-3, rtol=1e-3)


def test_gradient_scaler():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    learner = learner_of(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
    for number in range(2):
        data = task(number)
        learner.begin_task(data)
        before = weights(learner)
        for step in range(25):
            images, labels = data[step % 2]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            # One step overflows, and the scaler leaves it out.
            scaler.scale(loss * (torch.inf if step == 7 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        if number:
            assert_protected(learner, before)
        learner.end_task(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_do_not_add_up_over_tasks(dtype):
    model = nn.Sequential(nn.Linear(160, 16)).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-4)
    learner = learner_of(model, optimizer, energy=0.95)
    for number in range(25):
        data = [(torch.randn(32, 4) @ torch.randn(4, 160)).to(dtype)]
        learner.begin_task(data)
        for _ in range(10):
            optimizer.zero_grad()
            model(data[0]).square().mean().backward()
            optimizer.step()
        learner.end_task(data)
        if not number:
            first, kept = model[0].weight.detach().double().clone(), learner._protected["0"].basis.dense()
    weight = model[0].weight.detach().double()
    assert ((weight - first) @ kept).norm() <= torch.finfo(dtype).eps * weight.norm()


def test_penalties_and_exact_gradients_do_not_get_past():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    learner = learner_of(model, optimizer)
    learner.begin_task(task(0))
    learner.end_task(task(0))
    data = task(1)
    learner.begin_task(data)
    before = weights(learner)
    with lance.exact(model):
        train(model, optimizer, data, 10)
    for step in range(20):
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        (nn.functional.cross_entropy(model(data[step % 2][0]), data[step % 2][1]) + 0.01 * penalty).backward()
        optimizer.step()
    assert_protected(learner, before)


def test_two_optimizers_are_both_watched_and_none_may_be_left_out():
    model = network()
    halves = [torch.optim.AdamW(model[:4].parameters(), lr=3e-3), torch.optim.AdamW(model[4:].parameters(), lr=3e-3)]
    with pytest.raises(ValueError, match="no optimizer holds the weights of 4, 7, 9; expected every optimizer"):
        learner_of(model, halves[0])
    assert type(model[0]) is nn.Conv2d
    assert not halves[0]._optimizer_step_post_hooks
    learner = learner_of(model, halves)
    learner.begin_task(task(0))
    learner.end_task(task(0))
    with pytest.raises(ValueError, match="no optimizer holds the weights of 0, 2"):
        learner.use_optimizer(halves[1])
    learner.begin_task(task(1))
    before = weights(learner)
    for _ in range(20):
        train(model, halves[0], task(1), 1)
        halves[1].step()
        halves[1].zero_grad()
    assert_protected(learner, before)
    learner.use_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(half._optimizer_step_post_hooks for half in halves)


def test_weights_that_are_not_trained_need_no_optimizer():
    model = network()
    model[4].weight.requires_grad_(False)
    learner_of(model, torch.optim.SGD([p for p in model.parameters() if p is not model[4].weight], lr=0.1))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_one_and_three_dimensions(dimensions):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    torch.manual_seed(0)
    model = nn.Sequential(
        kind(4, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(), kind(6, 8, 2, stride=2, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 2**dimensions, 5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer, energy=0.8)
    for number in range(2):
        data = task(number, size=(4, *[4] * dimensions))
        learner.begin_task(data)
        before = weights(learner)
        train(model, optimizer, data, 25)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)


def test_linear_inputs_of_three_modes_and_a_shared_input():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x):
            return self.out(torch.tanh(self.query(x)) * self.key(x)).mean(1)

    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer)
    for number in range(2):
        data = task(number, size=(6, 16))
        learner.begin_task(data)
        assert model.key.lance_source is model.query
        before = weights(learner)
        train(model, optimizer, data, 20)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)


def test_forward_is_exact_and_the_first_task_is_compressed():
    model, plain = network(), network()
    learner = learner_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = task(0)
    dense = lance.held_bytes(model, data[0])
    learner.begin_task(data)
    assert all(layer.is_calibrated for layer in learner._layers.values())
    assert torch.equal(model(data[0][0]), plain(data[0][0]))
    assert lance.held_bytes(model, data[0]) < 0.5 * dense


def test_cores_are_of_the_smaller_kind_and_their_gradients_free():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = learner_of(model, optimizer)
    learner.begin_task(task(0))
    learner.end_task(task(0))
    learner.begin_task(task(1))
    images, labels = task(1)[0]
    nn.functional.cross_entropy(model(images), labels).backward()
    for protection in learner._protected.values():
        rows = protection.layer.weight.grad.double().reshape(protection.groups, -1, protection.size)
        assert protection.basis.components(rows).norm() <= 1e-5 * rows.norm()
        layer = protection.layer
        if isinstance(layer, PatchConvolution) and layer.lance_patch is not None:
            patches = layer.lance_core_size(torch.Size((8, layer.in_channels, 8, 8)))
            assert patches[1] == layer.groups * layer.lance_patch.factor.shape[2]


def test_both_kinds_of_core_hold_the_guarantee():
    kinds = set()
    for size, channels in ((16, 2), (4, 16)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        learner = learner_of(model, optimizer, energy=0.7, config=lance.LanceConfig(energy=0.95))
        for number in range(2):
            data = task(number, size=(channels, size, size))
            learner.begin_task(data)
            before = weights(learner)
            kinds.add(model[0].lance_patch is not None)
            train(model, optimizer, data, 20)
            if number:
                assert_protected(learner, before)
            learner.end_task(data)
    assert kinds == {True, False}


def test_capacity_and_memory_count_what_is_there():
    model = network()
    learner = learner_of(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert learner.memory().total == sum(layer.size for layer in learner.capacity().values())  # a byte a row
    start = learner.capacity()["2"]
    assert (start.size, start.used, start.free, start.full) == (72, 0, 72, False)
    learner.begin_task(task(0))
    assert 0 < learner.capacity()["2"].next_rank <= 72
    learner.end_task(task(0))
    capacity, memory = learner.capacity(), learner.memory()
    for name, protection in learner._protected.items():
        layer = capacity[name]
        assert layer.used + layer.free == layer.size == protection.groups * protection.size
        assert layer.used > 0
        assert layer.next_rank <= layer.free
        product = protection.product
        stored = 0 if product is None else 4 * protection.layer.weight.shape[0] * protection.basis.width
        assert memory.layers[name].product == stored
        directions = [(k, protection.size - k) for k in protection.basis.counts]
        assert memory.layers[name].basis == sum(4 * k * rest + k + rest for k, rest in directions)
    assert memory.stored == sum(layer.basis + layer.product for layer in memory.layers.values())
    assert memory.total == memory.stored + memory.working
    assert memory.working > 0


def test_a_full_layer_is_frozen_and_said_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer, energy=1.0)
    data = [(torch.randn(32, 6), torch.randint(0, 5, (32,)))]
    learner.begin_task(data)
    train(model, optimizer, data, 5)
    with pytest.warns(UserWarning, match="no direction is free in 0, 2; frozen from now on"):
        learner.end_task(data)
    assert all(layer.full and layer.free == layer.next_rank == 0 for layer in learner.capacity().values())
    assert "full, frozen" in str(learner.summary())
    before = [p.clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.begin_task(data)
    assert not any(p.requires_grad for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before))
    assert all(layer.product == 0 for layer in learner.memory().layers.values())


class WithHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 12)
        self.body, self.norm = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.scale = nn.Parameter(torch.ones(16))
        self.heads = nn.ModuleList(nn.Linear(16, 3) for _ in range(3))
        self.now = 0

    def forward(self, x):
        return self.heads[self.now](torch.relu(self.norm(self.body(self.embed(x).mean(1)))) * self.scale)


def tokens(number):
    generator = torch.Generator().manual_seed(number)
    return [
        (torch.randint(0, 7, (16, 4), generator=generator), torch.randint(0, 3, (16,), generator=generator))
        for _ in range(2)
    ]


def test_a_model_made_tensor_parallel_later_is_refused(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    learner = learner_of(model, optimizer)
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with process_group(tmp_path / "store"):
        first.weight = nn.Parameter(distribute_tensor(first.weight.detach(), init_device_mesh("cpu", (1,))))
        for refused in (lambda: learner.begin_task(task(0)), lambda: learner.use_optimizer(optimizer)):
            with pytest.raises(ValueError, match="is a DTensor; expected a local tensor"):
                refused()


@pytest.mark.parametrize("after", ["freeze", "train"])
def test_policy_of_everything_else(after):
    model = WithHeads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer, energy=0.6, heads=["heads"], after_first_task=after)
    assert set(learner.capacity()) == {"body"}
    states = []
    for number in range(2):
        model.now = number
        data = tokens(number)
        learner.begin_task(data)
        before = weights(learner)
        train(model, optimizer, data, 20)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)
        states.append({name: value.clone() for name, value in model.state_dict().items() if "lance" not in name})
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    trained = {"body.weight", "heads.1.weight", "heads.1.bias"}
    others = {"body.bias", "embed.weight", "norm.weight", "norm.bias", "scale"}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert changed == (trained if after == "freeze" else trained | others | statistics)
    said = str(learner.summary())
    word = "frozen after the first task" if after == "freeze" else "trained in every task"
    for kind in ("biases", "norms", "embeddings", "other parameters"):
        assert f"{kind}: " in said
        assert word in learner.summary().policy[kind]
    assert "running statistics" in said
    assert "heads.0, heads.1" in learner.summary().policy["heads"]
    learner.close()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_replaced_layer_is_refused_and_a_replaced_head_followed():
    def grown(model, learner):
        model.heads[0] = nn.Linear(16, 6)
        learner.use_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))

    data = tokens(0)
    model = WithHeads()
    learner = learner_of(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with pytest.warns(UserWarning, match=r"no batch reached heads\.1, heads\.2"):
        learner.begin_task(data)
    head = model.heads[0]
    model.heads[0] = nn.Linear(16, 6)
    with pytest.raises(RuntimeError, match=r"another module is in the place of heads\.0; .* belongs into heads"):
        learner.end_task(data)
    model.heads[0] = head
    with pytest.warns(UserWarning, match=r"no batch reached heads\.1, heads\.2"):
        learner.end_task(data)
    with pytest.raises(RuntimeError, match=r"another module is in the place of heads\.0"):
        grown(model, learner)
    model = WithHeads()
    learner = learner_of(model, torch.optim.AdamW(model.parameters(), lr=1e-2), heads=["heads"], energy=0.6)
    for _ in range(2):
        learner.begin_task(data)
        train(model, learner.optimizers[0], data, 3)
        learner.end_task(data)
        assert not model.heads[0].weight.requires_grad
        grown(model, learner)
        assert model.heads[0].weight.requires_grad


def test_close_leaves_a_plain_trainable_model():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    learner = learner_of(model, optimizer)
    for number in range(2):
        learner.begin_task(task(number))
        train(model, optimizer, task(number), 5)
        learner.end_task(task(number))
    learner.begin_task(task(2))
    learner.close()
    learner.close()
    assert all(type(module).__module__.startswith("torch.nn") for module in model.modules())
    assert all(parameter.requires_grad and not parameter._backward_hooks for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    before = {name: p.layer.weight.detach().double().clone() for name, p in learner._protected.items()}
    train(model, optimizer, task(2), 20)
    assert any(along > 1e-3 for along, _ in drifts(learner, before).values())
    with pytest.raises(RuntimeError, match="closed"):
        learner.begin_task(task(3))


def test_layers_that_no_batch_reaches_stay_plain_and_protected():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
            self.use_b = True

        def forward(self, x):
            h = self.a(x)
            return self.out(torch.tanh(h + self.b(x) if self.use_b else h))

    model = Two()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer, energy=0.7)
    first, second = task(0, size=(12,)), task(1, size=(12,))
    learner.begin_task(first)
    train(model, optimizer, first, 5)
    learner.end_task(first)
    model.use_b = False
    with pytest.warns(UserWarning, match="no batch reached b; these layers stay plain"):
        learner.begin_task(second)
    model.use_b = True
    before = weights(learner)
    train(model, optimizer, second, 20)
    assert_protected(learner, before)
    model.use_b = False
    with pytest.warns(UserWarning, match="no batch reached b; nothing more is protected there"):
        learner.end_task(second)


def test_a_refused_end_changes_nothing():
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.factor = nn.Linear(12, 12), nn.Linear(12, 5), 1.0

        def forward(self, x):
            return self.b(self.a(x) * self.factor)

    model = Overflowing()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    learner = learner_of(model, optimizer, energy=0.5)
    for number in range(2):
        data = task(number, size=(12,))
        learner.begin_task(data)
        before, state = weights(learner), learner.capacity()
        model.factor = torch.inf
        with pytest.raises(RuntimeError, match="layer 'b', its input"):
            learner.end_task(data)
        assert learner.capacity() == state
        model.factor = 1.0
        train(model, optimizer, data, 10)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)


def test_iterators_are_looked_at_twice():
    model = network()
    learner = learner_of(model, torch.optim.SGD(model.parameters(), lr=0.1), max_batches=2)
    learner.begin_task(iter(task(0, batches=3)))
    assert all(layer.is_calibrated for layer in learner._layers.values())


@pytest.mark.parametrize(("dtype", "loss"), [(torch.bfloat16, 0.05), (torch.float16, 5e-3)])
def test_a_narrow_basis_protects_less(dtype, loss):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    learner = learner_of(model, optimizer, basis_dtype=dtype)
    data = task(0)
    learner.begin_task(data)
    learner.end_task(data)
    with torch.no_grad():
        gathered = learner._gatherer(data).features({n: p.layer for n, p in learner._protected.items()})
    learner.begin_task(task(1))
    before = weights(learner)
    train(model, optimizer, task(1), 20)
    assert_protected(learner, before)
    # What the first task's inputs feel of the change: energy 0.9 is protected, but for the rounding of the basis.
    for name, protection in learner._protected.items():
        gram = gathered[name].double()
        rows = torch.stack([protection.basis.restricted(whole, g).trace() for g, whole in enumerate(gram)])
        assert float(rows.sum() / gram.diagonal(dim1=1, dim2=2).sum()) <= 0.1 + loss


def test_bad_arguments_are_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"energy is 1.5; expected a number in"):
        learner_of(model, optimizer, energy=1.5)
    with pytest.raises(TypeError, match=r"optimizer is a Sequential; expected a torch.optim.Optimizer"):
        learner_of(model, model)
    with pytest.raises(ValueError, match=r"energy is 'a'; expected a number in"):
        learner_of(model, optimizer, energy="a")
    with pytest.raises(TypeError, match=r"optimizer is a int; expected a torch.optim.Optimizer"):
        learner_of(model, [optimizer, 3])
    for heads in ("head", ["("], [3]):
        with pytest.raises(ValueError, match=r"heads is .*; expected a sequence"):
            learner_of(model, optimizer, heads=heads)
    with pytest.raises(ValueError, match="basis_device is 'nowhere'; expected a device of this machine"):
        learner_of(model, optimizer, basis_device="nowhere")
    with pytest.raises(ValueError, match=r"max_batches is 2\.5; expected an integer"):
        learner_of(model, optimizer, max_batches=2.5)
    with pytest.raises(ValueError, match="after_first_task is 'melt'"):
        learner_of(model, optimizer, after_first_task="melt")
    with pytest.raises(ValueError, match="max_batches is 0"):
        learner_of(model, optimizer, max_batches=0)
    with pytest.raises(ValueError, match="budget_bytes is 7; expected None"):
        learner_of(model, optimizer, config=lance.LanceConfig(budget_bytes=7))
    with pytest.raises(ValueError, match=r"basis_dtype is torch.int8"):
        learner_of(model, optimizer, basis_dtype=torch.int8)
    with pytest.raises(ValueError, match="no trainable linear or convolution layer to protect"):
        learner_of(nn.Sequential(nn.ReLU()), optimizer)
    learner = learner_of(model, optimizer)
    with pytest.raises(RuntimeError, match="no task has begun"):
        learner.end_task(task(0))
    with pytest.raises(ValueError, match="loader gave no batch"):
        learner.begin_task([])
    bad = task(0)
    bad[0][0][0] = torch.nan
    with pytest.raises(RuntimeError, match=r"layer '0', its input: .* NaN"):
        learner.begin_task(bad)
    learner.begin_task(task(0))
    with pytest.raises(RuntimeError, match="a task has begun"):
        learner.begin_task(task(0))
