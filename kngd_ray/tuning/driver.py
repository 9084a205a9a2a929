"""The driver between a study and its workers: assigns trials and records their outcomes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import TypedDict

from kngd_ray.errors import KngdError
from kngd_ray.tuning.objective import Fitter, TrialScores, Workload, score_trials
from kngd_ray.tuning.study import Claimed, SearchStudy, TrialResult

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")


class Report(TypedDict):
    """What a worker reports of a trial, as plain data that travels between processes."""

    scores: dict[str, list[float]]
    figures: dict[str, list[float]]
    reason: str | None


def report_of(scored: TrialScores) -> Report:
    """The plain form of a trial's scores."""
    return Report(scores=scored.scores, figures=scored.figures, reason=scored.reason)


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    text = lines[-1].rstrip(".") if lines else type(error).__name__
    short = isinstance(error, MemoryError) or any(word in str(error).lower() for word in _OUT_OF_MEMORY)
    return f"it ran out of memory ({text})" if short else text


class Driver:
    """Claims trials, reports their outcomes to the study, and ends the search when it cannot go on.

    What the study or the listeners cannot write ends the search: :attr:`problem` says why, and whoever runs trials
    is given no more.

    Args:
        study: the study.
        on_start: called with each trial that starts.
        on_end: called with each trial that is done, and the best objectives so far.
    """

    def __init__(
        self,
        study: SearchStudy,
        on_start: Callable[[Claimed], None],
        on_end: Callable[[TrialResult, dict[str, float]], None],
    ) -> None:
        self.study = study
        self.options = study.options
        self.stopping = Event()
        self.problem: KngdError | None = None
        self._on_start = on_start
        self._on_end = on_end
        self._alone: list[Claimed] = []
        self._failed = study.counts()["failed"]
        best = study.best()
        self._best: dict[str, float] = best[0].objective if best else {}

    def claim(self, count: int) -> list[Claimed] | None:
        """Trials to run; none at the end of the search, None where others still run the batch."""
        if self.stopping.is_set():
            return []
        if self._alone:  # one of several that died together: by itself it shows which it was
            return [self._alone.pop()]
        claimed: list[Claimed] | None = []
        with self._ending():
            claimed = self.study.claim(count)
            for trial in claimed or ():
                self._on_start(trial)
        return [] if self.problem is not None else claimed

    def heard(self, trials: Sequence[Claimed], reports: Sequence[Report]) -> bool:
        """Record what workers report of trials.

        Args:
            trials: the trials.
            reports: of each.

        Returns:
            Whether all of them are done.
        """
        with self._ending():
            for trial, report in zip(trials, reports, strict=True):
                if self.study.runs(trial.number):
                    self._take_in(trial.number, report)
        return not any(self.study.runs(trial.number) for trial in trials)

    def stopped(self, trials: Sequence[Claimed]) -> None:
        """The scheduler has stopped trials."""
        with self._ending():
            for trial in trials:
                self._ended(self.study.stop(trial.number))

    def died(self, trials: Sequence[Claimed], reason: str) -> None:
        """The process that ran trials is gone: several are tried again one by one, one alone has failed.

        Args:
            trials: what it ran.
            reason: in one sentence.
        """
        left = [trial for trial in trials if self.study.runs(trial.number)]
        if len(left) > 1:
            self._alone += left
            return
        with self._ending():
            for trial in left:
                self._ended(self.study.fail(trial.number, reason))

    def _take_in(self, number: int, report: Report) -> None:
        scored = TrialScores(report["scores"], report["figures"], report["reason"])
        if scored.reason is not None:
            self._ended(self.study.fail(number, scored.reason))
            return
        first = self.options.objective[0]
        seeds = len(scored.scores.get(first, ()))
        if seeds == len(self.options.seeds):
            self._ended(self.study.finish(number, scored.objective, {"by_seed": scored.scores, **scored.figures}))
        elif seeds and len(self.options.objective) == 1:
            self.study.report(number, seeds, scored.objective[first])

    def _ended(self, result: TrialResult) -> None:
        first = self.options.objective[0]
        sign = 1 if self.options.directions[0] == "maximize" else -1
        if result.objective and (not self._best or sign * result.objective[first] > sign * self._best[first]):
            self._best = result.objective
        self._failed += result.state == "failed"
        self._on_end(result, self._best)
        if self._failed > self.options.max_failures:
            raise KngdError(
                f"{self._failed} trials failed, more than search.max_failures={self.options.max_failures} allows, the "
                f"last because {result.reason}"
            )

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """End the search where it cannot go on: those who call run trials, and could do nothing about it."""
        try:
            yield
        except KngdError as error:
            self.problem = self.problem or error
            self.stopping.set()


def run_here(driver: Driver, work: Workload, fitter: Fitter, size: int) -> None:
    """Run trials in this process until the search ends.

    Args:
        driver: gives the trials.
        work: what they work on.
        fitter: runs their fits.
        size: trials at a time.
    """
    while (trials := driver.claim(size)) != []:
        if trials is None:
            driver.stopping.wait(0.5)
            continue
        try:
            *_, scored = score_trials([trial.settings for trial in trials], work, fitter, at_once=True)
        except Exception as error:  # a trial's own, whatever it is: the search goes on, as it does on Ray
            driver.died(trials, reason_of(error))
        else:
            driver.heard(trials, [report_of(one) for one in scored])
