"""``kngd-ray tune``: a search for priors, its winner fitted and tested once, and its records in MLflow.

<storage_path>/<name>/config.yaml      what trials start from
                      search.yaml      options, space and first trials
                      task.json        what trials are scored on: shots, classes, model
                      study.journal    Optuna's study
                      records/         what is logged
                      champion.yaml    the winner, as a preset
                      results.json     the report
<storage_path>/<name>-trial-<n>/        the winner's run, as ``kngd-ray train`` leaves it
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kngd_ray._layered import plain
from kngd_ray._run_layout import CONFIG, RESULTS, SEARCH
from kngd_ray.config import Config, TrackingConfig, TrainerConfig, override, to_yaml
from kngd_ray.configs import read_yaml
from kngd_ray.console import Display
from kngd_ray.errors import KngdError, UsageError
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.backend import Backend
from kngd_ray.experiment.environment import describe_data
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.run import compute_threads, train
from kngd_ray.experiment.task import open_shots
from kngd_ray.storage import read_json, write_text
from kngd_ray.tracking import Publisher, Status, resolve_uri
from kngd_ray.training.folds import single
from kngd_ray.training.options import FitOptions
from kngd_ray.tuning import Driver, SearchStudy, TrialResult, Workload, fit_alone, fit_together, mode_of, run_here
from kngd_ray.tuning.figures import study_figures
from kngd_ray.tuning.file import SearchConfig, save_search
from kngd_ray.tuning.records import SearchRecords
from kngd_ray.tuning.same_task import check_same_task

CHAMPION = "champion.yaml"
_PATIENCE = 5.0  # seconds that Ctrl-C waits for MLflow


class SearchBackend(Backend):
    """This process, alone, for the trials of a search as well."""

    def run_search(self, driver: Driver, work: Workload, trainer: TrainerConfig, mode: str, folder: Path) -> None:
        """Run trials until the study has enough, in a session.

        Args:
            driver: hands out trials.
            work: what they work on.
            trainer: workers and resources.
            mode: how a trial is run, from :func:`kngd_ray.tuning.mode_of`.
            folder: of the search, on storage that all workers share.
        """
        together, device = mode == "batched", "cuda" if trainer.use_gpu else "cpu"
        fitter = partial(fit_together if together else fit_alone, device=device)
        run_here(driver, work, fitter, work.search.batch if together else 1)


HERE = SearchBackend()


def tune(
    search: SearchConfig, display: Display, backend: SearchBackend = HERE, *, resume: bool = False
) -> dict[str, Any]:
    """Search for the best settings, or go on with a search.

    Args:
        search: the search; one to continue, from :func:`kngd_ray.tuning.file.resumed_search`.
        display: where progress and results are shown.
        backend: does the work.
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
    if not resume and all(single(torch.from_numpy(task.images.labels[s.support])) for s in task.splits.values()):
        search.options.check_single_shots()
    for note in (*task.notes, *search.notes):
        display.say(note)
    trainer = config.trainer
    with ExitStack() as session:
        # without a dashboard, a Train job inside a trial that the scheduler stops would never give its workers back
        session.enter_context(backend.session(trainer, dashboard=search.options.scheduler != "none"))
        with display.pictures("encoding") as progress:
            prepared = prepare(task, backend, progress)
        folder = run_folder.existing(config) if resume else run_folder.create(config)
        check_same_task(folder, prepared, search.options.seeds)
        work = Workload(
            replace(config, tracking=TrackingConfig(), trainer=TrainerConfig()),
            search.options,
            {seed: prepared.shots(seed, config.tune, folder) for seed in search.options.seeds},
            prepared.class_embeddings,
            prepared.model.logit_scale,
            prepared.towers(config.tune),
            search.space,
            {seed: prepared.support(seed) for seed in search.options.seeds} if config.tune.images else {},
        )
        inputs = describe_data(prepared.images, config.data, prepared.model.name)
        with compute_threads(trainer), ExitStack() as lead:
            return _Search(search, folder, work, display, backend, lead, inputs).run(session.close)


class _Search:
    """One driver of a search.

    Args:
        search: the search.
        folder: its folder.
        work: what trials work on.
        display: where progress and results are shown.
        backend: does the work.
        lead: holds the lock of the one that leads.
        inputs: the data set, as :meth:`~kngd_ray.tracking.Record.log_input` takes it.
    """

    def __init__(
        self,
        search: SearchConfig,
        folder: Path,
        work: Workload,
        display: Display,
        backend: SearchBackend,
        lead: ExitStack,
        inputs: Mapping[str, Any],
    ) -> None:
        self._search = search
        self._config = search.config
        self._folder = folder
        self._work = work
        self._display = display
        self._backend = backend
        self._lead = lead
        self._leads = False
        self._study = SearchStudy(folder, search.space, search.options, search.points)
        self._records = SearchRecords(search, folder, inputs)
        self._take_the_lead()
        self._done = 0
        self._seconds = 0.0

    def run(self, end_session: Callable[[], None]) -> dict[str, Any]:
        """Trials until there are enough, then the winner.

        Args:
            end_session: ends the Ray session of the trials. The winner's fit begins one of its own: of processes that
                died in this one, Ray does not always get the cores back.

        Returns:
            The report.
        """  # noqa: DOC501
        config, display = self._config, self._display
        publisher = None
        if config.tracking.enabled:
            publisher = Publisher(self._folder, config.tracking.uri, config.tracking.experiment, on_problem=display.say)
        display.say(f"search {self._folder.name} in {self._folder.parent}")
        status: Status = "FAILED"
        try:
            self._trials()
            end_session()
            if not self._leads:
                self._take_the_lead()  # of one that is gone
            report = self._conclude() if self._leads else self._report()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            display.say(f"continue the search with kngd-ray tune --resume {self._folder.name}")
            raise
        finally:
            self._study.close()
            self._records.finish(status)
            patience = _PATIENCE if status == "KILLED" else None
            if publisher is not None and publisher.close(patience) is None:
                display.say(
                    f"what was not logged to MLflow is kept in {self._folder}: `kngd-ray sync {self._folder}` sends it"
                )
        return report

    def _take_the_lead(self) -> None:
        """Become the one of several drivers that writes the search's own record, and has the last word.

        Raises:
            UsageError: another leads, to another number of trials.
        """
        try:
            self._lead.enter_context(run_folder.locked(self._folder))
        except run_folder.DrivenElsewhereError as error:
            leader = read_yaml(self._folder / SEARCH)["search"]["num_samples"]
            if leader != self._search.options.num_samples:
                raise UsageError(
                    f"the search {self._folder.name} is being driven to {leader} trials by another process: help it "
                    "without search.num_samples, or wait for it and extend it then."
                ) from error
            self._display.say("another process leads this search and fits its winner; this one runs trials")
            return
        self._leads = True
        save_search(self._folder, self._search)  # with what a search that is continued was told anew
        self._records.lead()

    def _trials(self) -> None:
        """Run the remaining trials."""
        options, trainer = self._search.options, self._config.trainer
        began = time.monotonic()
        with self._display.trials(options.num_samples) as show:

            def on_end(result: TrialResult, best: dict[str, float]) -> None:
                self._records.end(result, best)
                self._done += 1
                done = sum(self._study.counts().values())
                show(done, result.number, result.objective, best, result.reason)

            driver = Driver(self._study, self._records.begin, on_end)
            mode = mode_of(self._work, self._search.space)
            try:
                trainer = self._backend.with_gpus(trainer)
                self._backend.run_search(driver, self._work, trainer, mode, self._folder)
            finally:
                self._seconds = time.monotonic() - began
        if driver.problem is not None:
            raise driver.problem

    def _report(self) -> dict[str, Any]:
        """What is known before the winner is fitted."""
        best = self._study.best()
        several = len(self._search.options.objective) > 1
        return {
            "name": self._folder.name,
            "trials": self._study.counts(),
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
        done = self._study.results()
        self._records.mend(done, best[0].objective if best else {})
        results = self._folder / RESULTS
        try:
            known = read_json(results) if results.is_file() else None
        except ValueError as error:
            self._display.say(f"{results} is damaged ({error}): written again")
            known = None
        if isinstance(known, dict) and known.get("trials") == report["trials"]:  # nothing has been added since
            self._display.search(known)
            return known
        if not best:
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
        """Fit the winner for the configuration's seeds and test it: a search's only look at the test split."""
        name = f"{self._folder.name}-trial-{trial}"  # a search that is prolonged may find another
        registered = champion.tracking.registered_model or _registered(champion)
        champion = replace(
            champion,
            preset=str(self._folder / CHAMPION),
            trainer=replace(champion.trainer, name=name, storage_path=str(self._folder.parent)),
            tracking=replace(champion.tracking, registered_model=registered),
        )
        place = run_folder.existing(champion)
        begun = (place / CONFIG).is_file()
        report = train(champion, self._display, self._backend, resume=begun)
        del report["folder"]  # which the name says, wherever the search is moved
        return name, report


def _registered(config: Config) -> str:
    """Default name of the winner in the registry, one for each task."""
    ordered = config.data.time or "-".join(config.data.order or ())  # of a stream
    parts = (config.tracking.experiment, config.data.name, config.data.train_domain, ordered, config.method)
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts if part)


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
