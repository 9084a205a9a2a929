"""The records of a search for MLflow: one for the search, and below it one for each trial."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kngd_ray._run_layout import CONFIG, SEARCH
from kngd_ray.config import flatten, to_yaml
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.aggregate import flat_metrics
from kngd_ray.experiment.environment import describe_environment, source_tags
from kngd_ray.storage import read_json, storage_errors, write_text
from kngd_ray.tracking import Record, Status
from kngd_ray.tuning import JOURNAL, Claimed, TrialResult, plain_space
from kngd_ray.tuning.file import SearchConfig, search_yaml

PARENT = "search"
_STATUS: dict[str, Status] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class SearchRecords:
    """The records that one driver of a search writes: its own trials, and the search's if it leads.

    Args:
        search: the search.
        folder: its folder.
        inputs: the data set, as :meth:`~kngd_ray.tracking.Record.log_input` takes it.
    """

    def __init__(self, search: SearchConfig, folder: Path, inputs: Mapping[str, Any]) -> None:
        self._search = search
        self._folder = folder
        self._inputs = inputs
        self._running: dict[int, Record] = {}
        self._parent: Record | None = None

    def lead(self) -> None:
        """Write the search's own record too; of several drivers one may."""
        search = self._search
        shown = run_folder.shown(search.config)
        space = {f"space.{key}": _domain(value) for key, value in plain_space(search.space).items()}
        options = {f"search.{key}": value for key, value in flatten(search.options).items()}
        self._parent = self._open(PARENT, "search", flatten(shown) | options | space, None)
        self._parent.log_input(**self._inputs)
        write_text(self._parent.artifacts / CONFIG, to_yaml(shown))
        write_text(self._parent.artifacts / SEARCH, search_yaml(search))
        write_text(self._parent.artifacts / "environment.json", describe_environment())

    @property
    def figures(self) -> Path:
        """Where the pictures of the search go."""
        assert self._parent is not None
        return self._parent.artifacts / "figures"

    def begin(self, trial: Claimed) -> None:
        """A trial is taken up."""
        self._running[trial.number] = self._trial(trial.number, trial.settings)

    def end(self, result: TrialResult, best: Mapping[str, float]) -> None:
        """A trial is done.

        Args:
            result: what became of it.
            best: the best objectives so far, by name.
        """
        record = self._running.pop(result.number, None) or self._trial(result.number, result.settings)
        by_seed: Mapping[str, Sequence[float]] = result.figures.get("by_seed", {})
        for n, seed in enumerate(self._search.options.seeds):
            # named apart from their mean: MLflow would show the last of them in its place
            values = {f"by_seed/{name}": each[n] for name, each in by_seed.items() if n < len(each)}
            if values:
                record.log_step(n, values | {"by_seed/seed": seed})
        record.log_metrics({f"objective/{name}": value for name, value in result.objective.items()})
        if result.reason is not None:
            record.set_tag("kngd_ray.failed", result.reason)
        record.finish(_STATUS[result.state])
        self._chart(result, best)

    def _chart(self, result: TrialResult, best: Mapping[str, float]) -> None:
        if result.objective and self._parent is not None:
            self._parent.log_step(
                result.number,
                {f"trial/{name}": value for name, value in result.objective.items()}
                | {f"best/{name}": value for name, value in best.items()},
            )

    def mend(self, results: Sequence[TrialResult], best: Mapping[str, float]) -> None:
        """Complete the records of trials whose drivers died before they could.

        Args:
            results: what became of all trials.
            best: the best objectives, by name.
        """
        for result in results:
            meta = self._folder / "records" / _id(result.number) / "meta.json"
            if _status(meta) == _STATUS[result.state]:
                self._chart(result, best)
            else:
                self.end(result, best)

    def summary(self, best: TrialResult | None, report: Mapping[str, Any]) -> None:
        """What the search came to.

        Args:
            best: the winner, if there is one.
            report: the search's report; its figures become metrics.
        """
        assert self._parent is not None
        metrics: dict[str, Any] = {"trials": report["trials"], "trials_per_minute": report["trials_per_minute"]}
        if best is not None:
            metrics["objective"] = best.objective
            self._parent.set_tag("kngd_ray.best_trial", best.number)
            write_text(self._parent.artifacts / "best.yaml", to_yaml(best.settings))
        test = report.get("test")
        if test:
            metrics |= {key: test[key] for key in ("id", "ood", "zero_shot", "stream") if key in test}
            self._parent.set_tag("kngd_ray.champion", report["run"])
        self._parent.log_metrics(flat_metrics(metrics))
        kept = self._parent.artifacts / JOURNAL
        with storage_errors(kept):
            shutil.copyfile(self._folder / JOURNAL, kept)

    def finish(self, status: Status) -> None:
        """Close all records: the search is over, or this driver gives up."""
        for record in list(self._running.values()):
            record.finish("KILLED")
        if self._parent is not None:
            self._parent.finish(status)

    def _trial(self, number: int, settings: Mapping[str, Any]) -> Record:
        return self._open(_id(number), "trial", settings, PARENT)

    def _open(self, record_id: str, kind: str, params: Mapping[str, Any], parent: str | None) -> Record:
        tags = {
            "kngd_ray.run": self._folder.name,
            "kngd_ray.kind": kind,
            "kngd_ray.method": self._search.config.method,
            "kngd_ray.preset": str(self._search.config.preset),
            **source_tags(),
        }
        name = self._folder.name if parent is None else f"{self._folder.name}/{record_id}"
        return Record.open(self._folder, record_id, name=name, params=params, tags=tags, parent=parent)


def _status(meta: Path) -> str | None:
    """What a record says became of its trial; None where there is none, or a damaged one."""
    try:
        found = read_json(meta)
    except (OSError, ValueError):
        return None
    return found.get("status") if isinstance(found, dict) else None


def _id(number: int) -> str:
    return f"trial-{number:05d}"


def _domain(plain: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in plain.items() if value is not False)
