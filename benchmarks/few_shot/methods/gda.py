"""Gaussian discriminant analysis beside the zero-shot logits (Wang et al., arXiv 2402.04087).

alpha is its weight ::

    logits = s z T^T + alpha (z W + b)      W = Q M^T      b = log(1/C) - diag(M Q M^T) / 2

M the class means, Q the inverse of the classes' common covariance by the paper's empirical-Bayes ridge,
``d ((N - 1) cov + tr(cov) I)^-1``. Crops are samples of their own, as in the paper. Without them one shot of a class
has no covariance within it: there cov is that of all shots about their common mean.
"""

from collections.abc import Sequence
from math import log

import optuna
import torch
from torch import Tensor

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings
from kngd_ray.training.batches import Support


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """One Gaussian classifier per case."""
    classifiers = [_gaussian(case.support, len(problem.class_embeddings)) for case in problem.cases]

    def logits(n: int, x: Tensor) -> Tensor:
        W, b = classifiers[n]
        return problem.zero_shot(x) + settings["alpha"] * (x @ W + b)

    return softmax(problem, logits)


def _gaussian(shots: Support, classes: int) -> tuple[Tensor, Tensor]:
    shots = shots.all_views()
    x = shots.features.double()
    counts = torch.bincount(shots.labels, minlength=classes).clamp_min(1).unsqueeze(1)
    means = x.new_zeros(classes, x.shape[1]).index_add_(0, shots.labels, x) / counts
    rest = x - means[shots.labels]
    if not rest.square().sum() > 1e-9 * len(x):
        rest = x - x.mean(0)
    cov = rest.mT.cov()
    ridge = cov.trace() * torch.eye(len(cov), dtype=cov.dtype)
    Q = x.shape[1] * torch.linalg.inv((len(x) - 1) * cov + ridge)
    W = Q @ means.mT
    b = -log(classes) - (means * W.mT).sum(1) / 2
    return W.float(), b.float()


def space(trial: optuna.Trial) -> Settings:
    """The mixing weight."""
    return {"alpha": trial.suggest_float("alpha", 1e-4, 1e2, log=True)}


METHOD = Method("gda", fit, space, {"alpha": 0.1})
