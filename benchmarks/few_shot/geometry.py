"""The geometry of real CLIP's embeddings, given to the features of another model.

In OpenAI's CLIPs pictures lie in a narrow cone far from the texts, every cosine has a common offset, and the logit
scale is 100. With a = .65, rho = sqrt(1 - a^2), kappa = .2 / rho, s the model's own scale and b = s / (100 a) ::

    picture x (d,) -> [a x, rho, 0]                            (d + 2,)
    text    t (d,) -> [b t, kappa, sqrt(1 - b^2 - kappa^2)]    (d + 2,)        logit scale 100

Lengths stay 1. A zero-shot logit s x.t becomes s x.t + 20: all move by one constant, and no probability moves at all. A
method that gains or loses here answers to the geometry, not to the task.
"""

from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from benchmarks.few_shot.problem import Problem
from kngd_ray.training.batches import Support

SCALE = 100.0
SPREAD = 0.65  # length of a picture beside the cone's axis
OFFSET = 0.2  # cosine that every picture has with every text
_RHO = sqrt(1 - SPREAD**2)
_KAPPA = OFFSET / _RHO


def to_clip(problem: Problem) -> Problem:
    """The same problem in CLIP's geometry.

    Args:
        problem: features (m, d), class embeddings (C, d), of unit length, a logit scale of at most 62.

    Returns:
        A problem with features (m, d + 2) and class embeddings (C, d + 2).
    """
    b = problem.logit_scale / (SCALE * SPREAD)
    if b**2 + _KAPPA**2 > 1:
        raise ValueError(f"a logit scale of {problem.logit_scale:.3g} leaves no room for the offset: at most 62")
    texts = _beside(b * problem.class_embeddings, _KAPPA, sqrt(1 - b**2 - _KAPPA**2))
    cases = [
        replace(
            case,
            support=_pictures(case.support),
            tests={name: _pictures(test) for name, test in case.tests.items()},
        )
        for case in problem.cases
    ]
    return replace(problem, cases=cases, class_embeddings=texts, logit_scale=SCALE)


def _pictures(shots: Support) -> Support:
    crops = None if shots.crops is None else _beside(SPREAD * shots.crops, _RHO, 0.0)
    return Support(_beside(SPREAD * shots.features, _RHO, 0.0), shots.labels, crops)


def _beside(rows: Tensor, *values: float) -> Tensor:
    """Rows (..., d) with constants beside them, (..., d + 2)."""
    return torch.cat([rows, rows.new_tensor(values).expand(*rows.shape[:-1], -1)], -1)
