"""Laplace (laplace-torch) around AdamW's class residual.

Kronecker-factored GGN, the prior's precision by marginal likelihood on the shots, AdamW's settings those of its search.
The predictive is laplace-torch's ``glm`` with the probit link. Its variance of the logits goes through a Jacobian of
C x (C d) for each picture; of a linear layer it is the closed form below, which is the same number.
"""

import warnings
from collections.abc import Sequence
from math import pi

import torch
from laplace import Laplace
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.few_shot.methods import adamw
from benchmarks.few_shot.methods._base import Method
from benchmarks.few_shot.probe import Probe
from benchmarks.few_shot.problem import BATCH_SIZE, Case, Outcome, Problem, Settings, Watch
from benchmarks.few_shot.stack import Batches, descend, timed
from benchmarks.few_shot.stack import adamw as optimiser


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """AdamW on all cases as one stack, then a Laplace approximation of each."""
    options = adamw.options_of(settings)
    stack = adamw.stack_of(problem, problem.cases, options)
    watch = Watch(problem.cases, Batches(problem.cases, options.epochs).steps) if problem.watched else None
    o = options.optimizer
    descend(stack, problem.cases, options.epochs, optimiser(stack, o.lr, o.weight_decay), watch=watch)

    def run(cases: Sequence[Case], epochs: int, at_most: int) -> list[float]:
        one = adamw.stack_of(problem, cases, options)
        return descend(one, cases, epochs, optimiser(one, o.lr, o.weight_decay), at_most=at_most)

    curves = None if watch is None else watch.curves(timed(problem.cases, run))
    (deltas,) = stack.parameters.values()
    outcomes = []
    for n, (case, delta) in enumerate(zip(problem.cases, deltas.detach(), strict=True)):
        probe = Probe(problem.class_embeddings, problem.logit_scale, delta)
        approximation = approximate(probe, case)
        probabilities, variances = {}, {}
        for name, test in case.tests.items():
            variance = logit_variance(approximation, test.features)
            with torch.no_grad():
                probabilities[name] = probit(probe(test.features), variance)
            variances[name] = variance.mean(1)
        precision = float(approximation.prior_precision.mean())
        curve = None if curves is None else curves[n]
        outcomes.append(Outcome(probabilities, variances, curve, {"prior_precision": precision}))
    return outcomes


def approximate(probe: Probe, case: Case) -> Laplace:
    """The Laplace approximation of a trained probe on its shots."""
    shots = DataLoader(TensorDataset(case.support.features, case.support.labels), BATCH_SIZE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="By default `link_approx`")
        found = Laplace(probe, "classification", subset_of_weights="all", hessian_structure="kron")
        found.fit(shots)
        found.optimize_prior_precision(
            pred_type="glm", method="marglik", prior_structure="scalar", link_approx="probit"
        )
    return found


def probit(logits: Tensor, variance: Tensor) -> Tensor:
    """(m, C) probabilities by laplace-torch's probit link, which moderates each logit by its own variance."""
    return (logits / (1 + pi / 8 * variance).sqrt()).softmax(1)


def logit_variance(approximation: Laplace, features: Tensor) -> Tensor:
    """(m, C) variance of the logits of a probe.

    The posterior precision is (H_factor) B (x) A + delta with B (C, C), A (d, d): in their eigenvectors U, V ::

        var_c = sum_i U_ci^2 sum_j (z V)_j^2 / (b_i a_j + delta)
    """
    precision = approximation.posterior_precision
    ((b, a),), ((U, V),) = precision.eigenvalues, precision.eigenvectors
    with torch.no_grad():
        inverse = 1 / (torch.outer(b, a) + precision.deltas.reshape(()))
        return (features @ V).square() @ inverse.mT @ U.square().mT


METHOD = Method("laplace", fit, searched_as="adamw_class_residual")
