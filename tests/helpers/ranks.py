"""Run a function on several gloo ranks: the failing rank is named, and nothing ever hangs."""

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kngd_ray.sharding import ProcessGroup

# A fork server that has imported the package starts a rank in milliseconds; it runs no torch
# operation itself, so there are no threads to lose in the fork. With open_clip, what optimizers import comes too.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "kngd_ray.training.calibration",
    "kngd_ray.training.resumable",
    "kngd_ray.config",
    "open_clip",
])
_START_SECONDS = 60.0  # a busy machine may take this long to start a process


class RankError(AssertionError):
    """A rank raised, died or did not finish in time; the message names it and holds its traceback."""


def run_ranks(
    world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Call ``work(group, *args)`` on every rank.

    Args:
        world_size: number of ranks.
        work: a function that a fresh process can import; what it returns must survive ``torch.save``.
        *args: given to every rank alike.
        timeout: seconds for the work, from when all ranks have met.
        backend: of the collectives; with ``nccl`` each rank has a GPU of its own.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankError: naming the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, world_size, folder, timeout, backend, work, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _watch(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _watch(processes: list[Any], folder: Path, timeout: float) -> None:
    running = dict(enumerate(processes))
    deadline, met = time.monotonic() + _START_SECONDS, False
    while running:
        if not met and all((folder / f"met-{rank}").exists() for rank in range(len(processes))):
            deadline, met = time.monotonic() + timeout, True
        left = deadline - time.monotonic()
        if left <= 0 and not met:
            raise RankError(f"the ranks did not meet in {_START_SECONDS:.0f} s")
        if left <= 0:
            stacks = "\n".join(f"rank {r}:\n{_read(folder / f'stack-{r}.txt')}" for r in running)
            raise RankError(f"ranks {sorted(running)} did not finish in {timeout:.0f} s\n{stacks}")
        wait([process.sentinel for process in running.values()], left if met else 0.02)
        ended = {rank: process for rank, process in running.items() if not process.is_alive()}
        if any(process.exitcode for process in ended.values()):
            raise RankError(_first_failure(folder, ended))
        running = {rank: process for rank, process in running.items() if rank not in ended}


def _first_failure(folder: Path, ended: dict[int, Any]) -> str:
    """The earliest error: what other ranks raise when their peer has gone says nothing."""
    for rank, process in ended.items():
        if process.exitcode and not (folder / f"error-{rank}.txt").exists():
            return f"rank {rank} died without a word, exit code {process.exitcode}"
    errors = sorted(folder.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    return f"rank {errors[0].stem.removeprefix('error-')} failed:\n{errors[0].read_text()}"


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    timeout: float,
    backend: str,
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    try:
        with (folder / f"stack-{rank}.txt").open("w") as stack:
            dist.init_process_group(
                backend,
                init_method=(folder / "rendezvous").as_uri(),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=_START_SECONDS + timeout),
            )
            faulthandler.dump_traceback_later(max(timeout - 0.5, 0.1), file=stack)
            (folder / f"met-{rank}").touch()
            result = work(ProcessGroup(), *args)
            torch.save(result, folder / f"result-{rank}.pt")
            dist.barrier()  # a rank that leaves early would fail the last collective of the others
            dist.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # no clean-up that could wait for the other ranks
