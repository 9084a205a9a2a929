"""Times of steps, the methods in turns, so that the machine's noise meets all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch

from kngd_ray.training.batches import Batch
from kngd_ray.training.method import Method

_WARM_UP = 2
_LEAST = 3  # rounds that are made whatever time they take


def interleaved(
    methods: Mapping[str, Method],
    batch: Batch,
    seconds: float,
    together: Callable[[float], float] = lambda left: left,
) -> dict[str, list[float]]:
    """Time steps in rounds of one step of each method.

    Args:
        methods: the methods, by name.
        batch: this rank's part of the batch that each step sees.
        seconds: when they have passed, no further round begins.
        together: called before each step with the seconds left; gives those that all ranks agree on.

    Returns:
        For each method its times in seconds.
    """
    for method in methods.values():
        for _ in range(_WARM_UP):
            method.step(batch)
    times: dict[str, list[float]] = {name: [] for name in methods}
    end, left, rounds = time.perf_counter() + seconds, seconds, 0
    while left > 0 or rounds < _LEAST:
        for name, method in methods.items():
            left = together(end - time.perf_counter())
            times[name].append(_timed(method, batch))
        rounds += 1
    return times


def _timed(method: Method, batch: Batch) -> float:
    _wait(batch)
    start = time.perf_counter()
    method.step(batch)
    _wait(batch)
    return time.perf_counter() - start


def _wait(batch: Batch) -> None:
    if batch.inputs.is_cuda:
        torch.cuda.synchronize()
