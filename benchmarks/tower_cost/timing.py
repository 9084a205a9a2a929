"""Times of steps, the methods in turns, and of the stages of a Kalman step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from kngd_ray.observations import Linearizer
from kngd_ray.sharding import StreamedFilter
from kngd_ray.sharding import streamed as module
from kngd_ray.training.batches import Batch
from kngd_ray.training.method import Method

Times = tuple[float, float]  # wall, and of the process


def in_turns(methods: Mapping[str, Method], batch: Batch, rounds: int) -> dict[str, list[Times]]:
    """Seconds of steps, one of each method in a round, after one that does not count."""
    times: dict[str, list[Times]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, method in methods.items():
            start = _now(), time.process_time()
            method.step(batch)
            taken = _now() - start[0], time.process_time() - start[1]
            if number:
                times[name].append(taken)
    return times


def stages(method: Method, batch: Batch, rounds: int) -> dict[str, float]:
    """Median milliseconds of the stages of a step.

    Args:
        method: a Kalman filter over layers.
        batch: what each step sees.
        rounds: steps.

    Returns:
        forward; backward, with the rows that are smaller than what they are made of; pass 1, solve and pass 2.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        with _watched() as spans:
            method.step(batch)
        for name, (start, stop) in {
            "forward": spans["run"],
            "backward": spans["_jacobian"],
            "pass 1": (spans["update"][0], spans["factored"][0]),
            "solve": spans["factored"],
            "pass 2": (spans["factored"][1], spans["update"][1]),
        }.items():
            found[name].append(stop - start)
    return {name: float(f"{median(times) * 1e3:.4g}") for name, times in found.items()}


@contextmanager
def _watched() -> Iterator[dict[str, Times]]:
    """Start and end of the functions that make up a step."""
    spans: dict[str, Times] = {}
    places = [(Linearizer, "run"), (Linearizer, "_jacobian"), (StreamedFilter, "update"), (module, "factored")]
    kept = [getattr(owner, name) for owner, name in places]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = _now()
            result = function(*args, **kwargs)
            spans[name] = start, _now()
            return result

        return call

    try:
        for (owner, name), function in zip(places, kept, strict=True):
            setattr(owner, name, timed(name, function))
        yield spans
    finally:
        for (owner, name), function in zip(places, kept, strict=True):
            setattr(owner, name, function)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
