"""ProKeR: kernel ridge regression whose penalty is the distance from zero-shot (Bendou et al., arXiv 2501.11175).

In closed form, K the kernel of the shots, k(x) that of a picture with them, Y their labels one-hot, F0 the cosines of
the shots with the texts ::

    f(x) = x T^T + k(x) (K / lambda + I)^-1 (Y - F0)      k(x, y) = exp(-beta (1 - x.y))

as the authors' code has it. They need only its argmax, and f is in units of a cosine: the probabilities here are those
of s f, s the logit scale. The authors search beta and lambda by accuracy on validation pictures; here both are searched
on the shots as other methods' settings are, in the authors' ranges and beyond.
"""

from collections.abc import Sequence

import optuna
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Outcome, Problem, Settings, averaged
from kngd_ray.training.batches import Support


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """One solution per case."""
    texts, beta = problem.class_embeddings, settings["beta"]
    found = [solve(case.support, texts, beta, settings["lambda"]) for case in problem.cases]

    def logits(n: int, x: Tensor) -> Tensor:
        near = kernel(x, averaged(problem.cases[n].support), beta)
        return problem.logit_scale * (x @ texts.mT + near @ found[n])

    return softmax(problem, logits)


def solve(shots: Support, texts: Tensor, beta: float, ridge: float) -> Tensor:
    """Coefficients of the shots.

    Args:
        shots: N of them.
        texts: (C, d) class embeddings.
        beta: sharpness of the kernel.
        ridge: lambda, larger for a larger step away from zero-shot.

    Returns:
        (N, C).
    """
    z = averaged(shots).double()
    system = kernel(z, z, beta) / ridge + torch.eye(len(z), dtype=z.dtype)
    rest = one_hot(shots.labels, len(texts)).to(z) - z @ texts.to(z).mT
    return torch.cholesky_solve(rest, torch.linalg.cholesky(system)).float()


def kernel(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """(m, N) likeness of x (m, d) and y (N, d)."""
    return (beta * (x @ y.mT - 1)).exp()


def space(trial: optuna.Trial) -> Settings:
    """Sharpness and ridge."""
    return {
        "beta": trial.suggest_float("beta", 0.3, 30.0, log=True),
        "lambda": trial.suggest_float("lambda", 1e-3, 3.0, log=True),
    }


METHOD = Method("proker", fit, space, {"beta": 3.0, "lambda": 0.05})
