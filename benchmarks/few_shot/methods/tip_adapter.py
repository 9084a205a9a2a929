"""Tip-Adapter without training (Zhang et al., arXiv 2207.09519): a cache of the shots beside the zero-shot logits.

::

logits = s z T^T + alpha exp(-beta (1 - z K^T)) V        K the shots' features, V their one-hot labels
"""

from collections.abc import Sequence

import optuna
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings, averaged


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """The shots are the fit."""
    classes = len(problem.class_embeddings)

    def logits(n: int, x: Tensor) -> Tensor:
        shots = problem.cases[n].support
        near = cached(x, averaged(shots), one_hot(shots.labels, classes).to(x), settings["beta"])
        return problem.zero_shot(x) + settings["alpha"] * near

    return softmax(problem, logits)


def cached(x: Tensor, keys: Tensor, values: Tensor, beta: float) -> Tensor:
    """What the cache says of features.

    Args:
        x: (m, d) features.
        keys: (N, d).
        values: (N, C).
        beta: sharpness.

    Returns:
        (m, C).
    """
    return (beta * (x @ keys.mT - 1)).exp() @ values


def space(trial: optuna.Trial) -> Settings:
    """Weight and sharpness of the cache."""
    return {
        "alpha": trial.suggest_float("alpha", 1e-2, 1e3, log=True),
        "beta": trial.suggest_float("beta", 0.3, 100.0, log=True),
    }


METHOD = Method("tip_adapter", fit, space, {"alpha": 1.0, "beta": 5.5})
