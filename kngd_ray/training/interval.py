"""How certain a fit is of a probability: its credible interval and its standard deviation.

Both come from the belief N(mu, P) of the weights, through the linearised variance V H P H^T V^T of functions of the
logits. tau, the posterior temperature that serves the predicted probabilities, makes them far too narrow: an interval
that it calls 90 % holds a tenth of the probabilities after more shots. So they have a scale of their own: P says which
pictures are more certain than others, and how far logits move when shots are added is known from other tasks. It is
much the same for all of them (``benchmarks/interval_coverage.py``).
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kngd_ray.training.calibration import AnyPredictor
from kngd_ray.training.novelty import Novelty
from kngd_ray.training.predict import Prediction, Predictor

_Z = 1.6448536269514722  # standard deviations to either side of a normal's mean that hold 90 %
# Nats, of a picture that the fit is as sure of as of the median shot, held out. Four times the shots moved the log-odds
# of 90 % of pictures of the domain trained on by less than 1.64 times this, the mean over 57 tasks of 1 to 8 shots. It
# was chosen for intervals around the log-odds at the mean, and left as it is for those around ``_centre``.
_TYPICAL_STD = 2.0
_NODES = 32  # of Gauss-Hermite quadrature over one normal
_HALVINGS = 40


def interval_scale(novelty: Novelty | None) -> float | None:
    """The factor of P at which intervals hold what they say.

    Args:
        novelty: the variances of held-out shots' logits at P.

    Returns:
        The factor; None where nothing was held out, or the fit is certain of everything.
    """
    if novelty is None or not novelty.median:
        return None
    return _TYPICAL_STD**2 / novelty.median


def probability_interval(
    predictor: AnyPredictor, features: Tensor, prediction: Prediction, scale: float | None, sharpening: float = 1.0
) -> Tensor | None:
    """The interval in which the most probable class's probability stays in 90 % of pictures if shots are added.

    More shots move a calibrated probability up and down, and on average not at all: today's is the mean of what it can
    become (the law of total expectation). Near 1 there is more room below, so that mostly it rises a little, and seldom
    falls far. So the log-odds are taken as normal with their linearised variance under N(mu, scale P), around that
    value at which probabilities average to the predicted one, and the interval reaches 1.64 standard deviations to
    either side. It is widened, where it has to be, to hold the predicted probability.

    Args:
        predictor: of a head or a network.
        features: (m, d) unit image embeddings, or what the network takes.
        prediction: what it predicts of them.
        scale: of :func:`interval_scale`.
        sharpening: what predictions multiply the logits by, and so their deviations.

    Returns:
        (m, 2) low and high; None where there is no posterior or no scale, where the posterior has no part in the
        prediction, and for networks that predict by draws, whose gradients for each picture are expensive.
    """
    if scale is None or not predictor.linearises:
        return None
    p = prediction.probabilities.double()
    top = p.argmax(1, keepdim=True)
    best = p.gather(1, top).squeeze(1)
    logits = sharpening * predictor.mean_logits(features)
    chosen = one_hot(top.squeeze(1), logits.shape[1]).to(logits)
    others = logits.masked_fill(chosen.bool(), -torch.inf)
    # d u / d l: 1 for the class itself, and minus the share that each of the others has among them
    cotangent = (chosen - others.softmax(1)).unsqueeze(1)
    variance = predictor.variance_along(features, cotangent).squeeze(1).to(p)
    sigma = sharpening * (scale * variance).sqrt()
    centre = _centre(best, p.scatter(1, top, 0.0).sum(1), sigma)  # 1 - best would be rounded to 0 where it is small
    low, high = torch.sigmoid(centre - _Z * sigma), torch.sigmoid(centre + _Z * sigma)
    return torch.stack([torch.minimum(low, best), torch.maximum(high, best)], 1)


def _centre(p: Tensor, rest: Tensor, sigma: Tensor) -> Tensor:
    """The mean m of normal log-odds whose probabilities average to p, by bisection.

    Args:
        p: (n,) probabilities, float64.
        rest: (n,) 1 - p.
        sigma: (n,) standard deviations of the log-odds.

    Returns:
        (n,) of E[sigmoid(m + sigma z)] = p, z a standard normal.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    z = torch.from_numpy(nodes).to(p) * sigma.unsqueeze(1)
    weight = torch.from_numpy(weights / weights.sum()).to(p)
    smaller = torch.minimum(p, rest).clamp_min(torch.finfo(torch.float32).tiny)
    # |m| is at least the log-odds themselves; E[sigmoid(-m - sigma z)] <= exp(-m + sigma^2 / 2) bounds it from above
    low = torch.log1p(-smaller) - smaller.log()
    high = low + math.log(2) + sigma.square() / 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = torch.sigmoid(-middle.unsqueeze(1) - z) @ weight > smaller  # then m is larger still
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(p < rest, -low, low)


def probability_std(predictor: Predictor, features: Tensor, scale: float | None, sharpening: float = 1.0) -> Tensor:
    """Posterior standard deviation of each class's probability, linearised at the mean of the weights.

    Where the straight line leaves [0, 1], it is cut off at the largest value possible for a probability of that mean.

    Args:
        predictor: a head and its belief.
        features: (m, d) unit image embeddings.
        scale: of :func:`interval_scale`.
        sharpening: as of :func:`probability_interval`.

    Returns:
        (m, C); zeros without a posterior or a scale.
    """
    with torch.no_grad():
        p: Tensor = (sharpening * predictor.head(features)).softmax(1)
    if predictor.belief is None or scale is None:
        return torch.zeros_like(p)
    if (product := predictor.product(features)) is not None:
        spread, B = product
        # row c of diag(p) - p p^T is p_c (e_c - p); where p_c is nearly 1 its terms cancel, in float32 to zero
        q, B = p.double(), B.to(p.device, torch.float64)
        qB = q @ B
        rows = q.square() * (B.diagonal() - 2 * qB + (qB * q).sum(1, keepdim=True)).clamp_min(0)
        variance = (spread.to(q).unsqueeze(1) * rows).to(p)
    else:
        variance = predictor.variance_along(features, p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1))
    return torch.minimum(sharpening**2 * scale * variance, p * (1 - p)).sqrt()
