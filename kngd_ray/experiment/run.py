"""``kngd-ray train``: the fits of a run, their evaluation, and the table at the end."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kngd_ray._run_layout import FITS, RESULTS, fit_name
from kngd_ray.clip import CLIPHead
from kngd_ray.config import Config, TrainerConfig, baseline_config
from kngd_ray.console import Display
from kngd_ray.errors import FilterError, UsageError
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.aggregate import CHANCE, ZERO_SHOT
from kngd_ray.experiment.backend import HERE, Backend
from kngd_ray.experiment.continuation import check_prior, find_priors
from kngd_ray.experiment.learned import check_unchanged, known_to, leave_out, tell_overlap
from kngd_ray.experiment.method_run import MethodRun
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.protocols import Protocol, open_protocol, prepare_protocol
from kngd_ray.experiment.streams import show_streams, stream_of, zero_shot_figures
from kngd_ray.experiment.task import open_task
from kngd_ray.storage import write_text
from kngd_ray.tracking import Publisher, Status, resolve_uri
from kngd_ray.training.calibration import Calibration, fit_temperature
from kngd_ray.training.evaluation import ID, evaluate
from kngd_ray.training.job import FitEvent, Job
from kngd_ray.training.loader import cores
from kngd_ray.training.metrics import load_scorers
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import Predictor
from kngd_ray.training.refit import refits
from kngd_ray.training.start import describe_start


def train(config: Config, display: Display, backend: Backend = HERE, *, resume: bool = False) -> dict[str, Any]:
    """Run what a configuration asks for, or continue a run.

    Args:
        config: the configuration; of a run to continue, from :func:`resumed_config`.
        display: where progress and results are shown.
        backend: does the work.
        resume: continue the run of that name.

    Returns:
        The report: the object that ``--json`` prints, and the run's ``folder``.

    Raises:
        UsageError: the baselines include the method itself, or a GPU is asked for where there is none.
    """
    name = config.trainer.name or run_folder.new_name(config.method)
    config = replace(config, trainer=replace(config.trainer, name=name))
    if config.tracking.enabled:
        resolve_uri(config.tracking.uri)  # a store that MLflow does not know is refused before anything is done
    if config.method in config.baselines:
        raise UsageError(f"baselines name {config.method}, which is the method itself: leave it out.")
    if not config.trainer.least_workers:
        backend.with_gpus(config.trainer)  # what this process lacks is refused before anything is done
    configs = [config, *(baseline_config(config, name) for name in config.baselines)]
    priors = [find_priors(c) for c in configs]
    task = open_task(config)
    configs = [replace(c, model=task.config.model) for c in configs]  # the features' files may state a logit scale
    for note in task.notes:
        display.say(note)
    tell_overlap(task, priors[0], display.say)
    known = known_to(priors)
    task = leave_out(task, known, "the prior", display.say)
    unseen = open_protocol(config, task, frozenset().union(*known.values()))
    for target, other in unseen.items():
        # a half of the run's own classes was read with the other
        read = other.images.notes if config.protocol == "cdg" else ()
        if told := [*read, *([] if other.note is None else [other.note])]:
            display.say(f"{target}: {'; '.join(told)}")
    for c, found in zip(configs, priors, strict=True):
        for prior in found.values():
            check_prior(prior, c.fit_options, task.identity)
    load_scorers()  # what cannot be imported fails now, and not after all fits
    with backend.session(config.trainer), ExitStack() as stack:
        trainer = backend.with_gpus(config.trainer)
        display.say(_where(trainer, asked=config.trainer.most_workers))
        for c in configs:
            if (start := describe_start(c.fit_options, c.prior)) is not None:
                display.say(f"{c.method}: {start}")
            for note in c.fit_options.notes if c.prior is None else ():  # which has a variance of its own
                display.say(f"{c.method}: {note}")
        with display.pictures("encoding") as progress:
            prepared = prepare(task, backend, progress)
            protocol = prepare_protocol(config, unseen, prepared, backend, progress)
        # Only now: a picture that cannot be decoded leaves no empty run behind.
        folder = run_folder.existing(config) if resume else run_folder.create(config)
        stack.enter_context(run_folder.locked(folder))
        if resume:
            names = [fit_name(c.method, seed) for c in configs for seed in c.seeds]
            check_unchanged(prepared, [folder / FITS / name for name in names])
        if prepared.skipped:
            display.say(f"undecodable pictures left out: {prepared.skipped}")
        with compute_threads(config.trainer):
            methods = [
                MethodRun(c, found, prepared, protocol, folder) for c, found in zip(configs, priors, strict=True)
            ]
            # the run's folder keeps what was asked for, so that it can be continued where there is another GPU
            return _run(replace(config, trainer=trainer), methods, prepared, protocol, folder, display, backend)


def _run(
    config: Config,
    methods: Sequence[MethodRun],
    prepared: TaskData,
    protocol: Protocol,
    folder: Path,
    display: Display,
    backend: Backend,
) -> dict[str, Any]:
    publisher = None
    if config.tracking.enabled:
        publisher = Publisher(folder, config.tracking.uri, config.tracking.experiment, on_problem=display.say)
    display.say(f"run {folder.name} in {folder.parent}")
    status: Status = "FAILED"
    reports: list[dict[str, Any]] = []
    run_ids: Mapping[str, str] | None = None
    watched = config.tracking.enabled and config.tracking.system_metrics
    try:
        with methods[0].monitored() if watched else nullcontext():
            _fit(config, methods, prepared, folder, display, backend)
        zero_shot = {seed: _zero_shot(prepared, protocol, seed) for seed in config.seeds}
        reports = [report for m in methods if (report := m.report(zero_shot, display.working)) is not None]
        if reports:
            _write_results(folder, reports)
            _show(config, prepared, protocol, reports, display, unchosen=methods[0].unchosen)
            for warning in (warning for method in methods for warning in method.warnings):
                display.say(f"warning: {warning}")
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        for method in methods:
            method.finish(status)
        if publisher is not None:
            run_ids = publisher.close()
            if run_ids is None:
                display.say(
                    f"what was not logged to MLflow is kept in {folder}: when the server is back, "
                    f"`kngd-ray sync {folder}` sends it"
                )
    tops = {method.name: method.top_record for method in methods}
    for report in reports:
        report["run_id"] = (run_ids or {}).get(tops[report["method"]])
    result = _write_results(folder, reports) if reports else {}  # now with the ids of their MLflow runs
    failures = {fit: reason for method in methods for fit, reason in method.failures.items()}
    if failures:
        fit, reason = next(iter(failures.items()))
        others = f" ({len(failures)} of {sum(len(m.tasks) for m in methods)} fits failed)" if len(failures) > 1 else ""
        raise FilterError(f"{fit}{others}: {reason}")
    return {**result, "folder": str(folder)}


def _fit(
    config: Config,
    methods: Sequence[MethodRun],
    prepared: TaskData,
    folder: Path,
    display: Display,
    backend: Backend,
) -> None:
    """Run all fits of all methods as one job."""
    owner = {method.fit(seed): method for method in methods for seed in method.tasks}
    fits = {method.fit(seed): task for method in methods for seed, task in method.tasks.items()}
    steps = {name: task.sampler.steps for name, task in fits.items()}
    with display.steps(steps, refitted=[name for name, task in fits.items() if refits(task)]) as show:

        def on_event(event: FitEvent) -> None:
            if event.record is not None:
                show(event.fit, event.record)
                owner[event.fit].log_step(event.fit, event.record)
            if event.error is not None:
                owner[event.fit].failures[event.fit] = event.error

        job = Job(fits, prepared.identity, folder, config.trainer.checkpoint_every)
        backend.run_fits(job, config.trainer, on_event)


def _zero_shot(prepared: TaskData, protocol: Protocol, seed: int) -> dict[str, Any]:
    """Figures of zero-shot CLIP; its temperature is fitted on the shots, which it was not trained on."""
    head = CLIPHead(prepared.class_embeddings, prepared.model.logit_scale)
    predictor = Predictor(head, None, None, PosteriorOptions(predict="mean"))
    support = prepared.support(seed)
    scaling = fit_temperature(predictor.predict(support.features, 0.0).probabilities, support.labels)
    calibration = Calibration(0.0, scaling)
    report = evaluate(predictor, prepared.tests(seed), calibration).report()
    return report | protocol.figures(predictor, calibration, report[ID]) | zero_shot_figures(prepared, seed)


def _write_results(folder: Path, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    result = {**reports[0], **({"baselines": list(reports[1:])} if reports[1:] else {})}
    write_text(folder / RESULTS, json.dumps(result, indent=1))
    return result


def _where(trainer: TrainerConfig, asked: int) -> str:
    """The devices and workers of a run in one line, and why there are fewer than requested."""
    what = "a GPU" if trainer.use_gpu else "the CPU"
    if trainer.least_workers:
        ranks = trainer.most_workers
        fewer = "" if ranks == asked else f", not {asked}: GPUs are fewer; trainer.use_gpu=false takes the CPU in all"
        return f"computing on {what} in {f'each of {ranks} workers' if ranks > 1 else 'one worker'}{fewer}"
    return f"computing on {what} in this process" + (
        "" if trainer.use_gpu else f", with {_threads()} thread{'s' * (_threads() > 1)}"
    )


def _threads() -> int:
    """Those of a run without workers: a core each, and no more than OMP_NUM_THREADS or the caller gives torch."""
    return min(cores(), torch.get_num_threads())


@contextmanager
def compute_threads(trainer: TrainerConfig) -> Iterator[None]:
    """Compute here with as many threads as a worker has: the same sums, and none that spin on a busy machine.

    Args:
        trainer: workers, and the CPU cores that each reserves.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(trainer.cpus_per_worker)) if trainer.least_workers else _threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(
    config: Config,
    prepared: TaskData,
    protocol: Protocol,
    reports: Sequence[Mapping[str, Any]],
    display: Display,
    *,
    unchosen: bool,
) -> None:
    rows = [
        (ZERO_SHOT if prepared.model.zero_shot else CHANCE, reports[0]["zero_shot"]),
        *((_row_name(report), report) for report in reversed(reports)),
    ]
    shots = prepared.splits[config.seeds[0]].support
    trained_on = ", ".join(sorted({str(domain) for domain in prepared.images.domains[shots]}))
    count = f"{config.data.shots} shots per class"
    if config.protocol == "stream":
        count = f"a stream of {len(shots)}"
    domains = "" if trained_on == "all" else f"trained on {trained_on}, "  # data without domains have one of that name
    title = f"{config.data.name}, {len(prepared.images.class_names)} classes, {domains}{count}"
    if config.prior is not None:
        title += f", continued from {Path(config.prior).name}"
    seeds = ", ".join(str(seed) for seed in config.seeds)
    chosen = _chosen(config, reports[0]["steps"] // max(config.epochs, 1), unchosen=unchosen)
    display.table(title, rows, [f"seeds {seeds}; {_spread(config, prepared.one_support)}{chosen}"])
    protocol.show(rows, display)
    if (stream := stream_of(prepared, config.seeds[0])) is not None:
        show_streams(rows, config.fit_options, stream, display)


def _spread(config: Config, one_support: bool) -> str:
    """What the interval of a figure is of."""
    if len(config.seeds) == 1:
        return "one seed, no interval"
    if one_support:
        return "means over seeds that have the same shots, no interval"
    return "mean and 95 % interval over seeds (Student's t)"


def _chosen(config: Config, batches: int, *, unchosen: bool = False) -> str:
    """What the shots were asked for beside the weights; not for a tau that is given, or a stream of one batch."""
    posterior = config.posterior
    if config.protocol == "stream":
        chosen = (
            config.method == "kalman" and posterior.predict != "mean" and posterior.temperature is None and batches > 1
        )
        return "; tau was chosen by what had been predicted before" if chosen else ""
    used, given = config.method == "kalman" and posterior.predict != "mean", posterior.temperature
    by_head = used and posterior.predict == "linearised" and config.prior is None and config.tune.after_head
    if not posterior.folds and not by_head:
        return f"; tau is {posterior.unasked:g}, by no folds" if used and not config.tune.images else ""
    asked = ["tau"] if used and given is None else []
    asked += ["sharpening"] if posterior.sharpening_spread else []
    tau = f"; tau is {given:g}" if used and given is not None else ""
    where = "training shots" if posterior.folds else "training shots, by folds of the head"
    how = "not chosen for every fit, see the warnings" if unchosen else f"chosen on {where}"
    return f"{tau}; {how}: {', '.join([*asked, 'temperatures'])}"


def _row_name(report: Mapping[str, Any]) -> str:
    preset = "" if report["preset"] == report["method"] else f" {Path(report['preset']).stem}"
    refused = f" ({report['refused']} refused)" if report["refused"] else ""
    steps = f"{report['steps']} step{'s' if report['steps'] != 1 else ''}"
    return f"{report['method']}{preset}, {steps}{refused}"
