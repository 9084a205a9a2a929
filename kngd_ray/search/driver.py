"""Between a study and those who run its trials: who works on what, and what became of it."""

from collections.abc import Callable, Sequence
from threading import Event
from typing import TypedDict

from kngd_ray.errors import KngdError
from kngd_ray.search.objective import Fitter, Judged, Workload, judge
from kngd_ray.search.study import Claimed, SearchStudy


class Report(TypedDict):
    """What whoever runs a trial says of it, as plain data that travels between processes."""

    scores: dict[str, list[float]]
    figures: dict[str, list[float]]
    reason: str | None


def report_of(judged: Judged) -> Report:
    """The plain form of what is known of a trial."""
    return Report(scores=judged.scores, figures=judged.figures, reason=judged.reason)


def reason_of(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    text = lines[-1].rstrip(".") if lines else type(error).__name__
    return f"it ran out of memory ({text})" if isinstance(error, MemoryError) or "memory" in text.lower() else text


class Driver:
    """Claims trials, tells the study what became of them, and ends the search when too many fail.

    Args:
        study: the study.
        on_start: told of each trial that is taken up.
        on_end: told of the number of each trial that is done.
    """

    def __init__(
        self,
        study: SearchStudy,
        on_start: Callable[[Claimed], None],
        on_end: Callable[[int], None],
    ) -> None:
        self.study = study
        self.options = study.options
        self.stopping = Event()
        self.problem: KngdError | None = None
        self._on_start = on_start
        self._on_end = on_end
        self._alone: list[Claimed] = []

    def claim(self, count: int) -> list[Claimed] | None:
        """Trials to run; none at the end of the search, None where others still run the batch."""
        if self.stopping.is_set():
            return []
        if self._alone:  # one of several that died together: by itself it shows which it was
            return [self._alone.pop()]
        claimed = self.study.claim(count)
        for trial in claimed or ():
            self._on_start(trial)
        return claimed

    def heard(self, trials: Sequence[Claimed], reports: Sequence[Report]) -> bool:
        """Take in what is known of trials.

        Args:
            trials: the trials.
            reports: of each.

        Returns:
            Whether all of them are done.
        """
        done = [self._one(trial.number, report) for trial, report in zip(trials, reports, strict=True)]
        return all(done)

    def stopped(self, trials: Sequence[Claimed]) -> None:
        """The scheduler has stopped trials."""
        for trial in trials:
            self.study.stop(trial.number)
            self._on_end(trial.number)

    def died(self, trials: Sequence[Claimed], reason: str) -> None:
        """The process that ran trials is gone: several are tried again one by one, one alone has failed.

        Args:
            trials: what it ran.
            reason: in one sentence.
        """
        if len(trials) > 1:
            self._alone += trials
            return
        for trial in trials:
            self._failed(trial.number, reason)

    def _one(self, number: int, report: Report) -> bool:
        judged = Judged(report["scores"], report["figures"], report["reason"])
        if judged.reason is not None:
            self._failed(number, judged.reason)
            return True
        seeds = len(next(iter(judged.scores.values()), ()))
        if seeds < len(self.options.seeds):
            if len(self.options.objective) == 1 and seeds:
                self.study.report(number, seeds, judged.objective[self.options.objective[0]])
            return False
        self.study.finish(number, judged.objective, {"by_seed": judged.scores, **judged.figures})
        self._on_end(number)
        return True

    def _failed(self, number: int, reason: str) -> None:
        self.study.fail(number, reason)
        self._on_end(number)
        failed = sum(result.state == "failed" for result in self.study.results())
        if failed > self.options.max_failures:
            self.problem = KngdError(
                f"{failed} trials failed, more than search.max_failures={self.options.max_failures} allows, the last "
                f"because {reason}"
            )
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
            *_, judged = judge([trial.settings for trial in trials], work, fitter, at_once=True)
        except (MemoryError, RuntimeError) as error:  # torch's
            driver.died(trials, reason_of(error))
        else:
            driver.heard(trials, [report_of(one) for one in judged])
