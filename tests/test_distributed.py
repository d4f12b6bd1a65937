"""Training, calibrating and learning on over several processes: `tests/ranks.py` has what each of them does."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing

from tests.ranks import SCENARIOS, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """For every number of ranks and scenario, what each rank says: nothing, or a traceback."""
    started = {}

    def of(world):
        if world not in started:
            folder = tmp_path_factory.mktemp(f"ranks{world}")
            torch.multiprocessing.spawn(run, (world, str(folder)), nprocs=world)
            started[world] = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
        return started[world]

    return of


@pytest.mark.parametrize(("world", "scenario"), [(n, name) for n, names in SCENARIOS.items() for name in names])
def test_ranks(results, world, scenario):
    failures = [f"rank {rank}:\n{said[scenario]}" for rank, said in enumerate(results(world)) if said[scenario]]
    assert not failures, "\n".join(failures)
