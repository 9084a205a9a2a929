"""A search on Ray: light trials in a pool of actors; trials of several ranks or with a scheduler by Ray Tune.

The study decides which trials there are (:mod:`kngd_ray.tuning.study`), and it is on disk; Tune decides where they
run. What Tune calls a trial is a turn of a process here, which runs one trial of the study, or several that advance
together. A killed search is continued from the study, not from Tune's own state, which lags behind it.
"""

import gc
import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from kngd_ray.cluster.same_code import compared
from kngd_ray.cluster.session import gpus_of_cluster
from kngd_ray.cluster.train_job import job_fitter
from kngd_ray.cluster.trial_pool import DIED, OUT_OF_MEMORY, run_pool
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import KngdError
from kngd_ray.tuning import Claimed, Driver, Fitter, Workload, fit_alone, fit_together, report_of, score_trials

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own snapshots are not what a search is continued from
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # what is claimed and not begun, another driver could have run
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_SLOT_MEMORY = 1 << 20  # bytes: a trial that only waits for its Train job must reserve something that is not a CPU
_STOP_SECONDS = 3.0
_OBJECTIVE, _SEEDS = "objective", "support_sets"


def run_search(driver: Driver, work: Workload, trainer: TrainerConfig, mode: str, folder: Path) -> None:
    """Run trials on Ray until the search ends; Ray must be up.

    Args:
        driver: gives the trials.
        work: what they work on.
        trainer: ranks of each trial's job in the mode ``train``; and whether a trial has a GPU.
        mode: ``local``, ``batched`` or ``train``.
        folder: of the search, shared by all nodes.

    Raises:
        KngdError: too many trials failed.
    """
    gc.collect()  # actors that Ray Data left to the collector hold cores
    options = driver.options
    cpus = ray.cluster_resources().get("CPU", 1.0)
    each = trainer.most_workers * trainer.cpus_per_worker if mode == "train" else options.cpus_per_trial
    room = max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if mode != "train" and each > room:
        raise KngdError(
            f"search.cpus_per_trial is {each:g}, and no node of the cluster has more than {room:g} CPUs: lower it"
        )
    slots = options.concurrency or max(1, int(cpus / each))
    on_gpu = trainer.use_gpu is True and mode != "train"  # whose ranks ask for their own
    if on_gpu:
        slots = max(1, min(slots, int(gpus_of_cluster())))
    size = -(-options.batch // slots) if mode == "batched" else 1
    resources: Mapping[str, float] = {"cpu": each, **({"gpu": 1} if on_gpu else {})}
    if mode == "train":
        # No CPU for what only waits: on a machine whose cores the ranks need, it would wait for ever.
        resources = {"cpu": 0, "memory": _SLOT_MEMORY}
    elif options.scheduler == "none":
        run_pool(driver, work, mode, slots=slots, size=size, resources=resources)
        if driver.problem is not None:
            raise driver.problem
        return
    turn = tune.with_parameters(
        compared(__name__, _turn.__name__),
        work=work,
        trainer=trainer,
        mode=mode,
        place=str(folder / driver.study.scratch_of(driver.study.id)),
    )
    searcher = _StudySearcher(driver, slots, size)
    _quiet()
    with TemporaryDirectory(prefix="kngd_ray-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(turn, resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(driver),
                num_samples=10**9,  # the study knows when it is enough
                reuse_actors=mode != "train",  # a new process takes seconds, a trial often less than one
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=f"search-{uuid4().hex[:8]}",
                storage_path=scratch,
                verbose=0,
                stop=_Stop(driver.stopping),
                callbacks=[_Deaths(searcher)],
            ),
        )
        _wait(tuner, driver)
    if driver.problem is not None:
        raise driver.problem


def _wait(tuner: tune.Tuner, driver: Driver) -> None:
    """Run Tune in a thread, as it would take Ctrl-C for itself in this one.

    Raises:
        KeyboardInterrupt: Ctrl-C, when its processes have had time to end.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)

    thread = Thread(target=run, daemon=True, name="ray tune")
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)
    except KeyboardInterrupt:
        driver.stopping.set()
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what Tune meets when its processes are gone is no news
        thread.join(_STOP_SECONDS)
        raise
    if errors:
        raise errors[0]


def _turn(config: dict[str, Any], *, work: Workload, trainer: TrainerConfig, mode: str, place: str) -> None:
    """What one of Tune's trials runs."""
    trials: list[Claimed] = [Claimed(**trial) for trial in config["trials"]]
    device = "cuda" if trainer.use_gpu is True else "cpu"
    fitter: Fitter = partial(fit_together if mode == "batched" else fit_alone, device=device)
    with (
        TemporaryDirectory(dir=Path(place).parent, prefix=Path(place).name)
        if mode == "train"
        else nullcontext("") as scratch
    ):
        if mode == "train":
            fitter = job_fitter(trainer, Path(scratch))
        at_once = mode != "local" and work.search.scheduler == "none"  # else it wants to look in between
        for scored in score_trials([trial.settings for trial in trials], work, fitter, at_once=at_once):
            first = work.search.objective[0]
            seeds = len(scored[0].scores.get(first, ()))
            objective = scored[0].objective.get(first, float("nan"))
            tune.report({_OBJECTIVE: objective, _SEEDS: seeds, "reports": [report_of(one) for one in scored]})


class _StudySearcher(Searcher):  # type: ignore[misc]
    """Gives the study's trials to Tune, and Tune's results to the study.

    Args:
        driver: between this and the study.
        slots: turns at once.
        size: trials of a turn.
    """

    def __init__(self, driver: Driver, slots: int, size: int) -> None:
        super().__init__()
        self._driver = driver
        self._slots = slots
        self._size = size
        self._running: dict[str, list[Claimed]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._running) >= self._slots:
            return None
        trials = self._driver.claim(self._size)
        if not trials:
            # a process that dies may yet bring trials back
            return Searcher.FINISHED if trials == [] and not self._running else None
        self._running[trial_id] = trials
        return {"trials": [{"number": trial.number, "settings": trial.settings} for trial in trials]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._running and self._driver.heard(self._running[trial_id], result["reports"]):
            del self._running[trial_id]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            return  # whose reason only the callback is told
        if result is not None and "reports" in result:
            self.on_trial_result(trial_id, result)
        trials = self._running.pop(trial_id, [])
        if trials and not self._driver.stopping.is_set():
            self._driver.stopped(trials)

    def died(self, trial_id: str, reason: str) -> None:
        trials = self._running.pop(trial_id, [])
        if not self._driver.stopping.is_set():
            self._driver.died(trials, reason)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is on disk."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of its settings, in which a study has no place


class _Deaths(tune.Callback):  # type: ignore[misc]
    """Tells why a process failed."""

    def __init__(self, searcher: _StudySearcher) -> None:
        self._searcher = searcher

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._searcher.died(trial.trial_id, _reason(trial))

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Stop(tune.Stopper):  # type: ignore[misc]
    """Stops all trials when the search is to stop."""

    def __init__(self, stopping: Event) -> None:
        self._stopping = stopping

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._stopping.is_set()

    def __getstate__(self) -> dict[str, Any]:
        return {}


def _scheduler(driver: Driver) -> AsyncHyperBandScheduler | None:
    """ASHA over support sets: the worse part of the trials ends after the first of them."""
    options = driver.options
    if options.scheduler == "none":
        return None
    return AsyncHyperBandScheduler(
        time_attr=_SEEDS,
        metric=_OBJECTIVE,
        mode="max" if options.directions[0] == "maximize" else "min",
        max_t=len(options.seeds),
        grace_period=1,
        reduction_factor=2,
    )


def _reason(trial: Any) -> str:
    """Why one of Tune's trials failed, from the text that it has just written: Tune looks where it copies it to."""
    path = trial.error_file
    text = Path(path).read_text() if path is not None and Path(path).is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:  # the first says when
        return "its process ended without a word"
    if "low on memory" in text or "OutOfMemory" in text:
        return OUT_OF_MEMORY
    if lines[1].startswith("The actor"):
        return DIED
    return lines[-1].rpartition("Error: ")[2].rstrip(".")


def _quiet() -> None:
    """Settings of Tune for this process; variables that the user has set are kept."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
