"""Logistic regression on the features (scikit-learn), without the class texts."""

import warnings
from collections.abc import Sequence

import optuna
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """One regression per case."""
    classes = len(problem.class_embeddings)
    probes = []
    for case in problem.cases:
        probe = LogisticRegression(C=settings["C"], max_iter=settings["max_iter"])
        # a setting under which it does not converge is judged as it is
        with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="The number of unique classes")
            shots = case.support.all_views()
            probes.append(probe.fit(shots.features.double().numpy(), shots.labels.numpy()))

    def logits(n: int, x: Tensor) -> Tensor:
        found = torch.full((len(x), classes), float("-inf"), dtype=torch.float64)
        found[:, probes[n].classes_] = torch.from_numpy(probes[n].predict_log_proba(x.double().numpy()))
        return found.float()

    return softmax(problem, logits)


def space(trial: optuna.Trial) -> Settings:
    """The inverse of the penalty; features have length 1, so it is large."""
    return {"C": trial.suggest_float("C", 1e-2, 1e4, log=True), "max_iter": 300}


METHOD = Method("linear_probe", fit, space, {"C": 1.0})
