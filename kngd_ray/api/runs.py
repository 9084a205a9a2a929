"""Fit, search, evaluate, predict and compare."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray._keywords import settings_of
from kngd_ray._run_layout import SEARCH
from kngd_ray.api.settings import (
    Named,
    configured,
    configured_search,
    console_of,
    in_process,
    notes_of_ignored,
    split,
    storage_of,
    target_of,
)
from kngd_ray.console import Display
from kngd_ray.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from kngd_ray.results import ComparisonResult, EvaluationResult, RunResult, SearchResult


def train(
    preset: Named | Mapping[str, Any] | None = None,
    *overrides: str,
    resume: Named | None = None,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
    **settings: Any,
) -> "RunResult":
    """Fit a method to a few labelled pictures per class, and test it in and out of distribution.

    ::

        run = kngd_ray.train("kalman", data="pacs.parquet", train_domain="photo", shots=16, seeds=5)
        run.frame.groupby(["method", "set"])["accuracy"].mean()
        run.classifier.predict_proba(["cat.jpg"])

    Without settings it runs on the pictures and the model that come with the package.

    Args:
        preset: name of a preset or a method; a YAML file, or a mapping, of settings; None is the default.
        *overrides: settings as the command line takes them, ``"data.shots=16"``.
        resume: name or folder of a run that was cut short, to continue it. Only settings of trainer and tracking may
            be given with it.
        ray: run on Ray with ``trainer.num_workers`` workers, two by default. Otherwise everything runs in this process,
            unless ``num_workers`` is given.
        quiet: show nothing.
        console: where progress and results are shown; None is a new one.
        **settings: settings. An integer ``seeds`` is a count: 5 means seeds 0 to 4.

    Returns:
        The run.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
    """
    given = [*overrides, *settings_of(settings)]
    preset, given = split(preset, given)
    config = configured(preset, in_process(given, preset, ray=ray), resume)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.run import train as run
    from kngd_ray.results import RunResult

    display = console_of(console, quiet)
    for note in notes_of_ignored(config, given, preset):
        display.say(note)
    report = run(config, display, RayBackend(), resume=resume is not None)
    return RunResult(Path(report.pop("folder")), report)


def tune(
    search: Named | None = None,
    *overrides: str,
    resume: Named | None = None,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
    **settings: Any,
) -> "SearchResult":
    """Search for settings on the training pictures alone, then fit the best trial and test it once.

    ::

        search = kngd_ray.tune("noise_priors", data="pacs.parquet", train_domain="photo", shots=16, num_samples=60)
        search.best["params"]
        search.run.metrics["ood/mean/accuracy"]

    Args:
        search: name of a shipped search, or a YAML file.
        *overrides: settings as the command line takes them, ``"search.num_samples=60"``.
        resume: name or folder of a search, to continue it or to join the process that runs it.
        ray: run trials on Ray, as :func:`train` says of its fits.
        quiet: show nothing.
        console: where progress and results are shown; None is a new one.
        **settings: settings; options of the search, such as ``num_samples``, need no prefix.

    Returns:
        The search.

    Raises:
        UsageError: a setting is unknown or has a wrong value, or no search is named.
    """
    from kngd_ray.tuning.options import SearchOptions

    given = [*overrides, *settings_of(settings, [f.name for f in fields(SearchOptions)])]
    asked, given = split(search, given)
    file = asked if isinstance(asked, (str, os.PathLike)) and Path(asked).is_file() else None
    found = configured_search(asked, in_process(given, file, ray=ray), resume)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.results import SearchResult
    from kngd_ray.tuning.run import tune as run

    display = console_of(console, quiet)
    for note in notes_of_ignored(found.config, [text for text in given if not text.startswith(("search.", "space."))]):
        display.say(note)
    report = run(found, display, RayBackend(), resume=resume is not None)
    return SearchResult(Path(found.config.trainer.storage_path).expanduser().resolve() / report["name"], report)


def evaluate(
    run: "Named | RunResult | SearchResult",
    *overrides: str,
    storage_path: Named | None = None,
    ray: bool = False,
    quiet: bool = False,
    console: Display | None = None,
    **settings: Any,
) -> "EvaluationResult":
    """Evaluate a fit in and out of distribution, on its own data or on other data with the same classes.

    ::

        found = kngd_ray.evaluate(run, data="new.parquet")
        found.frame[["set", "accuracy", "nll", "ece", "aurc"]]

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        *overrides: settings as the command line takes them; a YAML file may be the first.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        ray: encode on Ray with the run's workers.
        quiet: show nothing.
        console: where figures are shown; None is a new one.
        **settings: settings of data, model and trainer over the run's.

    Returns:
        The figures.
    """
    given = [*overrides, *settings_of(settings)]
    file, given = split(None, given)
    assert not isinstance(file, Mapping)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.evaluate import evaluate as score
    from kngd_ray.results import EvaluationResult

    target, place = target_of(run), storage_of(storage_path)
    path = None if file is None else Path(file)
    report = score(target, path, in_process(given, path, ray=ray), place, console_of(console, quiet), RayBackend())
    return EvaluationResult(Path(report["checkpoint"]).parent.name, report)


def predict(
    run: "Named | RunResult | SearchResult",
    images: Named | Sequence[Named],
    *,
    storage_path: Named | None = None,
    html: Named | None = None,
    table: bool = False,
    quiet: bool = False,
    console: Display | None = None,
) -> "pd.DataFrame":
    """Classify picture files, with the uncertainty of each prediction.

    ::

        kngd_ray.predict("first", "holiday/")[["image", "class", "probability", "novelty"]]

    For pictures in memory, use ``run.classifier``.

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        images: a picture file, a folder of them, or several; parquet files for a run on features.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        html: a gallery to write, the most novel first.
        table: also show a table.
        quiet: show nothing.
        console: where it is shown; None is a new one.

    Returns:
        A pandas frame with a row for each picture: ``image`` (of features ``file`` and ``row``), ``class``,
        ``probability`` with ``probability_low`` and ``probability_high``, ``novelty``, ``uncertainty`` (entropy, nats),
        ``logit_std`` and ``probabilities``.

    Raises:
        UsageError: what is given are no names of files.
    """
    import pandas as pd

    named = [images] if isinstance(images, (str, os.PathLike)) else images
    named = list(named) if isinstance(named, Iterable) else [named]
    if not all(isinstance(name, (str, os.PathLike)) for name in named):
        raise UsageError(
            "predict classifies files by their names: for pictures or features in memory, use run.classifier."
        )
    return pd.DataFrame(
        predictions(run, named, storage_path=storage_path, html=html, table=table, console=console_of(console, quiet))
    )


def predictions(
    run: "Named | RunResult | SearchResult",
    images: Sequence[Named],
    *,
    storage_path: Named | None,
    html: Named | None,
    table: bool,
    console: Display,
) -> list[dict[str, Any]]:
    """The rows of :func:`predict` as plain data, which ``kngd-ray predict --json`` prints."""
    from kngd_ray.experiment.predict import predict as classify

    files, page = [os.fspath(name) for name in images], None if html is None else Path(html)
    return classify(target_of(run), files, storage_of(storage_path), console, html=page, table=table)


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of :func:`predictions` as CSV with a header."""
    from kngd_ray.experiment.predict import as_csv as written

    return written(rows)


def compare(
    experiment: str = "kngd_ray",
    *,
    parent: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    uri: str | None = None,
    out: Named | None = None,
    quiet: bool = False,
    console: Display | None = None,
) -> "ComparisonResult":
    """Compare the runs of an MLflow experiment, paired by seed, with intervals.

    ::

        found = kngd_ray.compare("experiment", metrics=["ood/mean/accuracy"])
        found.frame.query("decided")

    Args:
        experiment: its name.
        parent: only the runs below this one; for a search, its trials.
        metrics: names of metrics; none are accuracy, NLL and ECE.
        baseline: run, row or method that others are compared with; None is AdamW, else zero-shot CLIP.
        uri: tracking store; None is the default of :func:`train`.
        out: the HTML page; None is ``compare-EXPERIMENT.html`` in the current folder.
        quiet: show nothing.
        console: where the tables are shown; None is a new one.

    Returns:
        The comparison.
    """
    from kngd_ray.comparison.compare import compare as run
    from kngd_ray.results import ComparisonResult

    display, page = console_of(console, quiet), None if out is None else Path(out)
    return ComparisonResult(
        run(experiment, display, parent=parent, metrics=metrics, baseline=baseline, uri=uri, out=page)
    )


def load(run: Named, *, storage_path: Named | None = None) -> "RunResult | SearchResult":
    """Load a run, a search, or a classifier saved by ``KalmanCLIP.save``.

    ::

        kngd_ray.load("first").classifier.predict_proba(["cat.jpg"])

    Args:
        run: name or folder.
        storage_path: where runs are stored; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.

    Returns:
        The run, or the search.
    """
    from kngd_ray.experiment import run_folder
    from kngd_ray.results import RunResult, SearchResult

    folder = run_folder.find(target_of(run), storage_of(storage_path))
    return SearchResult(folder) if (folder / SEARCH).is_file() else RunResult(folder)
