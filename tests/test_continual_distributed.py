"""The learner on two processes: each sees its share of the data, and all hold the same weights and bases."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from tests.continual_cases import assert_protected, learner_of, network, task, train, weights


def everywhere_the_same(tensor: torch.Tensor) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, tensor.contiguous())
    return all(torch.equal(one, tensor) for one in everyone)


def two_tasks(rank: int) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    learner = learner_of(model, optimizer)
    for number in range(2):
        data = task(number, batches=4)[rank::2]
        learner.begin_task(data)
        before = weights(learner)
        # Wrapped anew in every task: it has to know which parameters are trained.
        train(DistributedDataParallel(model), optimizer, data, 20)
        if number:
            assert_protected(learner, before)
        learner.end_task(data)
        for protection in learner._protected.values():
            assert everywhere_the_same(protection.layer.weight.detach())
            assert everywhere_the_same(protection.basis.packed)


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        two_tasks(rank)
        said = ""
    except BaseException:
        said = traceback.format_exc()
    Path(folder, f"rank{rank}.txt").write_text(said)
    dist.destroy_process_group()


def test_two_processes_learn_together(tmp_path):
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    assert [Path(tmp_path, f"rank{rank}.txt").read_text() for rank in range(2)] == ["", ""]
