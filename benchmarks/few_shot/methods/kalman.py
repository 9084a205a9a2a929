"""Kalman by presets, fixed or searched as the shipped search file does; tau comes from folds over a case's shots."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.problem import Case, Outcome, Problem, Watch
from kngd_ray.config import Config, load_config, override, to_yaml
from kngd_ray.errors import FilterError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.calibration import (
    Calibration,
    calibration_of,
    calibration_tasks,
    decided_task,
    predictor_of,
)
from kngd_ray.training.fit import FitTask, StepRecord, begin, fit
from kngd_ray.training.method import Method as Optimiser
from kngd_ray.training.predict import PosteriorOptions, Predictor
from kngd_ray.tuning import fit_together, plain_space
from kngd_ray.tuning.file import load_search


def method(name: str, preset: str, overrides: Sequence[str] = ()) -> Method:
    """A preset as a method.

    Args:
        name: of the method.
        preset: shipped, or a file.
        overrides: over it.

    Returns:
        The method.
    """
    config = load_config(overrides=["method=kalman", f"preset={preset}", *overrides])
    return Method(name, lambda problem, settings: _fitted(problem, config), recipe=_recipe(config))


def searched(name: str, file: Path) -> Method:
    """The space of a search file as a method, by the objective ``log_posterior``.

    Args:
        name: of the method.
        file: its search file.

    Returns:
        The method.
    """
    search = load_search(file, [])
    config, space = search.config, search.space
    return Method(
        name,
        lambda problem, settings: _fitted(problem, override(config, settings)),
        space.suggest,
        space.point(config),
        space.log_prior,
        recipe=_recipe(config) + repr(plain_space(space)),
    )


def _fitted(problem: Problem, config: Config) -> list[Outcome]:
    tasks = [problem.task(case, config.fit_options) for case in problem.cases]
    found = calibrations(tasks, config.posterior)
    return [
        _outcome(problem, case, task, config.posterior, chosen)
        for case, task, chosen in zip(problem.cases, tasks, found, strict=True)
    ]


def calibrations(tasks: Sequence[FitTask], posterior: PosteriorOptions) -> list[Calibration]:
    """What :func:`~kngd_ray.training.calibration.calibrate` finds for each, the folds of all fitted together."""
    parts = [calibration_tasks(decided_task(task), posterior.folds) for task in tasks]
    fits = iter(fit_together([part for of_task in parts for part, _ in of_task]))
    found = []
    for of_task in parts:
        held = [(next(fits), shots) for _, shots in of_task]
        sound = [(one.method, shots) for one, shots in held if not isinstance(one, FilterError)]
        found.append(calibration_of(sound, posterior) if sound else Calibration(posterior.unasked, 1.0))
    return found


def _outcome(problem: Problem, case: Case, task: FitTask, posterior: PosteriorOptions, chosen: Calibration) -> Outcome:
    watch = Watch([case], task.sampler.steps, every=task.sampler.steps)
    taken: list[StepRecord] = []

    def look(step: int, optimiser: Optimiser) -> None:
        if watch.due(step):
            with torch.no_grad():
                watch.see(step, optimiser.head(watch.features[0]).unsqueeze(0))

    failed = None
    try:
        look(0, begin(task, SingleProcess()))
        done = fit(task, on_step=taken.append, on_checkpoint=look, checkpoint_every=1)
    except FilterError as error:  # it predicts as its prior does
        done, failed = begin(task, SingleProcess()), str(error)
    predictor = predictor_of(done, posterior)
    assert isinstance(predictor, Predictor)
    found = {name: _predicted(predictor, test.features, chosen) for name, test in case.tests.items()}
    (curve,) = watch.curves(median(record.milliseconds for record in taken) / 1e3) if taken else (None,)
    return Outcome(
        {name: p for name, (p, _) in found.items()},
        {name: variance for name, (_, variance) in found.items()},
        curve,
        {
            "tau": chosen.tau,
            "sharpening": chosen.sharpening,
            "held_out_nll": chosen.held_out_nll,
            "failed": failed,
        },
    )


def _predicted(predictor: Predictor, features: Tensor, chosen: Calibration) -> tuple[Tensor, Tensor]:
    """Probabilities as calibrated, and the variance of the logits at tau = 1."""
    if predictor.options.predict != "linearised":
        spread = predictor.predict(features, 1.0).logit_std.square()
    else:
        spread = predictor.logit_variance(features)
    return chosen.predict(predictor, features).probabilities, spread.mean(1)


def _recipe(config: Config) -> str:
    """What decides the figures; a setting that came later and is off leaves older rows as they are."""
    posterior = to_yaml(config.posterior).replace("sharpening_spread: 0.0\n", "")
    return to_yaml(config.fit_options) + posterior


KF_CLIP = method("kf_clip", "kf_clip")
LOKO = method("loko", "loko")
DIAGONAL = method("kalman_diagonal", "kalman_diagonal")
OURS = method("ours", "kalman")
CHAMPION = searched("champion", Path(__file__).parents[3] / "tune_configs" / "noise_priors.yaml")
