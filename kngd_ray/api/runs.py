"""What the package does, as functions; ``import kngd_ray`` shows them, and the command line calls them.

Every keyword is a setting: ``shots=16`` is ``data.shots=16`` of the command line, see :func:`settings_of`. The same
settings give the same result in both, and a wrong one the same sentence, raised as a ``kngd_ray.errors.KngdError``.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray._keywords import names_setting, settings_of
from kngd_ray._run_layout import SEARCH
from kngd_ray.config import Config, load_config
from kngd_ray.configs import names, read_yaml
from kngd_ray.console import Display
from kngd_ray.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

    from kngd_ray.results import ComparisonResult, EvaluationResult, RunResult, SearchResult
    from kngd_ray.tuning.file import SearchConfig

__all__ = ["compare", "evaluate", "load", "predict", "train", "tune"]

Named = str | os.PathLike[str]

_LOCAL = "trainer.num_workers=0"
_STORAGE = "trainer.storage_path"


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
        ray: run on Ray with as many workers as the settings say, two by default. Otherwise everything happens in this
            process, unless ``num_workers`` is given.
        quiet: show nothing.
        console: where progress and results are shown; None is a new one.
        **settings: settings. A whole number of ``seeds`` is how many: 5 are the seeds 0 to 4.

    Returns:
        The run.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
    """
    given = [*overrides, *settings_of(settings)]
    preset, given = _first(preset, given)
    config = configured(preset, _placed(given, preset, ray=ray), resume)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.run import train as run
    from kngd_ray.results import RunResult

    report = run(config, _shown(console, quiet), RayBackend(), resume=resume is not None)
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
    """Search for the settings of a fit on its training pictures alone, then fit and test the best once.

    ::

        search = kngd_ray.tune("noise_priors", data="pacs.parquet", train_domain="photo", shots=16, num_samples=60)
        search.best["params"]
        search.run.metrics["ood/mean/accuracy"]

    Args:
        search: name of a shipped search, or a YAML file.
        *overrides: settings as the command line takes them, ``"search.num_samples=60"``.
        resume: name or folder of a search, to continue it or to help the process that runs it.
        ray: run trials on Ray, as :func:`train` says of its fits.
        quiet: show nothing.
        console: where progress and results are shown; None is a new one.
        **settings: settings; names of options of the search, such as ``num_samples``, stand for themselves.

    Returns:
        The search.

    Raises:
        UsageError: a setting is unknown or has a wrong value, or no search is named.
    """
    from kngd_ray.tuning.options import SearchOptions

    given = [*overrides, *settings_of(settings, [f.name for f in fields(SearchOptions)])]
    asked, given = _first(search, given)
    found = configured_search(asked, _placed(given, None, ray=ray), resume)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.results import SearchResult
    from kngd_ray.tuning.run import tune as run

    report = run(found, _shown(console, quiet), RayBackend(), resume=resume is not None)
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
    """Score a trained fit in and out of distribution, on its own data or on other data of the same classes.

    ::

        found = kngd_ray.evaluate(run, data="new.parquet")
        found.frame[["set", "accuracy", "nll", "ece", "aurc"]]

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        *overrides: settings as the command line takes them; a YAML file may be the first.
        storage_path: where runs live; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        ray: encode on Ray with the run's workers.
        quiet: show nothing.
        console: where figures are shown; None is a new one.
        **settings: settings of data, model and trainer over the run's.

    Returns:
        The figures.
    """
    given = [*overrides, *settings_of(settings)]
    file, given = _first(None, given)
    assert not isinstance(file, Mapping)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.evaluate import evaluate as score
    from kngd_ray.results import EvaluationResult

    target, place = _target(run), _storage(storage_path)
    path = None if file is None else Path(file)
    report = score(target, path, _placed(given, path, ray=ray), place, _shown(console, quiet), RayBackend())
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

        kngd_ray.predict("runs/first", "holiday/")[["image", "class", "probability", "unlike"]]

    Pictures in memory go to ``run.classifier`` instead.

    Args:
        run: a result; or name or folder of a run, or the folder of a fit or a checkpoint.
        images: a picture file, a folder of them, or several; parquet files for a run on features.
        storage_path: where runs live; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.
        html: a gallery to write, the least certain first.
        table: also show a table.
        quiet: show nothing.
        console: where it is shown; None is a new one.

    Returns:
        A pandas frame with a row for each picture: ``image``, ``class``, ``probability`` with ``probability_low`` and
        ``probability_high``, ``unlike``, ``uncertainty`` (entropy, nats), ``logit_std`` and ``probabilities``.
    """
    import pandas as pd

    from kngd_ray.experiment.predict import predict as classify

    named = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    files = [os.fspath(name) for name in named]
    page = None if html is None else Path(html)
    display = _shown(console, quiet)
    return pd.DataFrame(classify(_target(run), files, _storage(storage_path), display, html=page, table=table))


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
    """Lay the runs of an MLflow experiment side by side, paired by seed, with intervals.

    ::

        found = kngd_ray.compare("experiment", metrics=["ood/mean/accuracy"])
        found.frame.query("decided")

    Args:
        experiment: its name.
        parent: only the runs below this one; of a search, its trials.
        metrics: names of metrics; none are accuracy, NLL and ECE.
        baseline: run, row or method that differences are from; None is AdamW, else CLIP as it is.
        uri: tracking store; None is the default of :func:`train`.
        out: the HTML page; None is ``compare-EXPERIMENT.html`` in the current folder.
        quiet: show nothing.
        console: where the tables are shown; None is a new one.

    Returns:
        The comparison.
    """
    from kngd_ray.comparison.compare import compare as run
    from kngd_ray.results import ComparisonResult

    display, page = _shown(console, quiet), None if out is None else Path(out)
    return ComparisonResult(
        run(experiment, display, parent=parent, metrics=metrics, baseline=baseline, uri=uri, out=page)
    )


def load(run: Named, *, storage_path: Named | None = None) -> "RunResult | SearchResult":
    """Take up a run or a search from its folder, or what ``KalmanCLIP.save`` wrote.

    ::

        kngd_ray.load("runs/first").classifier.predict_proba(["cat.jpg"])

    Args:
        run: name or folder.
        storage_path: where runs live; None is ``$KNGD_STORAGE_PATH``, else ``kngd_runs``.

    Returns:
        The run, or the search.
    """
    from kngd_ray.experiment import run_folder
    from kngd_ray.results import RunResult, SearchResult

    folder = run_folder.find(os.fspath(run), _storage(storage_path))
    return SearchResult(folder) if (folder / SEARCH).is_file() else RunResult(folder)


def configured(
    preset: Named | Mapping[str, Any] | None, overrides: Sequence[str] = (), resume: Named | None = None
) -> Config:
    """The configuration of a run, new or continued, as :func:`train` takes it.

    Args:
        preset: name of a preset or a method, YAML file, or mapping of settings.
        overrides: ``key=value`` settings over it.
        resume: a run that is to be continued.

    Returns:
        The configuration.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
    """
    if resume is not None:
        if preset is not None:
            raise UsageError(f"a resumed run keeps its settings: leave out {preset}.")
        from kngd_ray.experiment.run_folder import resumed_config

        return resumed_config(os.fspath(resume), overrides)
    return load_config(_source(preset), overrides)


def configured_search(
    search: Named | Mapping[str, Any] | None, overrides: Sequence[str] = (), resume: Named | None = None
) -> "SearchConfig":
    """The search, new or continued, as :func:`tune` takes it.

    Args:
        search: name of a shipped search, or YAML file.
        overrides: ``key=value`` settings over it.
        resume: a search that is to be continued.

    Returns:
        The search.

    Raises:
        UsageError: a setting is unknown or has a wrong value, or no search is named.
    """
    from kngd_ray.tuning.file import load_search, resumed_search

    if resume is not None:
        if search is not None:
            raise UsageError(f"a continued search keeps its settings: leave out {search}.")
        return resumed_search(os.fspath(resume), overrides)
    if search is None or isinstance(search, Mapping):
        raise UsageError("name a search, such as noise_priors or a YAML file, or --resume SEARCH.")
    return load_search(os.fspath(search), overrides)


def _first(
    given: Named | Mapping[str, Any] | None, overrides: list[str]
) -> tuple[Named | Mapping[str, Any] | None, list[str]]:
    """Tell a file or a preset from the settings, of which it may be the first."""
    if isinstance(given, str) and "=" in given:
        return None, [given, *overrides]
    if given is None and overrides and "=" not in overrides[0]:
        return overrides[0], overrides[1:]
    return given, overrides


def _source(preset: Named | Mapping[str, Any] | None) -> Path | Mapping[str, Any] | None:
    """What a configuration is built from: a file, a mapping, or the name of a preset."""
    if preset is None or isinstance(preset, Mapping):
        return preset
    path = Path(preset)
    shipped = preset in names("presets") and not path.is_file()
    if not shipped and (isinstance(preset, os.PathLike) or path.suffix in {".yaml", ".yml"} or path.exists()):
        return path
    return {"preset": os.fspath(preset)}


def _placed(settings: list[str], source: Any, *, ray: bool) -> list[str]:
    """Settings that keep to this process, unless they or a file say otherwise."""
    if ray or names_setting(settings, "trainer.num_workers"):
        return settings
    layer = _source(source)
    if isinstance(layer, Path):
        layer = read_yaml(layer)
    trainer = (layer or {}).get("trainer")
    if "trainer.num_workers" in (layer or {}) or (isinstance(trainer, Mapping) and "num_workers" in trainer):
        return settings
    return [_LOCAL, *settings]


def _target(run: Any) -> str:
    """The folder of a result, or what names one."""
    return os.fspath(getattr(run, "folder", run))


def _storage(given: Named | None) -> str:
    return os.environ.get("KNGD_STORAGE_PATH") or "kngd_runs" if given is None else os.fspath(given)


def _shown(console: Display | None, quiet: bool) -> Display:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return Display(quiet=quiet) if console is None else console
