"""AdamW, its probabilities sharpened as those of the default preset are: by shots that fits have not seen."""

import torch

from benchmarks.few_shot.methods import adamw
from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.problem import Case, Outcome, Problem, Settings
from kngd_ray.config import load_config
from kngd_ray.training.calibration import fit_sharpening, sharpened
from kngd_ray.training.evaluation import ID
from kngd_ray.training.folds import single

_FOLDS = 4
_SPREAD = load_config(overrides=["method=kalman"]).posterior.sharpening_spread


def _method(name: str, of: Method) -> Method:
    """A method with the settings of another one, sharpened."""

    def fitted(problem: Problem, settings: Settings) -> list[Outcome]:
        found = []
        for case, outcome, factor in zip(
            problem.cases, of.fit(problem, settings), _factors(problem, settings, of), strict=True
        ):
            probabilities = {name: sharpened(p, factor) for name, p in outcome.probabilities.items()}
            assert set(probabilities) == set(case.tests)
            found.append(Outcome(probabilities, outcome.variance, outcome.curve, {"sharpening": factor}))
        return found

    searched_as, usual = (None, {}) if of.space is None else (of.name, of.usual)
    recipe = f"{of.recipe} sharpened {_SPREAD} by {_FOLDS} folds"
    return Method(name, fitted, usual=usual, searched_as=searched_as, recipe=recipe)


def _factors(problem: Problem, settings: Settings, of: Method) -> list[float]:
    """The sharpening of each case; single shots are asked of zero-shot CLIP, as the default preset does."""
    if all(single(case.support.labels) for case in problem.cases):
        return [
            fit_sharpening(problem.zero_shot(case.support.features).softmax(1), case.support.labels, _SPREAD)
            for case in problem.cases
        ]
    folds = problem.folds(_FOLDS)
    held = list(zip(folds.cases, of.fit(folds, settings), strict=True))
    return [_factor(held[n : n + _FOLDS]) for n in range(0, len(held), _FOLDS)]


def _factor(held: list[tuple[Case, Outcome]]) -> float:
    probabilities = torch.cat([outcome.probabilities[ID] for _, outcome in held])
    return fit_sharpening(probabilities, torch.cat([case.tests[ID].labels for case, _ in held]), _SPREAD)


CLASS_RESIDUAL = _method("adamw_sharpened", adamw.CLASS_RESIDUAL)
FIXED = _method("adamw_fixed_sharpened", adamw.FIXED)
