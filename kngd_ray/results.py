"""Results of :mod:`kngd_ray.api`: runs, searches, evaluations and comparisons, as frames, figures and classifiers.

Runs and searches are views of their folders: :func:`kngd_ray.load` opens them again at any time.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray._option import option
from kngd_ray._run_layout import ESTIMATOR, FITS, RESULTS, SEARCH, fit_name
from kngd_ray.config import Config
from kngd_ray.errors import CheckpointError
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.aggregate import LEVEL, ZERO_SHOT, flat_metrics
from kngd_ray.storage import read_json
from kngd_ray.tracking import accuracy_plot, read_metrics, trial_plot
from kngd_ray.training.settled import read_settled

if TYPE_CHECKING:
    import optuna
    import pandas as pd
    from matplotlib.figure import Figure

    from kngd_ray.estimator import FittedClassifier, KalmanCLIP

_SETS = ("id", "ood")
_BOUNDS = ("low", "high")
_SCALED = "/temperature_scaled"
_ZERO_SHOT = "zero_shot/"


class _Kept:
    """What a run or a search left in its folder.

    Args:
        folder: its folder.
        report: the object that ``--json`` prints; None reads it from the folder.
    """

    def __init__(self, folder: Path, report: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.report: dict[str, Any] = dict(_read(folder) if report is None else report)

    @property
    def name(self) -> str:
        """Its name, and the name of its folder."""
        return self.folder.name


class RunResult(_Kept):
    """A run: the fits of one or several methods, each for one or several seeds.

    Args:
        folder: of the run.
        report: the object that ``kngd-ray train --json`` prints; None reads it from the folder.

    Attributes:
        folder: of the run; :func:`kngd_ray.load`, ``kngd-ray predict`` and the other commands take it.
        report: the metrics, nested: ``report["id"]["accuracy"]``, with ``mean``, ``low`` and ``high`` over seeds; a
            number for one seed, and for seeds that all drew the same shots.
    """

    @cached_property
    def config(self) -> Config:
        """The settings of the run."""
        return run_folder.read_config(self.folder)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures of the run's method by name, means over seeds: ``id/accuracy``, ``ood/mean/nll``.

        Of several seeds the ends of an interval follow: ``id/accuracy/low``, ``id/accuracy/high``. They are as the run
        ended: a warning says so if ``ensemble`` has averaged its weights since.
        """
        self._warn_of_ensemble()
        return self._flat

    @property
    def _flat(self) -> dict[str, float]:
        return flat_metrics({key: self.report[key] for key in _SETS if key in self.report})

    @property
    def _ensemble(self) -> str:
        """What is to be said of weights that were averaged after these figures were taken; empty if none were."""
        moved = []
        try:
            for method in (self.report, *self.report.get("baselines", [])):
                for place, seed in enumerate(method.get("seeds", ())):
                    fit = fit_name(method["method"], seed)
                    kept = read_settled(self.folder / FITS / fit).alpha
                    if kept is None:
                        continue
                    # earlier versions do not say
                    alpha = method["alpha"][place] if "alpha" in method else self.config.tune.alpha
                    if kept != alpha:
                        moved.append(f"{fit} predicts at alpha={kept:g}, and its figures here are of alpha={alpha:g}")
        except CheckpointError:  # which predictions will tell of
            return ""
        more = f", and {len(moved) - 1} more likewise" if len(moved) > 1 else ""
        return f"{moved[0]}{more}" if moved else ""

    def _warn_of_ensemble(self) -> None:
        if said := self._ensemble:
            warnings.warn(
                f"{self.name}: {said}: kngd_ray.evaluate({str(self.folder)!r}) has those of what it predicts now",
                stacklevel=3,
            )

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the run; None where it was not logged."""
        found: str | None = self.report.get("run_id")
        return found

    @property
    def frame(self) -> "pd.DataFrame":
        """A pandas frame with a row for each method, seed and test set.

        Columns are ``method``, ``preset``, ``seed``, ``set`` (``id``, or a domain), and the figures: ``accuracy``,
        ``nll``, ``ece`` and others. The rows of ``zero-shot`` are CLIP before the fit.
        """
        self._warn_of_ensemble()
        return self._frame

    @cached_property
    def _frame(self) -> "pd.DataFrame":
        import pandas as pd

        return pd.DataFrame(list(self._rows()))

    @cached_property
    def classifier(self) -> "FittedClassifier | KalmanCLIP":
        """The fit of the first seed, ready to predict pictures: ``run.classifier.predict_proba(pictures)``."""
        from kngd_ray.estimator import FittedClassifier, KalmanCLIP

        if (self.folder / ESTIMATOR).is_file():
            return KalmanCLIP.load(self.folder)
        return FittedClassifier(run_folder.find_fit(str(self.folder), str(self.folder.parent)))

    def plot(self) -> "Figure":
        """Draw the accuracy of each method on each test set, with its interval over seeds."""
        rows: dict[str, dict[str, tuple[float, float, float]]] = {}
        methods = [self.report, *self.report.get("baselines", [])]
        for method, report in [(ZERO_SHOT, self.report.get("zero_shot", {})), *((m["method"], m) for m in methods)]:
            rows[method] = {
                name: _estimate(figures["accuracy"]) for name, figures in _sets(report) if "accuracy" in figures
            }
        return accuracy_plot({method: figures for method, figures in rows.items() if figures}, self.name)

    def _rows(self) -> Iterator[dict[str, Any]]:
        zero_shot: dict[int, dict[str, float]] = {}
        for report in (self.report, *self.report.get("baselines", [])):
            for seed in report.get("seeds", ()):
                logged = read_metrics(self.folder, fit_name(report["method"], seed))
                zero_shot.setdefault(seed, _zero_shot(logged))
                about = {"method": report["method"], "preset": report["preset"], "seed": seed}
                yield from _by_set(about, logged)
        for seed, logged in zero_shot.items():
            yield from _by_set({"method": ZERO_SHOT, "preset": None, "seed": seed}, logged)

    def __repr__(self) -> str:
        metrics, names = self._flat, ("id/accuracy", "ood/mean/accuracy")
        figures = ", ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics) or "no figures"
        return f"RunResult({self.name!r}: {'; '.join(filter(None, [figures, self._ensemble]))})"


class SearchResult(_Kept):
    """A search: its trials, and the run of its winner.

    Args:
        folder: of the search.
        report: the object that ``kngd-ray tune --json`` prints; None reads it from the folder.

    Attributes:
        folder: of the search.
        report: trials by what became of them, the best, and the winner's test.
    """

    @property
    def best(self) -> dict[str, Any] | None:
        """The best trial: ``trial`` (its number), ``params`` by dotted key, ``objective`` by name; None without one."""
        found: dict[str, Any] | None = self.report["best"]
        return found

    @property
    def run(self) -> RunResult | None:
        """The winner's run, fitted and tested once; None with ``search.refit=false``."""
        name = self.report["run"]
        return None if name is None else RunResult(self.folder.parent / name)

    @property
    def metrics(self) -> dict[str, float]:
        """Objectives of the best trial, as ``objective/NAME``, and the figures of the winner's run."""
        best = self.best["objective"] if self.best is not None else {}
        run = self.run
        return {f"objective/{name}": value for name, value in best.items()} | ({} if run is None else run.metrics)

    @property
    def mlflow_run_id(self) -> str | None:
        """MLflow's id of the winner's run; None where there is none."""
        run = self.run
        return None if run is None else run.mlflow_run_id

    @property
    def classifier(self) -> "FittedClassifier | KalmanCLIP":
        """The winner, ready to predict pictures.

        Raises:
            CheckpointError: it was not fitted.
        """
        run = self.run
        if run is None:
            raise CheckpointError(f"{self.name} has not fitted its winner: train with its champion.yaml as preset.")
        return run.classifier

    @cached_property
    def study(self) -> "optuna.Study":
        """Optuna's study, read from its journal."""
        from kngd_ray.tuning import load_study

        return load_study(self.folder)

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """A pandas frame with a row for each trial: ``trial``, ``state``, the objectives, then the settings."""
        import pandas as pd

        names = self.study.metric_names or []
        return pd.DataFrame([
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                **dict(zip(names, trial.values or [None] * len(names), strict=True)),
                **trial.params,
            }
            for trial in self.study.get_trials(deepcopy=False)
        ])

    def plot(self) -> "Figure":
        """Draw the first objective of each trial, and the best so far."""
        finished = [trial for trial in self.study.get_trials(deepcopy=False) if trial.values]
        name = (self.study.metric_names or ["objective"])[0]
        minimised = self.study.directions[0].name == "MINIMIZE"
        return trial_plot([(t.number, t.values[0]) for t in finished], name, minimised=minimised, title=self.name)

    def __repr__(self) -> str:
        best = self.best
        shown = ", ".join(f"{k} {v:.4f}" for k, v in best["objective"].items()) if best is not None else "no trial"
        return f"SearchResult({self.name!r}: best {shown})"


class EvaluationResult:
    """The figures of a fit on some data.

    Args:
        name: of the fit.
        report: the object that ``kngd-ray evaluate --json`` prints.

    Attributes:
        name: of the fit.
        report: the figures, nested.
    """

    def __init__(self, name: str, report: Mapping[str, Any]) -> None:
        self.name = name
        self.report: dict[str, Any] = dict(report)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures by name: ``id/accuracy``, ``ood/mean/auroc``."""
        return flat_metrics({key: self.report[key] for key in _SETS if key in self.report})

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """A pandas frame with a row for each test set: ``set``, ``accuracy``, ``nll``, ``ece``, ``aurc`` and others."""
        import pandas as pd

        return pd.DataFrame(list(_by_set({}, self.metrics)))

    def plot(self) -> "Figure":
        """Draw the accuracy on each test set."""
        rows = {name: _estimate(figures["accuracy"]) for name, figures in _sets(self.report)}
        return accuracy_plot({self.name: rows}, self.name)

    def __repr__(self) -> str:
        return f"EvaluationResult({self.name!r}: accuracy {self.metrics['id/accuracy']:.3f})"


class ComparisonResult:
    """The runs of an experiment side by side.

    Args:
        report: the object that ``kngd-ray compare --json`` prints.

    Attributes:
        report: groups of runs that were scored on the same thing; of each its rows and their figures.
    """

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report: dict[str, Any] = dict(report)

    @property
    def page(self) -> Path:
        """The HTML page."""
        return Path(self.report["page"])

    @cached_property
    def frame(self) -> "pd.DataFrame":
        """A pandas frame with a row for each group, row and metric.

        ``mean``, ``low`` and ``high`` are over seeds. ``difference``, ``difference_low`` and ``difference_high`` are
        from the group's baseline on the same seeds; ``decided`` says whether it is significant, over all
        rows (Holm).
        """
        import pandas as pd

        return pd.DataFrame([
            {
                "group": group["title"],
                **{key: row[key] for key in ("name", "method", "preset", "run_id", "front")},
                "metric": metric,
                **{key: figure[key] for key in ("mean", "low", "high")},
                **_difference(figure["difference"]),
            }
            for group in self.report["groups"]
            for row in group["rows"]
            for metric, figure in row["figures"].items()
        ])

    def plot(self) -> "Figure":
        """Draw the accuracies of the first group's rows, with their intervals over seeds."""
        group = self.report["groups"][0]
        rows = {
            row["name"]: {
                metric.removesuffix("/accuracy"): _estimate(figure)
                for metric, figure in row["figures"].items()
                if metric.endswith("/accuracy")
            }
            for row in group["rows"]
        }
        return accuracy_plot(rows, group["title"])

    def __repr__(self) -> str:
        count = sum(len(group["rows"]) for group in self.report["groups"])
        return f"ComparisonResult({self.report['experiment']!r}: {count} rows)"


def _read(folder: Path) -> dict[str, Any]:
    """The report that a run keeps; nothing of a KalmanCLIP that was saved, which was tested on nothing.

    Raises:
        CheckpointError: the run did not come to its end, or the file is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        if (folder / ESTIMATOR).is_file():
            return {}
        command = "tune" if (folder / SEARCH).is_file() else "train"
        raise CheckpointError(
            f"{folder.name} has no results yet: continue it with kngd-ray {command} --resume {folder.name}."
        )
    try:
        return dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): delete it, then continue with {option('resume')}."
        ) from error


def _sets(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Figures of a report by test set: ``id``, domains, and their mean where there are several."""
    if "id" in report:
        yield "id", report["id"]
    for name, figures in report.get("ood", {}).items():
        if name != "mean" or len(report["ood"]) > 2:
            yield ("OOD mean" if name == "mean" else name), figures


def _by_set(about: Mapping[str, Any], metrics: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Figures as rows by test set; the mean over domains is left to whoever reads the rows."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        where, _, rest = name.partition("/")
        domain, _, figure = rest.rpartition("/")  # a domain's name may have slashes of its own
        if where == "id" and not domain:
            rows.setdefault("id", {})[figure] = value
        elif where == "ood" and domain not in ("", "mean") and not domain.endswith(_SCALED) and figure not in _BOUNDS:
            rows.setdefault(domain, {})[figure] = value
    for name, figures in rows.items():
        yield {**about, "set": name, **figures}


def _zero_shot(logged: Mapping[str, float]) -> dict[str, float]:
    """Figures of CLIP before the fit."""
    return {k.removeprefix(_ZERO_SHOT): v for k, v in logged.items() if k.startswith(_ZERO_SHOT)}


def _estimate(figure: float | Mapping[str, float | None]) -> tuple[float, float, float]:
    """A mean with the ends of its interval, which are the mean itself for a single seed."""
    if not isinstance(figure, Mapping):
        return figure, figure, figure
    mean, low, high = (figure[key] for key in ("mean", "low", "high"))
    assert mean is not None
    return mean, mean if low is None else low, mean if high is None else high


def _difference(found: Mapping[str, Any] | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys(("difference", "difference_low", "difference_high", "decided"))
    return {
        "difference": found["mean"],
        "difference_low": found["low"],
        "difference_high": found["high"],
        "decided": found["p_holm"] is not None and found["p_holm"] < 1 - LEVEL,
    }
