"""Peak memory of a step, each measured in a process of its own.

On a CPU the running sum of the profiler's allocation events, which counts every tensor exactly, and nothing that
libraries allocate for themselves (a BLAS buffer, say); on CUDA what the caching allocator has counted.
"""

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from multiprocessing.connection import Connection

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_cost.cases import Case, methods
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.method import Method

# A fork server that has imported the package starts a process in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_STEPS = 3


@dataclass(frozen=True)
class Memory:
    """Bytes above the head's weights and the batch.

    Attributes:
        state_bytes: held between steps.
        peak_bytes: the most that is held during a step, the state included.
    """

    state_bytes: int
    peak_bytes: int


def memory_of(case: Case, method: str, device: str) -> Memory:
    """Make a method in a fresh process, step, and see what is allocated from its making on.

    Args:
        case: head and batch.
        method: name of the method.
        device: where it runs.

    Returns:
        What it holds and what it needs.

    Raises:
        RuntimeError: the process failed.
    """
    _CONTEXT.set_forkserver_preload([__name__])
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(sender, case, method, device))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"measuring the memory of {method} on {case.name} failed") from error
    finally:
        process.join()


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the tensors that some work on the CPU allocates.

    Args:
        work: what is measured; what it returns counts as held.

    Returns:
        Bytes held at its end, and the most held at any time, both above those held before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
        gc.collect()
    del kept
    assert seen.profiler is not None
    events = (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    levels = list(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
    return levels[-1], max(levels)


def _allocated_on_gpu(work: Callable[[], object]) -> tuple[int, int]:
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    kept = work()
    gc.collect()
    held = torch.cuda.memory_allocated() - start
    del kept
    return held, torch.cuda.max_memory_allocated() - start


def _send(sender: Connection, case: Case, method: str, device: str) -> None:
    make, group = methods(case)[method], SingleProcess()
    batch = case.batch(device, group)

    def steps() -> Method:
        made = make(case, device, group)
        for _ in range(_STEPS):
            made.step(batch)
        return made

    steps()  # what first steps alone allocate: libraries' handles, lazy imports
    gc.collect()
    held, peak = (_allocated_on_gpu if device == "cuda" else allocated)(steps)
    head = case.head("meta")
    weights = sum(t.nbytes for t in [*head.parameters(), *head.buffers()])
    sender.send(Memory(held - weights, peak - weights))
