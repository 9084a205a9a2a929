"""``kngd-ray ensemble``: score weights between the pretrained and the trained model, and keep one of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from kngd_ray._option import option
from kngd_ray._run_layout import CONFIG
from kngd_ray.config import parse, parse_override
from kngd_ray.console import Display, stacked
from kngd_ray.errors import UsageError
from kngd_ray.experiment import run_folder
from kngd_ray.experiment.aggregate import over_seeds
from kngd_ray.experiment.backend import HERE, Backend
from kngd_ray.experiment.learned import check_names, tell_changes, untested
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.tracking import ensemble_curve
from kngd_ray.training.checkpoint import Checkpoint
from kngd_ray.training.evaluation import evaluate
from kngd_ray.training.options import FitOptions
from kngd_ray.training.restoring import open_fit, restore_predictor
from kngd_ray.training.resumable import check_scored
from kngd_ray.training.settled import CALIBRATION, read_settled, save_settled

FIGURE = "ensemble.png"
_MEAN = "OOD mean"


def ensemble(
    target: str,
    overrides: Sequence[str],
    points: int,
    storage_path: str,
    display: Display,
    backend: Backend = HERE,
) -> dict[str, Any]:
    """Score the weights theta_0 + alpha (theta - theta_0) of a run over alpha, and keep one alpha if one is given.

    The scores are those of the test sets, so the curve is there to be looked at: an alpha chosen by it would be
    chosen on the test. Whoever keeps one names it beforehand (0.5 is common), or has a validation set of their own.

    tau, sharpening and the scaling temperature stay as they were chosen for the fit. So at alpha = 0 the pretrained
    model is sharpened as the fit is.

    Args:
        target: run, all of whose seeds are taken; or a fit or checkpoint.
        overrides: ``alpha=0.5`` to keep that one, and settings of model and trainer over the run's.
        points: values of alpha from 0 to 1 that are scored, beside the one that is kept.
        storage_path: where runs live.
        display: where the curve is shown.
        backend: encodes.

    Returns:
        ``fits``, their ``alpha`` from now on (None where they differ), whether it was ``kept`` now, the ``curve`` (for
        each alpha the figures of ``id`` and ``ood``, over seeds as ``train`` reports them) and the file of its
        ``figure``.

    Raises:
        UsageError: an alpha outside [0, 1], or of a fit that has not ended, another setting than those, or weights that
            cannot be averaged.
    """
    if points < 2:
        raise UsageError(f"{option('points')} is {points}; a curve over alpha needs at least 2, for alpha 0 and 1.")
    alpha, settings = _alpha(overrides)
    place = run_folder.locate(target, storage_path)
    run = next(folder for folder in (place, *place.parents) if (folder / CONFIG).is_file())
    config = run_folder.read_config(run, settings)
    folders = [place] if place != run else [run_folder.fit_of(run, config.method, seed) for seed in config.seeds]
    with nullcontext() if alpha is None else run_folder.locked(run):
        fits = [open_fit(folder) for folder in folders]
        if alpha is not None and not all((folder / CALIBRATION).is_file() for _, folder in fits):
            raise UsageError(
                f"{target} is of a fit that has not ended: finish its run with {option('resume')}, then keep an alpha."
            )
        config = replace(config, seeds=tuple(checkpoint.manifest["seed"] for checkpoint, _ in fits))
        task = open_task(config, fits[0][0].manifest)
        for checkpoint, _ in fits:
            check_names(task, checkpoint.manifest, own=True)
        task = untested(task, [checkpoint.manifest for checkpoint, _ in fits], display.say, as_it_was=True)
        for note in task.notes:
            display.say(note)
        with backend.session(config.trainer), display.pictures("encoding") as progress:
            prepared = prepare(task, backend, progress)
        told: list[str] = []
        for checkpoint, _ in fits:
            check_scored(checkpoint.manifest, prepared.identity, checkpoint.folder)
            tell_changes(prepared, checkpoint.manifest, told.append)
        for note in dict.fromkeys(told):  # of tests, the same for all seeds
            display.say(note)
        alphas = sorted({round(n / (points - 1), 6) for n in range(points)} | ({alpha} if alpha is not None else set()))
        reports = _score(fits, alphas, prepared, display)
        if alpha is not None:
            for _, folder in fits:
                save_settled(folder, replace(read_settled(folder), alpha=alpha))
    in_use = {_in_use(*fit) for fit in fits}
    used = min(in_use) if len(in_use) == 1 else None  # the fits of a run may have been given different ones
    figure = (fits[0][1] if len(fits) == 1 else run) / FIGURE
    ensemble_curve(alphas, _lines(reports), figure, f"{run.name}, weight ensemble", used)
    curve = [over_seeds(per_seed, one_support=prepared.one_support) for per_seed in reports]
    _show(run.name, alphas, curve, used, display)
    display.say(f"curve over alpha: {figure}")
    if alpha is not None:
        display.say(f"from now on predict, evaluate and export use alpha={alpha:g}")
        logged = {_of_the_run(checkpoint) for checkpoint, _ in fits}
        if config.tracking.enabled and logged != {alpha}:
            before = " and ".join(f"{a:g}" for a in sorted(logged))
            display.say(
                f"MLflow keeps what the run logged, figures and model of alpha={before}, and so does kngd-ray compare: "
                f"train with tune.alpha={alpha:g} to have those of the average there"
            )
    else:
        now = " and ".join(f"{a:g}" for a in sorted(in_use))
        display.say(
            f"predict, evaluate and export use alpha={now}; kngd-ray ensemble {target} alpha=0.5 sets another. "
            "The curve is measured on test sets: do not choose alpha from it"
        )
    return {
        "fits": [str(folder) for _, folder in fits],
        "alpha": used,
        "kept": alpha is not None,
        "curve": [{"alpha": a, **figures} for a, figures in zip(alphas, curve, strict=True)],
        "figure": str(figure),
    }


def _alpha(overrides: Sequence[str]) -> tuple[float | None, list[str]]:
    """The alpha to keep, and the settings that override the run's.

    Raises:
        UsageError: it is no number in [0, 1], or a setting would change what the run is.
    """
    alpha, settings = None, []
    for text in overrides:
        key, value = parse_override(text)
        if key == "alpha":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise UsageError(f"alpha is {value}; it must lie in [0, 1], from pretrained to trained.")
            alpha = float(value)
        elif key.startswith(("model.", "trainer.")) or key == "data.cache_dir":
            run_folder.check_place(key)
            settings.append(text)
        else:
            raise UsageError(
                f"ensemble takes its data and settings from the run: leave out {key}, only alpha and settings of "
                "model and trainer can be given."
            )
    return alpha, settings


def _in_use(checkpoint: Checkpoint, folder: Path) -> float:
    """The alpha that a fit predicts at."""
    kept = read_settled(folder).alpha
    return _of_the_run(checkpoint) if kept is None else kept


def _of_the_run(checkpoint: Checkpoint) -> float:
    """The alpha that a fit was tested at, and that its model in MLflow has."""
    return parse(FitOptions, checkpoint.manifest["options"]).tune.alpha


def _score(
    fits: Sequence[tuple[Checkpoint, Path]], alphas: Sequence[float], prepared: TaskData, display: Display
) -> list[list[dict[str, Any]]]:
    """Figures of each alpha and fit."""
    sets = []
    for checkpoint, folder in fits:
        tune = parse(FitOptions, checkpoint.manifest["options"]).tune
        sets.append((checkpoint, read_settled(folder), prepared.tests(checkpoint.manifest["seed"], tune)))
    pictures = sum(len(test) for _, _, tests in sets for test in tests.values())
    reports: list[list[dict[str, Any]]] = []
    with display.pictures(f"classifying at {len(alphas)} values of alpha") as progress:
        for number, alpha in enumerate(alphas, start=1):
            reports.append([])
            for checkpoint, settled, tests in sets:
                # Other weights are another network, which has to see every picture again.
                predictor = restore_predictor(
                    checkpoint,
                    prepared.evaluator,
                    settled.posterior,
                    alpha=alpha,
                    class_embeddings=prepared.class_embeddings,
                )
                reports[-1].append(evaluate(predictor, tests, settled.calibration).report())
            progress(number * pictures, len(alphas) * pictures)
    return reports


def _lines(reports: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[list[float]]]:
    """Accuracy at each alpha of each fit, in distribution and on average out of it."""
    lines = {"ID": [[report["id"]["accuracy"] for report in fits] for fits in reports]}
    if reports[0][0]["ood"]:
        lines[_MEAN] = [[report["ood"]["mean"]["accuracy"] for report in fits] for fits in reports]
    return lines


def _show(
    name: str, alphas: Sequence[float], curve: Sequence[dict[str, Any]], used: float | None, display: Display
) -> None:
    domains = list(curve[0]["ood"])
    if len(domains) == 2:  # the mean of one
        domains = domains[1:]
    display.out.print(f"{name}: accuracy %, from pretrained (alpha 0) to trained (1)", markup=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ["alpha", "ID", *(_MEAN if domain == "mean" else domain for domain in domains)]
    for column in columns:
        table.add_column(escape(column), justify="right", no_wrap=True)
    for alpha, figures in zip(alphas, curve, strict=True):
        scores = [figures["id"], *(figures["ood"][domain] for domain in domains)]
        mark = "* " if alpha == used else ""
        table.add_row(f"{mark}{alpha:g}", *(stacked(figure["accuracy"], 100) for figure in scores))
    display.out.print(table)
    if used in alphas:
        display.out.print("* in use", markup=False)
