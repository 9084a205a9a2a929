"""The study of a search: Optuna's trials on disk, and who works on which.

::

    <folder>/study.journal      Optuna's journal storage: every trial, its parameters and its outcome
             drivers/<id>       locked for as long as a driver lives

Trials are suggested a batch at a time, each batch when all of the one before are done; so suggestions do not depend
on which trial ended first. Whoever works on the search (several processes may) claims trials of the batch under a
lock. A trial whose driver is gone is claimed by another, as the trial it is: none is lost, none is made twice, and the
history is that of a search that was never interrupted.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from kngd_ray.errors import CheckpointError
from kngd_ray.storage import storage_errors, take_lock
from kngd_ray.tuning.options import SearchOptions
from kngd_ray.tuning.samplers import sampler_of
from kngd_ray.tuning.space import Space, Value

JOURNAL = "study.journal"
_DRIVER, _REASON, _FIGURES = "driver", "failed", "figures"  # user attributes of a trial


@dataclass(frozen=True)
class Claimed:
    """A trial that this driver is to run.

    Attributes:
        number: of the trial, from 0.
        settings: values by dotted key.
    """

    number: int
    settings: dict[str, Value]


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial.

    Attributes:
        number: of the trial, from 0.
        settings: values by dotted key.
        state: ``finished``, ``failed`` or ``stopped`` by the scheduler.
        objective: by name; empty unless it finished.
        figures: what else was measured.
        reason: why it failed, in one sentence.
    """

    number: int
    settings: dict[str, Value]
    state: str
    objective: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None


_STATES = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.PRUNED: "stopped"}


class SearchStudy:
    """A study on disk, as one of perhaps several drivers sees it.

    Args:
        folder: of the search.
        space: what is searched.
        options: objectives, sampler, trials.
        points: values of the first trials.

    Raises:
        CheckpointError: the study on disk cannot be read.
    """

    def __init__(
        self, folder: Path, space: Space, options: SearchOptions, points: Sequence[Mapping[str, Value]] = ()
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder = folder
        self.space = space
        self.options = options
        self.id = uuid4().hex[:12]
        self._own: dict[int, int] = {}  # Optuna's id by number, of the trials that this driver runs
        self._claims = _Lock(folder / ".claims")  # one driver at a time asks for trials and takes them
        try:
            with storage_errors(folder / JOURNAL), _locked(self._claims):
                self._alive = _hold(folder / "drivers" / self.id)  # in here, or another's sweep takes it away unlocked
                self._sweep()
                lock = _Lock(folder / ".journal")
                _mend(folder / JOURNAL, lock)
                self._storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL), lock))  # type: ignore[arg-type]
                sampler = sampler_of(options, points)
                if known := self._storage.get_all_studies():  # by its own name: the folder may have been renamed
                    self.study = optuna.load_study(
                        study_name=known[0].study_name, storage=self._storage, sampler=sampler
                    )
                else:
                    self.study = optuna.create_study(
                        study_name=folder.name, storage=self._storage, sampler=sampler, directions=options.directions
                    )
                _name_metrics(self.study, options)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of json, and of the storage
            raise CheckpointError(f"{folder / JOURNAL} is damaged ({error}): start the search again.") from error

    def claim(self, count: int = 1) -> list[Claimed] | None:
        """Take trials to run; the next batch is suggested when none of this one is left.

        Args:
            count: how many at most.

        Returns:
            The trials, one at least; none when the search is at its end; None while others still run the batch.
        """
        with storage_errors(self.folder / JOURNAL), _locked(self._claims), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trials = self.study.get_trials(deepcopy=False)
            # First of all, as what is suggested next depends on it: one that was half written is completed.
            settings = {t.number: self._settings(t) for t in trials if t.state == TrialState.RUNNING}
            missing = -len(trials) % self.options.batch  # of a batch whose driver died while it asked
            if not settings or missing:
                missing = missing or self.options.batch
                for _ in range(min(missing, self.options.num_samples - len(trials))):
                    asked = self.study.ask()
                    settings[asked.number] = self.space.suggest(asked)
            if not settings:
                return []
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            free = [trial for trial in running if not self._taken(trial)][:count]
            for trial in free:
                self._own[trial.number] = trial._trial_id
                self._storage.set_trial_user_attr(trial._trial_id, _DRIVER, self.id)
            return [Claimed(trial.number, settings[trial.number]) for trial in free] or None

    def runs(self, number: int) -> bool:
        """Whether a trial is this driver's, and not done."""
        return number in self._own

    def report(self, number: int, step: int, value: float) -> None:
        """Record intermediate scores of a running trial.

        Args:
            number: of the trial.
            step: support sets that it has been judged on.
            value: the first objective so far.
        """
        with storage_errors(self.folder / JOURNAL):
            self._storage.set_trial_intermediate_value(self._own[number], step, value)

    def finish(self, number: int, objective: Mapping[str, float], figures: Mapping[str, Any]) -> TrialResult:
        """A trial has come to its end.

        Args:
            number: of the trial.
            objective: by name; one that is not finite makes the trial a failed one.
            figures: what else was measured, JSON data.

        Returns:
            What became of it.
        """
        values = [objective[name] for name in self.options.objective]
        if not all(isfinite(value) for value in values):
            shown = ", ".join(f"{name} {value}" for name, value in objective.items())
            return self.fail(number, f"an objective is not finite ({shown})")
        return self._end(number, TrialState.COMPLETE, _FIGURES, dict(figures), values)

    def stop(self, number: int) -> TrialResult:
        """The scheduler has stopped a trial."""
        return self._end(number, TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> TrialResult:
        """A trial could not come to its end.

        Args:
            number: of the trial.
            reason: in one sentence.

        Returns:
            What became of it.
        """
        return self._end(number, TrialState.FAIL, _REASON, reason)

    def _end(
        self, number: int, state: TrialState, key: str = "", note: Any = None, values: Sequence[float] | None = None
    ) -> TrialResult:
        trial_id = self._own[number]
        with storage_errors(self.folder / JOURNAL):
            if key:
                self._storage.set_trial_user_attr(trial_id, key, note)
            self.study.tell(number, values, state=state)
        del self._own[number]
        return self.result(self._storage.get_trial(trial_id))

    def counts(self) -> dict[str, int]:
        """Numbers of finished trials by outcome."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        return {name: states.count(state) for state, name in _STATES.items()}

    def results(self) -> list[TrialResult]:
        """All trials that are done, by number."""
        return [self.result(trial) for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def result(self, trial: FrozenTrial) -> TrialResult:
        """The result of one of Optuna's finished trials."""
        finished = trial.state == TrialState.COMPLETE
        return TrialResult(
            trial.number,
            dict(trial.params),
            _STATES[trial.state],
            dict(zip(self.options.objective, trial.values, strict=True)) if finished else {},
            trial.user_attrs.get(_FIGURES, {}),
            trial.user_attrs.get(_REASON),
        )

    def best(self) -> list[TrialResult]:
        """The best trial, or the Pareto front sorted by the first objective; empty if no trial finished."""
        finished = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
        if not finished:
            return []
        front = self.study.best_trials if len(self.options.objective) > 1 else [self.study.best_trial]
        sign = 1 if self.options.directions[0] == "minimize" else -1
        return [self.result(trial) for trial in sorted(front, key=lambda t: (sign * t.values[0], t.number))]

    def close(self) -> None:
        """Let others claim what this driver has not finished."""
        self._alive.close()
        (self.folder / "drivers" / self.id).unlink(missing_ok=True)

    def _settings(self, trial: FrozenTrial) -> dict[str, Value]:
        try:
            return self.space.suggest(_Recorded(trial.params))
        except KeyError:  # its driver did not live to write all: they are suggested again, the same
            return self.space.suggest(optuna.trial.Trial(self.study, trial._trial_id))

    def _taken(self, trial: FrozenTrial) -> bool:
        """Whether somebody alive runs a trial."""
        driver = trial.user_attrs.get(_DRIVER)
        if driver == self.id:
            return trial.number in self._own
        return driver is not None and _is_held(self.folder / "drivers" / driver)

    def _sweep(self) -> None:
        """Remove what dead drivers left behind."""
        for path in (self.folder / "drivers").iterdir():
            if path.name != self.id and not _is_held(path):
                for scratch in self.folder.glob(f"{self.scratch_of(path.name)}*"):
                    shutil.rmtree(scratch, ignore_errors=True)
                path.unlink(missing_ok=True)

    @staticmethod
    def scratch_of(driver: str) -> str:
        """Prefix of the folders in the search's folder to which a driver's trials write."""
        return f".trial-{driver}-"


def load_study(folder: Path) -> optuna.Study:
    """Read the study of a search, to look at it.

    Args:
        folder: of the search.

    Returns:
        Optuna's study.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    journal = folder / JOURNAL
    if not journal.is_file():
        raise CheckpointError(f"{folder} has no {JOURNAL}: it is not a search, or was not started.")
    try:
        with storage_errors(journal):
            storage = JournalStorage(JournalFileBackend(str(journal), _Lock(folder / ".journal")))  # type: ignore[arg-type]
            (known,) = storage.get_all_studies()
            return optuna.load_study(study_name=known.study_name, storage=storage)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of json, and of the storage
        raise CheckpointError(f"{journal} is damaged ({error}): start the search again.") from error


@dataclass(frozen=True)
class _Recorded:
    """Answers a space with what a trial was given."""

    params: Mapping[str, Any]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> float:
        return float(self.params[name])

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> int:
        return int(self.params[name])

    def suggest_categorical(self, name: str, choices: tuple[Value, ...]) -> Value:
        value: Value = self.params[name]
        return value


class _Lock:
    """One process or thread at a time; unlike Optuna's own locks, whose form it has, it ends with its process.

    Args:
        path: the file that is locked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock."""
        file = self._path.open("w")
        take_lock(file, self._path.parent, wait=True)
        self._file = file
        return True

    def release(self) -> None:
        """Let others have it."""
        self._file.close()


def _name_metrics(study: optuna.Study, options: SearchOptions) -> None:
    """Name the objectives of a study: Optuna's dashboard and figures label their axes with them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if not study.metric_names:
            study.set_metric_names(list(options.objective))


@contextmanager
def _locked(lock: _Lock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _mend(journal: Path, lock: _Lock) -> None:
    """Drop a last line that was half written: the next one would be appended to it, and neither could be read."""
    with _locked(lock), journal.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _is_held(path: Path) -> bool:
    """Whether the process lives that holds a file."""
    try:
        file = path.open("r+")
    except FileNotFoundError:
        return False
    with file:
        return not take_lock(file, path.parent)


def _hold(path: Path) -> Any:
    """An open file that is locked until it is closed or its process ends."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    take_lock(file, path.parent, wait=True)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
