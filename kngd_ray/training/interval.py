"""How sure a fit is of a probability: its credible interval and its standard deviation.

Both come from the belief N(mu, P) of the weights, through the linearised variance V H P H^T V^T of functions of the
logits, at the posterior temperature tau.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kngd_ray.training.calibration import AnyPredictor
from kngd_ray.training.predict import Prediction, Predictor

_Z = 1.6448536269514722  # standard deviations to either side of a normal's mean that hold 90 %


def probability_interval(
    predictor: AnyPredictor, features: Tensor, prediction: Prediction, tau: float
) -> Tensor | None:
    """The interval that holds 90 % of the posterior at tau of the most probable class's probability.

    tau serves the predicted probabilities and is far below 1, so that the interval is narrow: measured against fits on
    more shots it holds far less than 90 % (docs/priors.md).

    The log-odds u of the class are taken as normal: at the mean of the weights plus and minus 1.64 standard deviations.
    Of a head the variance of u is the linearised one of N(mu, tau P); of a network, whose gradients for each picture
    are dear, it is that of the class's logit over the draws. The interval is widened, where it has to be, to hold the
    predicted probability, which is an average and not a value at the mean.

    Args:
        predictor: of a head or a network.
        features: (m, d) unit image embeddings, or what the network takes.
        prediction: what it predicts of them at tau.
        tau: posterior temperature.

    Returns:
        (m, 2) low and high; None where the posterior has no part in the prediction.
    """
    if predictor.belief is None or tau == 0 or predictor.options.predict == "mean":
        return None
    p = prediction.probabilities.double()
    top = p.argmax(1, keepdim=True)
    best = p.gather(1, top).squeeze(1)
    if isinstance(predictor, Predictor):
        with torch.no_grad():
            logits: Tensor = predictor.head(features)
        chosen = one_hot(top.squeeze(1), logits.shape[1]).to(logits)
        others = logits.masked_fill(chosen.bool(), -torch.inf)
        # d u / d l: 1 for the class itself, and minus the share that each of the others has among them
        cotangent = (chosen - others.softmax(1)).unsqueeze(1)
        u = (logits.gather(1, top).squeeze(1) - others.logsumexp(1)).double()
        sigma = (tau * predictor.variance_along(features, cotangent).squeeze(1)).sqrt().double()
    else:
        u, sigma = torch.logit(best, eps=1e-12), prediction.logit_std.gather(1, top).squeeze(1).double()
    low, high = torch.sigmoid(u - _Z * sigma), torch.sigmoid(u + _Z * sigma)
    return torch.stack([torch.minimum(low, best), torch.maximum(high, best)], 1)


def probability_std(predictor: Predictor, features: Tensor, tau: float) -> Tensor:
    """Posterior standard deviation of each class's probability, linearised at the mean of the weights.

    Where the straight line leaves [0, 1] it is cut off at the most that a probability of that mean can have.

    Args:
        predictor: a head and its belief.
        features: (m, d) unit image embeddings.
        tau: posterior temperature.

    Returns:
        (m, C); zeros without a posterior.
    """
    with torch.no_grad():
        p: Tensor = predictor.head(features).softmax(1)
    if predictor.belief is None or tau == 0:
        return torch.zeros_like(p)
    if (product := predictor.product(features)) is not None:
        spread, B = product
        # row c of diag(p) - p p^T is p_c (e_c - p)
        pB = p @ B.to(p)
        rows = p.square() * (B.diagonal().to(p) - 2 * pB + (pB * p).sum(1, keepdim=True)).clamp_min(0)
        variance = spread.to(p).unsqueeze(1) * rows
    else:
        variance = predictor.variance_along(features, p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1))
    return torch.minimum(tau * variance, p * (1 - p)).sqrt()
