"""Peak memory of a step, of each method in a process of its own."""

import ctypes
import multiprocessing
import re
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.tower_cost.cases import Case
from kngd_ray.sharding import SingleProcess

_CONTEXT = multiprocessing.get_context("spawn")
_STEPS = 2
_PROCESS = Path("/proc/self")


def peak_of(case: Case, method: str, threads: int) -> int:
    """Bytes above the network and the batch.

    Args:
        case: network and batch.
        method: its name.
        threads: of torch.

    Returns:
        The most that is held while the method is made and makes two steps.

    Raises:
        RuntimeError: the process failed.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(sender, case, method, threads))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"measuring the memory of {method} on {case.model} failed") from error
    finally:
        process.join()


def _send(sender: Connection, case: Case, method: str, threads: int) -> None:
    torch.set_num_threads(threads)
    network, group = case.network(), SingleProcess()
    batch = case.batch(network, group)
    with torch.no_grad():
        network(network.example(1))  # what libraries load and keep at their first use
    before = _peak(case.device, reset=True)
    made = case.method(method, network, group)
    for _ in range(_STEPS):
        made.step(batch)
    sender.send(_peak(case.device) - before)


def _peak(device: str, reset: bool = False) -> int:
    """The most held so far in bytes; after a reset what is held now."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is free but resident would be used again unseen
        (_PROCESS / "clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
    assert found
    return int(found[1]) * 1024
