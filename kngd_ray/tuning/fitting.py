"""Ways to run the fits that trials need: one by one, or fits of one shape together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from kngd_ray.errors import FilterError
from kngd_ray.sharding import SingleProcess, covariance_bytes
from kngd_ray.training import batched_fits
from kngd_ray.training.fit import FitTask, StepRecord, begin, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method
from kngd_ray.training.resumable import latest
from kngd_ray.training.stream import Met, prequential

_MEMORY = 1 << 30  # bytes of covariance held for fits that advance together
_TOGETHER = 32  # measured: of more, the products of pairs no longer find their memory in the cache


@dataclass(frozen=True)
class Fitted:
    """A fit at its end.

    Attributes:
        method: with its trained head.
        records: its steps.
        sizes: samples of each step.
    """

    method: Method
    records: Sequence[StepRecord]
    sizes: Sequence[int]


def fit_alone(tasks: Sequence[FitTask], *, device: str = "cpu") -> list[Fitted | FilterError]:
    """Run fits one after another.

    Args:
        tasks: the fits.
        device: where to compute.

    Returns:
        For each the fit, or the error that ended it.
    """
    return [_alone(task, device) for task in tasks]


def fit_together(tasks: Sequence[FitTask], *, device: str = "cpu") -> list[Fitted | FilterError]:
    """Run fits of one shape together, and others one after another.

    Args:
        tasks: the fits.
        device: where to compute.

    Returns:
        For each the fit, or the error that ended it.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, task in enumerate(tasks):
        groups[batched_fits.shape_of(task)].append(number)
    done: dict[int, Fitted | FilterError] = {}
    for shape, members in groups.items():
        count = 1 if shape is None else _count(tasks[members[0]])
        for start in range(0, len(members), count):
            some = members[start : start + count]
            chosen = [tasks[n] for n in some]
            if shape is None or len(some) == 1:
                done |= zip(some, fit_alone(chosen, device=device), strict=True)
                continue
            for n, outcome in zip(some, batched_fits.fit_together(chosen, device=device), strict=True):
                done[n] = (
                    outcome if isinstance(outcome, FilterError) else _fitted(tasks[n], outcome.method, outcome.records)
                )
    return [done[n] for n in range(len(tasks))]


def fitted_from(task: FitTask, folder: Path, records: Sequence[StepRecord]) -> Fitted | FilterError:
    """A fit that another process ran, from its checkpoint.

    Args:
        task: the fit.
        folder: of its checkpoints.
        records: its steps.

    Returns:
        The fit, or that it is not there.
    """
    found = latest(folder)
    if found is None or found.manifest["step"] < found.manifest["steps"]:
        return FilterError("its job left no final checkpoint")
    method = begin(task, SingleProcess())
    method.load(found.state)
    return _fitted(task, method, records)


def evidence(fitted: Fitted) -> float:
    """Log-probability that a fit gives to labels which it has yet to learn from.

    Each batch is predicted before its first visit by the belief that has learned all batches before it, as often as
    the fit visits them; softened by the posterior as far as it is worth it, as a fit's own predictions are: at the
    best tau. The first half of the shots is not counted: a belief that has seen next to nothing says more about the
    pretrained model than about the prior, and overshoots as it does not later on.

    A stream is judged as it is met: all of its batches, each at the tau that was chosen before it.

    Args:
        fitted: a fit of a prequential task.

    Returns:
        Nats per shot.

    Raises:
        FilterError: a step was refused, so that some labels were not learned from.
    """
    scores: list[tuple[float, ...]] = []
    counts: list[int] = []
    met: list[Met] = []
    for record, size in zip(fitted.records, fitted.sizes, strict=True):
        if record.stats is None:
            raise FilterError(f"step {record.step} of {record.steps} was refused: {record.refused}")
        if record.met is not None:
            met.append(record.met)
        if record.stats.log_predictive is not None:
            scores.append(record.stats.log_predictive)
            counts.append(size)
    if met:
        return -prequential(met)["nll"]
    if not scores:
        raise FilterError("it takes no step, so nothing is predicted: give it one epoch or more")
    before = [0, *accumulate(counts)]
    later = [n for n in range(len(counts)) if 2 * before[n] >= before[-1]] or [len(counts) - 1]
    return max(map(sum, zip(*(scores[n] for n in later), strict=True))) / sum(counts[n] for n in later)


def _count(task: FitTask) -> int:
    """How many fits of a task's shape advance together: twice their covariances are held, before and after a step."""
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    return max(1, min(_TOGETHER, _MEMORY // (2 * covariance_bytes(method.belief.covariance))))


def _alone(task: FitTask, device: str) -> Fitted | FilterError:
    records: list[StepRecord] = []
    try:
        return _fitted(task, fit(task, device=device, on_step=records.append), records)
    except FilterError as error:
        return error


def _fitted(task: FitTask, method: Method, records: Sequence[StepRecord]) -> Fitted:
    sampler = task.sampler
    return Fitted(method, records, [sum(sampler.chosen(step).sizes) for step in range(sampler.steps)])
