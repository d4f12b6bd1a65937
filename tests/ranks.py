"""What each rank does in the tests of distributed training: run in processes of its own, started once for all tests."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import os
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lance_kernels as lance
from tests import continual_cases

FAST = {"timeout": datetime.timedelta(seconds=60)}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        h = torch.tanh(x)
        x = x + self.query(h) * self.key(h)
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def network():
    torch.manual_seed(0)
    return Network()


def batches(count, seed, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


def compressed(**config):
    model = network()
    lance.compress_(model, lance.LanceConfig(**{"core_bits": None, **config}))
    return model


def calibrate(model, data, **arguments):
    return lance.calibrate(model, data, progress=False, **arguments)


def assert_factors_near(model, other, tolerance=1e-4):
    for (name, layer), (_, twin) in zip(layers(model), layers(other)):
        for mine, theirs in zip(layer.factors, twin.factors, strict=True):
            if mine is None or theirs is None:
                assert mine is None, name
                assert theirs is None, name
            else:
                assert mine.shape == theirs.shape, name
                # Eigenvectors up to rounding of the sums: compare what they span.
                error = (mine @ mine.mT - theirs @ theirs.mT).abs().max()
                assert error < tolerance, (name, error)


def layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, lance.nn.Linear | lance.nn.Conv2d)]


def assert_same_everywhere(model):
    for name, layer in layers(model):
        for factor in layer.factors:
            if factor is not None:
                everyone = [torch.empty_like(factor) for _ in range(dist.get_world_size())]
                dist.all_gather(everyone, factor)
                assert all(torch.equal(one, factor) for one in everyone), name


def train(model, data, steps=2, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def shard(everything):
    rank, world = dist.get_rank(), dist.get_world_size()
    return everything[rank::world]


def calibration_sums_over_ranks():
    everything = batches(6, seed=1)
    alone, model = compressed(), compressed()
    mine = shard(everything)
    found = calibrate(model, mine)
    assert found.batches == 6
    assert_same_everywhere(model)
    assert found.shared == {"key": "query"}
    calibrate(alone, everything, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True))
    assert_factors_near(model, alone)


def unequal_batch_counts_and_an_empty_rank():
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = [0, 1, 4][:world]
    data = [batches(count, seed=10 + index) for index, count in enumerate(counts)]
    model, alone = compressed(), compressed()
    found = calibrate(model, data[rank])
    assert found.batches == sum(counts)
    assert_same_everywhere(model)
    everything = [batch for part in data for batch in part]
    calibrate(alone, everything, process_group=dist.new_group([rank], use_local_synchronization=True))
    assert_factors_near(model, alone)


def groups_under_a_limit():
    model, alone = compressed(), compressed()
    mine = shard(batches(6, seed=2))
    calibrate(model, mine, max_bytes=3000)
    assert_same_everywhere(model)
    calibrate(alone, mine)
    assert_factors_near(model, alone)


def no_rank_has_data():
    with pytest.raises(ValueError, match="loader gave no batch"):
        calibrate(compressed(), [])


def a_failing_rank_does_not_hang_the_others():
    rank = dist.get_rank()
    model = compressed()
    calibrate(model, batches(2, seed=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loader():
        yield from batches(1, seed=rank)
        if rank == 1:
            raise OSError("disk gone")
        yield from batches(1, seed=rank + 5)

    expected, message = (OSError, "disk gone") if rank == 1 else (RuntimeError, "rank 1 failed.*OSError: disk gone")
    with pytest.raises(expected, match=message):
        calibrate(model, loader())
    poisoned = batches(1, seed=rank)
    if rank == 0:
        poisoned[0][0] = torch.nan
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        calibrate(model, poisoned)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    calibrate(model, batches(1, seed=rank))
    assert_same_everywhere(model)


def sizes_that_differ_by_rank_are_kept():
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(8, 4))
    lance.compress_(model, lance.LanceConfig(energy=0.5, core_bits=None))
    torch.manual_seed(rank)
    found = calibrate(model, [torch.randn(3, 5 + rank, 8)])
    assert found.layers["0"].varied == (1,)
    assert model[0].factors[1] is None
    assert_same_everywhere(model)


def ddp(calibrate_first=True):
    data = batches(2, seed=20 + dist.get_rank())
    model = compressed(companions="none")
    if calibrate_first:
        calibrate(model, data)
    wrapped = DistributedDataParallel(model)
    if not calibrate_first:
        # Ranks with unequal numbers of batches, below DDP's own collectives.
        calibrate(wrapped, data[: dist.get_rank() + 1])
    twin = compressed(companions="none")
    twin.load_state_dict(model.state_dict())
    assert_same_everywhere(model)
    wrapped(data[0]).square().mean().backward()
    twin(data[0]).square().mean().backward()
    for mine, local in zip(model.parameters(), twin.parameters()):
        dist.all_reduce(local.grad)
        assert torch.allclose(mine.grad, local.grad / dist.get_world_size(), rtol=1e-4, atol=1e-6)
    # Two forwards before a backward: a broadcast of factors in between would be an error.
    (wrapped(data[0]).square().mean() + wrapped(data[1]).square().mean()).backward()
    with wrapped.no_sync():
        wrapped(data[0]).square().mean().backward()
    train(wrapped, data[0])
    weight = model.head.weight.detach()
    everyone = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, weight)
    assert all(torch.equal(one, weight) for one in everyone)


def fsdp(order):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    data = batches(2, seed=30)
    mine = data[0][dist.get_rank() :: dist.get_world_size()]
    twin = compressed(companions="none")
    calibrate(twin, data)
    model = network()

    def split():
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def compress():
        summary = lance.compress_(model, lance.LanceConfig(core_bits=None, companions="none"))
        assert len(summary.compressed) == (6 if order != "after" else 5)
        if order == "after":
            # fully_shard gave it a class of its own.
            assert "FSDPLinear" in summary.left["up"]

    if order == "before":
        compress()
        calibrate(model, data)
        split()
    elif order == "between":
        compress()
        split()
        calibrate(model, data)
    else:
        split()
        compress()
        calibrate(model, data)
    if order != "after":
        assert_factors_near(model, twin)
    else:
        twin.up.lance_clear_factors()
    model(mine).square().mean().backward()
    twin(data[0]).square().mean().backward()
    for (name, sharded), local in zip(model.named_parameters(), twin.parameters()):
        full = sharded.grad.full_tensor()
        assert torch.allclose(full, local.grad, rtol=1e-3, atol=1e-6), name
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        fresh = compressed(companions="none", exclude_modules=["up"] if order == "after" else [])
        fresh.load_state_dict(state)
        assert_factors_near(fresh, model, 1e-6)
    own = get_model_state_dict(model)
    set_model_state_dict(model, own)
    train(model, mine)


def tensor_parallel_weights_are_left_alone():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(network(), mesh, plan)
    summary = lance.compress_(model, lance.LanceConfig(companions="none"))
    assert set(summary.left) == {"up", "down"}
    assert all("tensor parallel" in reason for reason in summary.left.values())
    data = batches(2, seed=40)
    calibrate(model, data)
    train(model, data[0])
    # Parallelized after compress_: the layers say so and keep their inputs.
    late = compressed(companions="none")
    calibrate(late, data)
    parallelize_module(late, mesh, plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(late, data[0], steps=1)
    assert any("tensor parallel" in str(entry.message) for entry in caught)


def everywhere_the_same(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(one, tensor) for one in everyone)


def two_tasks_of_a_learner():
    rank, model = dist.get_rank(), continual_cases.network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    learner = continual_cases.learner_of(model, optimizer)
    for number in range(2):
        data = continual_cases.task(number, batches=4)[rank::2]
        learner.begin_task(data)
        before = continual_cases.weights(learner)
        # Wrapped anew in every task: it has to know which parameters are trained.
        continual_cases.train(DistributedDataParallel(model), optimizer, data, 20)
        if number:
            continual_cases.assert_protected(learner, before)
        learner.end_task(data)
        for protection in learner._protected.values():
            assert everywhere_the_same(protection.layer.weight.detach())
            assert everywhere_the_same(protection.basis.packed)


SCENARIOS = {
    2: {
        "ddp, calibrated before": ddp,
        "ddp, calibrated after": functools.partial(ddp, calibrate_first=False),
        "fsdp, sharded last": functools.partial(fsdp, "before"),
        "fsdp, sharded between": functools.partial(fsdp, "between"),
        "fsdp, sharded first": functools.partial(fsdp, "after"),
        "tensor parallel": tensor_parallel_weights_are_left_alone,
        "continual": two_tasks_of_a_learner,
    },
    3: {
        "sums": calibration_sums_over_ranks,
        "empty rank": unequal_batch_counts_and_an_empty_rank,
        "groups": groups_under_a_limit,
        "no data": no_rank_has_data,
        "failing rank": a_failing_rank_does_not_hang_the_others,
        "sizes": sizes_that_differ_by_rank_are_kept,
    },
}


@contextlib.contextmanager
def process_group(store, rank=0, world=1):
    """The default process group of `world` processes that meet at the file `store`."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, **FAST)
    try:
        yield
    finally:
        # A group that a parallel module outlives is joined under the lock that its threads may wait for.
        gc.collect()
        dist.destroy_process_group()


def run(rank, world, folder):
    torch.set_num_threads(1)
    results = {}
    for index, (name, scenario) in enumerate(SCENARIOS[world].items()):
        with process_group(f"{folder}/store{index}", rank, world):
            try:
                scenario()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    # Threads of gloo that are left abort when they let go of a tensor while the interpreter shuts down.
    os._exit(0)
