"""Steps on gloo ranks of this machine: what each holds of the covariance, and what moves."""

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.tower_cost.cases import Case
from kngd_ray.sharding import ProcessGroup, SingleProcess

_CONTEXT = multiprocessing.get_context("spawn")
_TIMEOUT = timedelta(minutes=10)


def on_ranks(case: Case, method: str, world_size: int) -> tuple[int, int]:
    """One step on several ranks of one thread each.

    Args:
        case: network and global batch.
        method: name of a filter.
        world_size: number of ranks.

    Returns:
        The largest share of the covariance, and the most bytes that a rank received.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_CONTEXT.Process(target=_rank, args=(r, world_size, folder, case, method)) for r in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"a rank of {world_size} failed on {case.model}")
        held, moved = zip(*(torch.load(Path(folder) / f"{r}.pt") for r in range(world_size)), strict=True)
        return max(held), max(moved)


def _rank(rank: int, world_size: int, folder: str, case: Case, method: str) -> None:
    torch.set_num_threads(1)
    meet = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    group = ProcessGroup() if world_size > 1 else SingleProcess()
    network = case.network()
    stats = case.method(method, network, group).step(case.batch(network, group))
    torch.save((stats.covariance_bytes, stats.bytes_moved), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
