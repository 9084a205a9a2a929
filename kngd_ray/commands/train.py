"""``kngd-ray train``: fits, evaluation, figures, records, and the table at the end."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kngd_ray.clip import CLIPHead
from kngd_ray.commands import run_folder
from kngd_ray.commands.display import Display
from kngd_ray.commands.environment import describe_environment
from kngd_ray.commands.prepare import Prepared, open_task, prepare
from kngd_ray.commands.summary import flat_metrics, over_seeds
from kngd_ray.config import Config, TrainerConfig, baseline_config, flatten, load_config, to_yaml
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import UsageError
from kngd_ray.storage import write_text
from kngd_ray.tracking import (
    Publisher,
    Record,
    Status,
    learning_curve,
    publish,
    reliability_diagram,
    resolve_uri,
)
from kngd_ray.training.calibration import Calibration, calibrate, fit_temperature
from kngd_ray.training.classifier import restore_predictor, save_calibration
from kngd_ray.training.evaluation import Evaluation, evaluate
from kngd_ray.training.fit import FitTask
from kngd_ray.training.job import FitEvent, Job, run_fits
from kngd_ray.training.predict import PosteriorOptions, Predictor
from kngd_ray.training.resumable import latest

ZERO_SHOT = "zero-shot"


@dataclass(frozen=True)
class _Method:
    """One method of a run: its configuration, and its fits by seed."""

    config: Config
    tasks: dict[int, FitTask]

    @property
    def name(self) -> str:
        return self.config.method

    def fit(self, seed: int) -> str:
        return run_folder.fit_name(self.name, seed)


def resumed_config(name: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run that is to be continued.

    Args:
        name: name or folder of the run.
        overrides: ``key=value`` settings; only where it runs and is logged may change.

    Returns:
        The run's configuration.

    Raises:
        UsageError: a setting that would make it another run.
    """
    fixed = [text for text in overrides if not text.startswith(("trainer.", "tracking."))]
    if fixed:
        raise UsageError(f"a resumed run keeps its settings: leave out {fixed[0]!r}, or start a new run with it.")
    folder = run_folder.find(name, load_config(overrides=overrides).trainer.storage_path)
    config = load_config(folder / run_folder.CONFIG, overrides)
    place = replace(config.trainer, storage_path=str(folder.parent), name=folder.name)
    return replace(config, trainer=place)


def train(config: Config, display: Display, *, resume: bool = False) -> dict[str, Any]:
    """Run what a configuration asks for, or continue a run.

    Args:
        config: the configuration; of a run to continue, from :func:`resumed_config`.
        display: where progress and results are shown.
        resume: continue the run of that name.

    Returns:
        The report: the object that ``--json`` prints.

    Raises:
        UsageError: the baselines include the method itself.
    """
    name = config.trainer.name or run_folder.new_name(config.method)
    config = replace(config, trainer=replace(config.trainer, name=name))
    if config.tracking.enabled:
        resolve_uri(config.tracking.uri)  # a store that MLflow does not know is refused before anything is done
    if config.method in config.baselines:
        raise UsageError(f"baselines name {config.method}, which is the method itself: leave it out.")
    task = open_task(config)
    workers = config.trainer.num_workers
    with open_ray(config.trainer) if workers else nullcontext(), ExitStack() as stack:
        with display.pictures("encoding") as progress:
            prepared = prepare(task, use_ray=workers > 0, progress=progress)
        # Only now: a picture that cannot be decoded leaves no empty run behind.
        folder = run_folder.existing(config) if resume else run_folder.create(config)
        stack.enter_context(run_folder.locked(folder))
        if prepared.skipped:
            display.say(f"{prepared.skipped} undecodable pictures were left out")
        with _threads(max(1, int(config.trainer.cpus_per_worker))):
            return _run(config, prepared, folder, display)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute here with as many threads as a worker has: the same sums, and none that spin on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(config: Config, prepared: Prepared, folder: Path, display: Display) -> dict[str, Any]:
    methods = [_method(config, prepared)]
    methods += [_method(baseline_config(config, name), prepared) for name in config.baselines]
    records = {m.name: _Records(folder, m) for m in methods}
    publisher = _publisher(config, folder, display)
    display.say(f"run {folder.name} in {folder.parent}")
    status: Status = "FAILED"
    try:
        with display.steps() as show:

            def on_event(event: FitEvent) -> None:
                if event.record is not None:
                    show(event.fit, event.record)
                    records[event.fit.rsplit("-", 1)[0]].step(event.fit, event.record)

            fits = {m.fit(seed): task for m in methods for seed, task in m.tasks.items()}
            job = Job(fits, prepared.identity, folder, config.trainer.checkpoint_every)
            _run_job(job, config.trainer, on_event)
        zero_shot = {seed: _zero_shot(prepared, seed) for seed in config.seeds}
        reports = [_report(m, prepared, folder, records[m.name], zero_shot) for m in methods]
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        for record in records.values():
            record.finish(status)
        run_ids = publisher.close() if publisher is not None else None
        if publisher is not None and run_ids is None:
            display.say(
                f"what was not logged to MLflow is kept in {folder}: when the server is back, "
                f"`kngd-ray sync {folder}` sends it"
            )
    for method, report in zip(methods, reports, strict=True):
        report["run_id"] = run_ids[records[method.name].top] if run_ids else None
    result = {**reports[0], **({"baselines": reports[1:]} if reports[1:] else {})}
    write_text(folder / run_folder.RESULTS, json.dumps(result, indent=1))
    _show(config, prepared, reports, display)
    return result


def open_ray(trainer: TrainerConfig) -> AbstractContextManager[None]:
    """A Ray session that holds the trainer's workers at once.

    Args:
        trainer: workers, resources and the cluster's address.

    Returns:
        A context manager.
    """
    from kngd_ray.ray_jobs import ray_session

    n = trainer.num_workers
    return ray_session(trainer.address, cpus=n * trainer.cpus_per_worker, gpus=n * trainer.use_gpu)


def _run_job(job: Job, trainer: TrainerConfig, on_event: Callable[[FitEvent], None]) -> None:
    if not trainer.num_workers:
        run_fits(job, on_event)
        return
    from kngd_ray.ray_jobs import run_job

    run_job(job, trainer, on_event)


def _method(config: Config, prepared: Prepared) -> _Method:
    tasks = {
        seed: FitTask(
            config.fit_options,
            seed,
            prepared.support(seed),
            prepared.class_embeddings,
            prepared.model.logit_scale,
        )
        for seed in config.seeds
    }
    return _Method(config, tasks)


class _Records:
    """The MLflow records of one method: one per seed, and a parent over several."""

    def __init__(self, folder: Path, method: _Method) -> None:
        config = method.config
        params = flatten(config)
        tags = {
            "kngd_ray.run": folder.name,
            "kngd_ray.method": method.name,
            "kngd_ray.preset": str(config.preset),
        }
        several = len(config.seeds) > 1
        self.top = method.name if several else method.fit(config.seeds[0])
        self._parent = (
            Record.open(folder, method.name, name=f"{folder.name}/{method.name}", params=params, tags=tags)
            if several
            else None
        )
        self.fits = {
            method.fit(seed): Record.open(
                folder,
                method.fit(seed),
                name=f"{folder.name}/{method.fit(seed)}",
                params={**params, "seeds": seed},
                tags=tags,
                parent=method.name if several else None,
            )
            for seed in config.seeds
        }
        for record in self._all():
            write_text(record.artifacts / run_folder.CONFIG, to_yaml(config))
            write_text(record.artifacts / "environment.json", describe_environment())

    def step(self, fit: str, record: Mapping[str, Any]) -> None:
        """Log a step; a refused one only counts."""
        stats = record["stats"] or {}
        metrics = {f"train/{key}": value for key, value in stats.items() if value is not None}
        metrics |= {"time/step_ms": record["milliseconds"], "train/refused": float(record["stats"] is None)}
        self.fits[fit].log_step(record["step"], metrics)

    def log_over_seeds(self, report: Mapping[str, Any]) -> None:
        """Log figures with intervals to the parent, if there is one."""
        if self._parent is not None:
            self._parent.log_metrics(flat_metrics(report))

    def finish(self, status: Status) -> None:
        """Close all records."""
        for record in self._all():
            record.finish(status)

    def _all(self) -> list[Record]:
        return [*self.fits.values(), *([self._parent] if self._parent is not None else [])]


def _publisher(config: Config, folder: Path, display: Display) -> Publisher | None:
    if not config.tracking.enabled:
        return None
    return Publisher(folder, config.tracking.uri, config.tracking.experiment, on_problem=display.say)


def _zero_shot(prepared: Prepared, seed: int) -> dict[str, Any]:
    """Figures of CLIP as it is; its scaling temperature is fitted on the shots, on which it was not trained."""
    head = CLIPHead(prepared.class_embeddings, prepared.model.logit_scale)
    predictor = Predictor(head, None, None, PosteriorOptions(predict="mean"))
    support = prepared.support(seed)
    scaling = fit_temperature(predictor.predict(support.features, 0.0).probabilities, support.labels)
    return evaluate(predictor, prepared.tests(seed), Calibration(0.0, scaling)).report()


def _report(
    method: _Method,
    prepared: Prepared,
    folder: Path,
    records: _Records,
    zero_shot: Mapping[int, dict[str, Any]],
) -> dict[str, Any]:
    """Evaluate a method's fits; log each and combine them over seeds."""
    reports = []
    for seed, task in method.tasks.items():
        name = method.fit(seed)
        record = records.fits[name]
        fit_folder = folder / "fits" / name
        checkpoint = latest(fit_folder)
        assert checkpoint is not None, fit_folder  # the job ended well, so the fit has its final checkpoint
        posterior = method.config.posterior
        predictor = restore_predictor(checkpoint, task.class_embeddings, task.logit_scale, posterior)
        calibration = calibrate(task, posterior)
        save_calibration(fit_folder, calibration, posterior)
        tests = prepared.tests(seed)
        evaluation = evaluate(predictor, tests, calibration)
        report = evaluation.report()
        steps = record.steps()
        seconds = sum(step["time/step_ms"] for step in steps) / 1e3
        reports.append({**report, "seconds": seconds})
        record.log_metrics(
            flat_metrics(report)
            | flat_metrics(zero_shot[seed], "zero_shot/")
            | {
                "calibration/tau": calibration.tau,
                "calibration/temperature": calibration.scaling,
                "time/fit_s": seconds,
            }
        )
        _draw(record, evaluation, {name: test.labels for name, test in tests.items()}, steps, name)
        if method.config.tracking.log_model:
            record.set_model(fit_folder, prepared.images.class_names)
    combined = over_seeds(reports)
    records.log_over_seeds({k: v for k, v in combined.items() if k != "seconds"})
    zero = over_seeds([zero_shot[seed] for seed in method.tasks])
    seconds = sum(r["seconds"] for r in reports)
    steps_of_fit = next(iter(method.tasks.values())).sampler.steps
    return {
        "run_id": None,
        "method": method.name,
        "preset": method.config.preset,
        "seeds": list(method.tasks),
        "steps": steps_of_fit,
        "seconds": seconds,
        "zero_shot": zero,
        "id": combined["id"],
        "ood": combined["ood"],
    }


def _draw(
    record: Record,
    evaluation: Evaluation,
    labels: Mapping[str, Tensor],
    steps: Sequence[Mapping[str, Any]],
    name: str,
) -> None:
    curves = {test: (p, labels[test]) for test, p in evaluation.probabilities.items()}
    figures = record.artifacts / "figures"
    figures.mkdir(exist_ok=True)
    reliability_diagram(curves, figures / "reliability.png", name)
    learning_curve(steps, figures / "learning_curve.png", name)


def _show(config: Config, prepared: Prepared, reports: Sequence[Mapping[str, Any]], display: Display) -> None:
    rows = [(ZERO_SHOT, reports[0]["zero_shot"])]
    rows += [(_row_name(r), r) for r in reversed(reports)]
    shots = prepared.splits[config.seeds[0]].support
    trained_on = ", ".join(sorted({str(domain) for domain in prepared.images.domains[shots]}))
    title = (
        f"{_data_name(config)}, {len(prepared.images.class_names)} classes, trained on {trained_on}, "
        f"{config.data.shots} shots per class"
    )
    seeds = ", ".join(str(seed) for seed in config.seeds)
    spread = "mean ± half of the 95 % interval over seeds" if len(config.seeds) > 1 else "one seed, no interval"
    display.table(title, rows, [f"seeds {seeds}; {spread}; nothing was chosen on the test pictures"])


def _data_name(config: Config) -> str:
    if config.data.path == EMBEDDED:
        return "emoji"
    paths = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    return ", ".join(Path(path).stem for path in paths)


def _row_name(report: Mapping[str, Any]) -> str:
    preset = "" if report["preset"] == report["method"] else f" {report['preset']}"
    return f"{report['method']}{preset}, {report['steps']} steps"


def sync(name: str, storage_path: str, display: Display, *, uri: str | None = None) -> dict[str, str]:
    """``kngd-ray sync``: send to MLflow what a run could not log.

    Args:
        name: name or folder of the run.
        storage_path: where runs live.
        display: where the outcome is shown.
        uri: another tracking store than the run's.

    Returns:
        MLflow run id by record.
    """
    folder = run_folder.find(name, storage_path)
    config = load_config(folder / run_folder.CONFIG)
    began = time.monotonic()
    with run_folder.locked(folder):
        ids = publish(folder, uri or config.tracking.uri, config.tracking.experiment)
    display.say(f"{len(ids)} MLflow runs are up to date ({time.monotonic() - began:.1f} s)")
    return ids
