"""Settings of a method, by the NLL that cross-validation gives to the training shots, and by their own prior."""

from math import isfinite
from time import perf_counter
from typing import Any

import optuna
import torch
from torch.nn.functional import nll_loss

from benchmarks.few_shot.methods import Method
from benchmarks.few_shot.problem import Problem
from kngd_ray.training.evaluation import ID

FOLDS = 3
_WORST = 1e6
_MIN_P = 1e-12


def search(method: Method, problem: Problem, trials: int) -> dict[str, Any]:
    """Search the settings of a method.

    Args:
        method: one that is searched.
        problem: whose support sets decide together; two shots a class or more.
        trials: settings tried, the usual one first.

    Returns:
        ``settings``, their ``nll`` (less the log-prior per shot, where there is one), the ``seconds`` it took, and all
        ``trials``.
    """
    assert method.space is not None
    space, folds = method.space, problem.folds(FOLDS)
    held_out = sum(len(case.tests[ID].labels) for case in folds.cases)
    start = perf_counter()

    def objective(trial: optuna.Trial) -> float:
        settings = space(trial)
        return held_out_nll(method, folds, settings) - method.log_prior(settings) / held_out

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.enqueue_trial(dict(method.usual))
    study.optimize(objective, n_trials=trials)
    best = study.best_trial
    return {
        "settings": dict(space(optuna.trial.FixedTrial(best.params))),
        "nll": best.value,
        "seconds": round(perf_counter() - start, 1),
        "trials": [{**trial.params, "nll": trial.value} for trial in study.trials],
    }


def held_out_nll(method: Method, folds: Problem, settings: Any) -> float:
    """Mean NLL of the shots, each predicted by a fit that has not seen it.

    Args:
        method: what is fitted.
        folds: cases whose test set is their held-out shots.
        settings: of the method.

    Returns:
        Nats per shot; a large number where a fit did not end in finite ones.
    """
    outcomes = method.fit(folds, settings)
    p = torch.cat([outcome.probabilities[ID] for outcome in outcomes]).double()
    labels = torch.cat([case.tests[ID].labels for case in folds.cases])
    nll = float(nll_loss(p.clamp_min(_MIN_P).log(), labels))
    return nll if isfinite(nll) else _WORST
