"""``kngd-ray tune``: a search for priors, its winner fitted and tested once, and what it leaves in MLflow.

<storage_path>/<name>/config.yaml      what trials start from
                      search.yaml      options and space
                      study.journal    Optuna's study
                      records/         what is logged
                      champion.yaml    the winner, as a preset
                      results.json     the report
<storage_path>/<name>-trial-<n>/        the winner's run, as ``kngd-ray train`` leaves it
"""

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kngd_ray._layered import plain
from kngd_ray.clip import CLIPHead
from kngd_ray.commands import run_folder
from kngd_ray.commands.display import Display
from kngd_ray.commands.prepare import open_shots, prepare
from kngd_ray.commands.search_file import SearchConfig, save_search
from kngd_ray.commands.search_records import SearchRecords
from kngd_ray.commands.session import ray_for
from kngd_ray.commands.train import compute_threads, data_name, train
from kngd_ray.config import Config, TrackingConfig, TrainerConfig, override, to_yaml
from kngd_ray.errors import KngdError
from kngd_ray.observations import Linearizer
from kngd_ray.search import Driver, SearchStudy, TrialResult, Workload, fit_alone, fit_together, run_here
from kngd_ray.search.figures import study_figures
from kngd_ray.storage import write_text
from kngd_ray.tracking import Publisher, Status, resolve_uri
from kngd_ray.training.options import FitOptions

CHAMPION = "champion.yaml"
_ONE_PROCESS = 1 << 30  # bytes of covariance up to which a trial runs in one process


def tune(search: SearchConfig, display: Display, *, resume: bool = False) -> dict[str, Any]:
    """Search for the best settings, or go on with a search.

    Args:
        search: the search; one to continue, from :func:`kngd_ray.commands.search_file.resumed_search`.
        display: where progress and results are shown.
        resume: continue the search of that name, or help the process that drives it.

    Returns:
        The report: the object that ``--json`` prints.

    Raises:
        KngdError: no trial finished, or too many failed.
    """
    config = search.config
    name = config.trainer.name or run_folder.new_name("tune")
    config = replace(config, trainer=replace(config.trainer, name=name))
    search = replace(search, config=config)
    if config.tracking.enabled:
        resolve_uri(config.tracking.uri)
    task = open_shots(replace(config, seeds=search.options.seeds))
    trainer = config.trainer
    # without a dashboard, a Train job inside a trial that the scheduler stops would never give its workers back
    with ray_for(trainer, dashboard=search.options.scheduler != "none"):
        with display.pictures("encoding") as progress:
            prepared = prepare(task, use_ray=trainer.num_workers > 0, progress=progress)
        folder = run_folder.existing(config) if resume else run_folder.create(config)
        save_search(folder, search)  # of one that is continued, with what was changed
        work = Workload(
            replace(config, tracking=TrackingConfig(), trainer=TrainerConfig()),
            search.options,
            {seed: prepared.support(seed) for seed in search.options.seeds},
            prepared.class_embeddings,
            prepared.model.logit_scale,
        )
        with compute_threads(trainer.cpus_per_worker):
            return _Search(search, folder, work, display).run()


class _Search:
    """One driver of a search.

    Args:
        search: the search.
        folder: its folder.
        work: what trials work on.
        display: where progress and results are shown.
    """

    def __init__(self, search: SearchConfig, folder: Path, work: Workload, display: Display) -> None:
        self._search = search
        self._config = search.config
        self._folder = folder
        self._work = work
        self._display = display
        self._study = SearchStudy(folder, search.space, search.options, search.points)
        self._records = SearchRecords(search, folder)
        self._leads = True
        self._done = 0
        self._seconds = 0.0

    def run(self) -> dict[str, Any]:
        """Trials until there are enough, then the winner."""  # noqa: DOC501
        config, display = self._config, self._display
        publisher = None
        if config.tracking.enabled:
            publisher = Publisher(self._folder, config.tracking.uri, config.tracking.experiment, on_problem=display.say)
        display.say(f"search {self._folder.name} in {self._folder.parent}")
        status: Status = "FAILED"
        try:
            self._trials()
            report = self._conclusion()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            display.say(f"continue the search with kngd-ray tune --resume {self._folder.name}")
            raise
        finally:
            self._study.close()
            if self._leads:
                self._records.finish(status)
            else:
                self._records.leave()
            if publisher is not None and publisher.close() is None:
                display.say(
                    f"what was not logged to MLflow is kept in {self._folder}: when the server is back, "
                    f"`kngd-ray sync {self._folder}` sends it"
                )
        return report

    def _trials(self) -> None:
        """Run what trials are left."""
        options, trainer = self._search.options, self._config.trainer
        began = time.monotonic()
        with self._display.trials(options.num_samples) as show:

            def on_end(number: int) -> None:
                results = self._study.results()
                result = next(r for r in results if r.number == number)
                best = self._study.best()
                self._records.end(result, best[0].objective if best else {})
                self._done += 1
                show(len(results), result.number, result.objective, best[0].objective if best else {}, result.reason)

            driver = Driver(self._study, self._records.begin, on_end)
            mode = _mode(options.trial, options.scheduler, self._work)
            try:
                if trainer.num_workers:
                    from kngd_ray.ray_jobs import run_search

                    run_search(driver, self._work, trainer, mode, self._folder)
                else:
                    together = mode == "batched"
                    run_here(
                        driver, self._work, fit_together if together else fit_alone, options.batch if together else 1
                    )
            finally:
                self._seconds = time.monotonic() - began
        if driver.problem is not None:
            raise driver.problem

    def _conclusion(self) -> dict[str, Any]:
        """The report; of several drivers the first to come here makes it."""
        try:
            with run_folder.locked(self._folder):
                return self._conclude()
        except run_folder.DrivenElsewhereError:
            self._leads = False
            self._display.say("another process has the search's last word: its winner, figures and report")
            return self._report()

    def _report(self) -> dict[str, Any]:
        """What is known before the winner is fitted."""
        states, best = [result.state for result in self._study.results()], self._study.best()
        several = len(self._search.options.objective) > 1
        return {
            "name": self._folder.name,
            "trials": {state: states.count(state) for state in ("finished", "failed", "stopped")},
            "trials_per_minute": round(60 * self._done / self._seconds, 2) if self._done else 0.0,
            "seconds": round(self._seconds, 2),
            "best": _brief(best[0]) if best else None,
            **({"front": [_brief(result) for result in best]} if several else {}),
            "run": None,
            "test": None,
        }

    def _conclude(self) -> dict[str, Any]:
        """The winner fitted and tested, figures, report.

        Raises:
            KngdError: there is none.
        """
        report, best = self._report(), self._study.best()
        self._records.mend(self._study.results(), best[0].objective if best else {})
        results = self._folder / run_folder.RESULTS
        known = json.loads(results.read_text()) if results.is_file() else None
        if known is not None and known["trials"] == report["trials"]:  # nothing has been added since
            self._display.search(known)
            return known
        if not best:
            done = self._study.results()
            reasons = [result.reason for result in done if result.reason]
            raise KngdError(
                f"none of {len(done)} trials finished" + (f"; the last failed because {reasons[-1]}" if reasons else "")
            )
        champion = override(self._config, best[0].settings)
        write_text(self._folder / CHAMPION, _preset(champion, self._folder.name, best[0]))
        self._display.search(report)
        if self._search.options.refit:
            report["run"], report["test"] = self._refit(champion, best[0].number)
        study_figures(self._study.study, self._search.options.objective, self._records.figures)
        self._records.summary(best[0], report)
        write_text(results, json.dumps(report, indent=1))
        return report

    def _refit(self, champion: Config, trial: int) -> tuple[str, dict[str, Any]]:
        """Fit the winner for the configuration's seeds and test it: the only look at the test split."""
        name = f"{self._folder.name}-trial-{trial}"  # a search that is prolonged may find another
        registered = champion.tracking.registered_model or f"{champion.tracking.experiment}-{data_name(champion)}"
        champion = replace(
            champion,
            preset=str(self._folder / CHAMPION),
            trainer=replace(champion.trainer, name=name, storage_path=str(self._folder.parent)),
            tracking=replace(champion.tracking, registered_model=registered),
        )
        place = run_folder.existing(champion)
        begun = (place / run_folder.CONFIG).is_file()
        return name, train(champion, self._display, resume=begun)


def _mode(asked: str, scheduler: str, work: Workload) -> str:
    """How trials are run where ``auto`` is asked for."""
    if asked != "auto":
        return asked
    if work.config.method == "kalman":
        head = CLIPHead(work.class_embeddings, work.logit_scale, work.config.adapter)
        layers = Linearizer(head, work.class_embeddings[:2]).layers
        numbers = sum(work.config.filter.covariance.cost(layer) for layer in layers)
        if 8 * numbers > _ONE_PROCESS:
            return "train"
    return "batched" if scheduler == "none" else "local"


def _brief(result: TrialResult) -> dict[str, Any]:
    return {"trial": result.number, "params": result.settings, "objective": result.objective}


def _preset(champion: Config, search: str, best: TrialResult) -> str:
    """The winner's settings as a preset for ``kngd-ray train``."""
    settings = {key: value for key, value in plain(champion).items() if key in _preset_keys()}
    found = ", ".join(f"{name} {value:.4f}" for name, value in best.objective.items())
    return f"# Trial {best.number} of the search {search}: {found}, chosen on the training shots alone.\n" + to_yaml(
        settings
    )


def _preset_keys() -> list[str]:
    return [*(f.name for f in fields(FitOptions)), "posterior"]
