"""Light trials on Ray: a pool of long-lived processes, each running one batch of trials after another.

A trial that takes a fraction of a second needs no Tune trial of its own, whose bookkeeping takes as long. The study
decides which trials there are and is on disk, as for :mod:`kngd_ray.cluster.tune_job`; schedulers are Tune's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from kngd_ray.cluster.same_code import compared
from kngd_ray.errors import KngdError
from kngd_ray.tuning import (
    Claimed,
    Driver,
    Report,
    Workload,
    fit_alone,
    fit_together,
    reason_of,
    report_of,
    score_trials,
)

DIED = "its process died (killed, out of memory, or its node is gone)"
OUT_OF_MEMORY = "it ran out of memory: lower search.concurrency, or raise search.cpus_per_trial"
_LOOK_SECONDS = 0.2
_MOST_STARTS = 5  # in a row that come to nothing


def run_pool(
    driver: Driver, work: Workload, mode: str, *, slots: int, size: int, resources: Mapping[str, float]
) -> None:
    """Run trials until the search ends; Ray must be up.

    Args:
        driver: gives the trials.
        work: what they work on.
        mode: ``local`` or ``batched``.
        slots: processes.
        size: trials of a turn.
        resources: ``cpu`` and perhaps ``gpu`` that each process reserves.

    Raises:
        KngdError: no process starts.
    """
    pool = _Pool(driver, work, mode, slots, size, resources)
    try:
        while pool.give_work():
            pool.take_in()
    finally:
        pool.end()


def _turn(config: dict[str, Any], *, work: Workload, mode: str, device: str) -> list[Report]:
    """Run the trials of a turn in the process of an actor."""
    trials: list[Claimed] = config["trials"]
    fitter = partial(fit_together if mode == "batched" else fit_alone, device=device)
    *_, scored = score_trials([trial.settings for trial in trials], work, fitter, at_once=mode == "batched")
    return [report_of(one) for one in scored]


class _Pool:
    """Actors, and the trials that each is running.

    An actor is given trials only once it is up: those of one that waits for room another driver could run.
    """

    def __init__(
        self, driver: Driver, work: Workload, mode: str, slots: int, size: int, resources: Mapping[str, float]
    ) -> None:
        self._driver = driver
        self._size = size
        gpus = resources.get("gpu", 0)
        self._turn = partial(compared(__name__, _turn.__name__), mode=mode, device="cuda" if gpus else "cpu")
        self._kind = _actor_class().options(num_cpus=resources["cpu"], num_gpus=gpus)
        self._work = ray.put(work)
        self._waited: dict[Any, tuple[Any, list[Claimed]]] = {}  # what is waited for, of which actor, for which trials
        self._idle: list[Any] = []
        self._starts = 0
        for _ in range(slots):
            self._start()

    def _start(self) -> None:
        actor = self._kind.remote(self._turn, self._work)
        self._waited[actor.is_up.remote()] = actor, []

    def give_work(self) -> bool:
        """Give trials to actors that have none; False where the search has ended."""
        if self._driver.stopping.is_set():
            return False
        over = False
        while self._idle and not over:
            trials = self._driver.claim(self._size)
            if not trials:
                over = trials == []
                break
            actor = self._idle.pop()
            self._waited[actor.run.remote({"trials": trials})] = actor, trials
        busy = any(trials for _, trials in self._waited.values())  # who dies may yet bring trials back
        return busy or not over

    def take_in(self) -> None:
        """Wait for actors' reports, briefly enough to notice that the search should stop.

        Raises:
            KngdError: no process starts.
        """
        if not self._waited:
            self._driver.stopping.wait(_LOOK_SECONDS)
            return
        ready, _ = ray.wait(list(self._waited), num_returns=1, timeout=_LOOK_SECONDS)
        for reference in ready:
            actor, trials = self._waited.pop(reference)
            try:
                reports = ray.get(reference)
            except RayTaskError as error:  # of a trial, whatever it is: the process is there
                self._driver.died(trials, reason_of(error.cause))
                self._idle.append(actor)
            except RayError as error:
                self._driver.died(trials, _reason(error))
                self._starts += not trials
                if self._starts > _MOST_STARTS:
                    raise KngdError(
                        f"Ray could not start a process for trials: {_reason(error)}; see kngd-ray doctor."
                    ) from error
                self._start()
            else:
                self._starts = 0
                if trials:
                    self._driver.heard(trials, reports)
                self._idle.append(actor)

    def end(self) -> None:
        """Let the processes go."""
        for actor in [*self._idle, *(actor for actor, _ in self._waited.values())]:
            ray.kill(actor)


def _actor_class() -> Any:
    """The actor's class, pickled by value: the worker's version of a module is compared before it is used."""

    class Kept:
        def __init__(self, turn: Any, work: Any) -> None:
            self._turn, self._work = turn, work

        def is_up(self) -> None:
            return None

        def run(self, config: dict[str, Any]) -> Any:
            return self._turn(config, work=self._work)

    return ray.remote(Kept)


def _reason(error: RayError) -> str:
    """Why an actor is gone, in one line."""
    if "low on memory" in str(error) or "OutOfMemory" in type(error).__name__:
        return OUT_OF_MEMORY
    return DIED if isinstance(error, RayActorError) else reason_of(error)
