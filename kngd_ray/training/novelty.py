"""How sure a fit is of one picture: an interval of its probability, and how unlike the shots the picture is.

Both come from the belief N(mu, P) of the weights alone, through the linearised variance V H P H^T V^T of functions of
the logits. The interval is that of the log-odds of the predicted class, at the posterior temperature tau. Likeness
needs no tau: it is the rank of a picture's variance among those of the training shots, each taken by a fit that has not
seen its fold. Such fits have seen less than the one that predicts, and are less sure of everything; a few fits that
lack a single shot say by how much.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kngd_ray.errors import CheckpointError, FilterError
from kngd_ray.sharding import covariance_bytes
from kngd_ray.training.batches import Shots
from kngd_ray.training.calibration import (
    AnyPredictor,
    Calibration,
    calibrate,
    calibration_of,
    decided_task,
    held_out_tasks,
)
from kngd_ray.training.fit import FitTask, fit
from kngd_ray.training.folds import fold_of, single
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method
from kngd_ray.training.predict import PosteriorOptions, Prediction, Predictor
from kngd_ray.training.together import fit_together, shape_of

CREDIBLE = 0.9
_Z = 1.6448536269514722  # standard deviations to either side of a normal's mean that hold 90 %
_LEFT_OUT = 8  # shots of which each is left out of a fit of its own
_TOGETHER = 1 << 28  # bytes of covariances that advance together
_KEPT = 512  # quantiles: more shots tell no more
_DIGITS = 6


@dataclass(frozen=True)
class Novelty:
    """What the variance of a picture's logits is measured by.

    Attributes:
        quantiles: variances of held-out training shots at tau = 1, ascending; of many, evenly spaced ones.
    """

    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.quantiles or not all(isfinite(q) and q >= 0 for q in self.quantiles):
            raise CheckpointError("the quantiles of the shots' variance are damaged.")

    @classmethod
    def of(cls, variance: Tensor) -> "Novelty | None":
        """From the shots.

        Args:
            variance: (N,) of held-out shots.

        Returns:
            Their quantiles; None where there is no variance to tell by.
        """
        ordered = variance.double().cpu().sort().values
        if not len(ordered) or not bool(ordered.isfinite().all()) or not float(ordered[-1]) > 0:
            return None
        if len(ordered) > _KEPT:
            ordered = ordered[torch.linspace(0, len(ordered) - 1, _KEPT).round().long()]
        return cls(tuple(float(f"{value:.{_DIGITS}g}") for value in ordered.tolist()))

    def score(self, variance: Tensor) -> Tensor:
        """How unlike the shots pictures are.

        Args:
            variance: (m,) of the pictures.

        Returns:
            (m,) share of the shots that the fit is surer of, 0 to 1.
        """
        below = torch.searchsorted(torch.tensor(self.quantiles, dtype=torch.float64), variance.double().cpu())
        return below.double() / len(self.quantiles)


def calibrate_and_compare(
    task: FitTask, options: PosteriorOptions, device: torch.device | str = "cpu"
) -> tuple[Calibration, Novelty | None]:
    """Choose tau as :func:`~kngd_ray.training.calibration.calibrate` does, and measure the shots by the same fits.

    Args:
        task: the fit to calibrate; its folds are fitted in this process.
        options: posterior options.
        device: where the folds are fitted.

    Returns:
        The calibration, and what pictures are compared with; None without folds or without a belief, and where towers
        are trained, whose logits' variance would take a pass through the network for each draw.
    """
    if min(options.folds, len(task.support)) < 2:
        return calibrate(task, options, device), None
    task = decided_task(task)
    seen: list[Tensor] = []
    sizes: list[int] = []

    def fits() -> Iterator[tuple[Method, Shots]]:
        for part, held in held_out_tasks(task, options.folds):
            method = fit(part, device=device)
            yield method, held
            # after it was predicted with: weight ensembling has then moved its head
            if isinstance(method, KalmanNGD) and task.towers is None:
                seen.append(_variance(method, held, task.options.tune.alpha))
                sizes.append(covariance_bytes(method.belief.covariance))

    if single(task.support.labels):
        calibration = calibrate(task, options, device)
        if task.options.method == "kalman" and task.towers is None:
            # they choose no tau; but a belief that has seen no shot would be as sure of one picture as of another
            for _ in fits():
                pass
    else:
        calibration = calibration_of(fits(), options, task.options.tune.alpha)
    if not seen:
        return calibration, None
    by_fold = torch.cat(seen)
    fold = fold_of(task.support.labels, min(options.folds, len(task.support))).cpu()
    variance = torch.empty_like(by_fold)
    variance[torch.cat([(fold == f).nonzero().squeeze(1) for f in range(len(seen))])] = by_fold
    return calibration, Novelty.of(variance * _shrinkage(task, variance, device, max(sizes)))


def _shrinkage(task: FitTask, by_fold: Tensor, device: torch.device | str, size: int) -> float:
    """How much smaller the variance of new pictures is than by fits that lack a fold: by a few that lack one shot.

    Args:
        task: the fit.
        by_fold: (N,) variance of each shot by a fit without its fold.
        device: where to compute.
        size: bytes of a covariance.

    Returns:
        The factor, a median over shots.
    """
    N = len(task.support)
    which = torch.linspace(0, N - 1, min(N, _LEFT_OUT)).round().long()  # in the order of classes, so of many of them
    kept = torch.arange(N)
    parts = [replace(task, support=task.support.subset((kept != n).to(task.support.labels.device))) for n in which]
    methods: list[Method | FilterError]
    if shape_of(task) is not None and size * len(parts) <= _TOGETHER:
        together = fit_together(parts, device=device)
        methods = [done if isinstance(done, FilterError) else done.method for done in together]
    else:
        methods = [_attempted(part, device) for part in parts[: _LEFT_OUT // 2]]
    ratios = []
    for n, method in zip(which.tolist(), methods, strict=False):
        if isinstance(method, KalmanNGD) and float(by_fold[n]) > 0:
            alone = _variance(method, task.support.subset(torch.tensor([n])), 1.0)
            ratios.append(float(alone) * task.options.tune.alpha**2 / float(by_fold[n]))
    return float(torch.tensor(ratios).median()) if ratios else 1.0


def _attempted(task: FitTask, device: torch.device | str) -> Method | FilterError:
    """A fit, or why it could not go on."""
    try:
        return fit(task, device=device)
    except FilterError as error:
        return error


def _variance(method: KalmanNGD, shots: Shots, alpha: float) -> Tensor:
    """(m,) variance of shots by a fit of a head, deviations of the weights shrunk by alpha."""
    predictor = Predictor(method.head, method.family, method.belief, PosteriorOptions())
    return alpha**2 * total_variance(predictor, shots.inputs).cpu()


def total_variance(predictor: Predictor, features: Tensor) -> Tensor:
    """Mean variance of the logits of pictures at tau = 1: what tells pictures out of distribution from others.

    Args:
        predictor: a head and its belief.
        features: (m, d) unit image embeddings.

    Returns:
        (m,) variances; zeros without a posterior.
    """
    return predictor.logit_variance(features).mean(1)


def probability_interval(
    predictor: AnyPredictor, features: Tensor, prediction: Prediction, tau: float
) -> Tensor | None:
    """90 % credible interval of the most probable class's probability.

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
