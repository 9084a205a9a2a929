"""Steps on several gloo ranks of this machine, one thread each."""

import multiprocessing
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.step_cost.cases import Case, methods
from benchmarks.step_cost.timing import interleaved
from kngd_ray.sharding import Group, ProcessGroup, SingleProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class RankFigures:
    """Of one method on W ranks.

    Attributes:
        times: of steps on rank 0, seconds.
        covariance_bytes: largest piece of the covariance; None for gradient descent.
        bytes_moved: largest number of bytes that a rank received in a step.
    """

    times: list[float]
    covariance_bytes: int | None
    bytes_moved: int


def on_ranks(case: Case, world_size: int, seconds: float) -> dict[str, RankFigures]:
    """Time all methods of a case but the naive one, which knows no ranks.

    Args:
        case: head and global batch.
        world_size: number of ranks.
        seconds: for the steps.

    Returns:
        Figures of each method.

    Raises:
        RuntimeError: a rank failed.
    """
    _CONTEXT.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_rank, args=(rank, world_size, folder, case, seconds)) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"a rank of {world_size} failed on {case.name}")
        return torch.load(Path(folder) / "figures.pt", weights_only=False)


def _rank(rank: int, world_size: int, folder: str, case: Case, seconds: float) -> None:
    torch.set_num_threads(1)
    meet = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    group: Group = ProcessGroup() if world_size > 1 else SingleProcess()

    def agreed(left: float) -> float:
        """What rank 0 says; on the way, all ranks meet."""
        return float(group.sum(torch.tensor([left if rank == 0 else 0.0])))

    made = {name: make(case, "cpu", group) for name, make in methods(case).items() if name != "naive"}
    batch = case.batch("cpu", group)
    times = interleaved(made, batch, seconds, agreed)
    figures = {}
    for name, method in made.items():
        stats = method.step(batch)
        moved = stats.bytes_moved
        if moved is None:  # gradient descent: DDP's all_reduce of the gradient, counted as that of a ring
            moved = 2 * 4 * case.n * (world_size - 1) // world_size
        every: list[tuple[int | None, int]] = [(None, 0)] * world_size
        dist.all_gather_object(every, (stats.covariance_bytes, moved))
        held = [bytes_held for bytes_held, _ in every if bytes_held is not None]
        figures[name] = RankFigures(times[name], max(held, default=None), max(moved for _, moved in every))
    if rank == 0:
        torch.save(figures, Path(folder) / "figures.pt")
    dist.barrier()
    dist.destroy_process_group()
