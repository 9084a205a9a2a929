"""The novelty percentile of a picture: the rank of its logits' variance among the training shots'.

The variance follows from the belief N(mu, P) of the weights, through the linearised H P H^T of the logits; it needs no
tau. The variance of a shot must come from a belief that has not seen it. A posterior at the mode of a class residual
gives up a shot in closed form (:mod:`kngd_ray.filters.left_out`). For other fits, the cross-validation that chooses tau
measures the shots. Its fits have seen less than the one that predicts, and are less certain of everything; a few fits
that lack a single shot say by how much.

Fits of towers that started from a head are not repeated. The head gives up a shot in closed form, and the shot's
variance under the towers' belief is taken to grow by the same factor. If towers are fitted by folds, those fits measure
the shots, and nothing says how much more certain the whole fit is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor

from kngd_ray.errors import CheckpointError, FilterError
from kngd_ray.filters import Classified, Kronecker, PriorWithout, spread_left_out
from kngd_ray.sharding import SingleProcess, covariance_bytes
from kngd_ray.training.at_mode import ModePosterior
from kngd_ray.training.batched_fits import fit_together, shape_of
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.calibration import (
    AnyPredictor,
    Calibration,
    calibrate,
    calibration_of,
    calibration_tasks,
    decided_task,
    held_out_tasks,
    predictor_of,
)
from kngd_ray.training.fit import FitTask, begin, fit, head_task
from kngd_ray.training.folds import fold_of, single, twins_of
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.method import Method, MethodState
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import Predictor, centred_variances

_LEFT_OUT = 8  # shots of which each is left out of a fit of its own
_TOGETHER = 1 << 28  # bytes of covariances that advance together
_KEPT = 512  # quantiles: more shots tell no more
_DIGITS = 6
_RECENT = 64  # pictures that a belief which learns on is compared by


@dataclass(frozen=True)
class Novelty:
    """What the variance of a picture's logits is compared with.

    Attributes:
        quantiles: variances of held-out training shots at tau = 1, ascending; of many shots, evenly spaced quantiles.
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
            Their quantiles; None where there is no variance to compare.
        """
        ordered = variance.double().cpu().sort().values
        if not len(ordered) or not bool(ordered.isfinite().all()) or not float(ordered[-1]) > 0:
            return None
        if len(ordered) > _KEPT:
            ordered = ordered[torch.linspace(0, len(ordered) - 1, _KEPT).round().long()]
        return cls(tuple(float(f"{value:.{_DIGITS}g}") for value in ordered.tolist()))

    @property
    def median(self) -> float:
        """Variance of the logits of the median shot, nats²."""
        return self.quantiles[len(self.quantiles) // 2]

    def renewed(self, variance: Tensor) -> "Novelty":
        """The same of a belief that learns on: it narrows, and would be surer of anything than of its first shots.

        Args:
            variance: (m,) of the next shots, by the belief that has not seen them.

        Returns:
            Quantiles in which they take the place of as many of the earlier ones.
        """
        earlier, room = torch.tensor(self.quantiles, dtype=torch.float64), max(_RECENT - len(variance), 0)
        if len(earlier) > room:
            earlier = earlier.quantile((torch.arange(room, dtype=torch.float64) + 0.5) / max(room, 1))
        return Novelty.of(torch.cat([earlier, variance.double().cpu()])) or self

    def score(self, variance: Tensor) -> Tensor:
        """Novelty percentiles of pictures.

        Args:
            variance: (m,) of the pictures.

        Returns:
            (m,) share of the held-out shots with a smaller variance, 0 to 1.
        """
        below = torch.searchsorted(torch.tensor(self.quantiles, dtype=torch.float64), variance.double().cpu())
        return below.double() / len(self.quantiles)


def calibrate_and_compare(
    task: FitTask,
    options: PosteriorOptions,
    device: torch.device | str = "cpu",
    fitted: MethodState | None = None,
) -> tuple[Calibration, Novelty | None]:
    """Choose tau as :func:`~kngd_ray.training.calibration.calibrate` does, and measure the shots by the same fits.

    Args:
        task: the fit to calibrate; its folds are fitted in this process.
        options: posterior options.
        device: where the folds are fitted.
        fitted: what came of the fit, if it was run.

    Returns:
        The calibration, and what pictures are compared with; None without folds or without a belief, and of towers that
        do not predict by the linearised variance of the logits.
    """
    if min(options.folds, len(task.support)) < 2:
        return calibrate(task, options, device, fitted), None
    task = decided_task(task, fitted, device)
    if _gives_up_shots(task):
        calibration = calibrate(task, options, device)
        variance = variance_left_out(task, device, fitted)
        if variance is not None:
            return calibration, Novelty.of(variance)
    return _by_folds(task, options, device)


def _gives_up_shots(task: FitTask) -> bool:
    """Whether the belief that comes of a fit is known without each of its shots."""
    return task.options.at_mode and task.options.tune.alpha == 1 and task.sampler.steps == 1


def compare_towers(task: FitTask, predictor: AnyPredictor, device: torch.device | str = "cpu") -> Novelty | None:
    """What pictures are compared with by towers that started from a head.

    Args:
        task: the fit of the towers.
        predictor: what came of it.
        device: where the head is fitted again.

    Returns:
        Variances of the shots, as of a fit without them; None where they are not known in closed form, and of towers
        that do not predict by the linearised variance of the logits.
    """
    if not predictor.linearises:
        return None
    first = head_task(task)
    if not _gives_up_shots(first):
        return None
    head = fit(first, device=device)
    assert isinstance(head, KalmanNGD)
    shots = first.to(device).support
    assert isinstance(shots, Support)
    without = variance_left_out(decided_task(first, head.state(), device), device, head.state())
    if without is None:
        return None
    within = _variance(head, shots, 1.0)
    grown = without.cpu().double() / within.double().clamp_min(torch.finfo(torch.float64).tiny)
    seen = total_variance(predictor, task.support.to(predictor.device).inputs)
    return Novelty.of(seen.cpu().double() * grown)


def variance_left_out(
    task: FitTask, device: torch.device | str = "cpu", fitted: MethodState | None = None
) -> Tensor | None:
    """Variance of each shot's logits by a belief without it, in closed form.

    Args:
        task: a fit that goes to its mode in one step.
        device: where to compute.
        fitted: what came of it, if it was run.

    Returns:
        (N,) mean variances of the class logits at tau = 1; None where the prior depends on shots in another way.
    """
    before = begin(task, SingleProcess(), device)
    assert isinstance(before, KalmanNGD)
    assert isinstance(before.posterior, ModePosterior)
    assert isinstance(before.family, Kronecker)
    (prior,), shots = before.belief.covariance.values(), task.to(device).support
    assert isinstance(shots, Support)
    views, seen = task.views, shots.all_views()
    x = before.posterior.residual.inputs(seen.features)
    without = PriorWithout.unchanged(len(shots), x)
    if task.prior is None:
        of_prior = before.family.prior_without(prior["A"], x, seen.labels, views)
        if of_prior is None:
            return None
        without = of_prior
    noise = before.observer.r0
    if fitted is None:
        fitted = fit(task, device=device).state()
    before.load(fitted)  # and so it is the fit
    (posterior,) = before.belief.covariance.values()
    with torch.no_grad():
        logits: Tensor = before.head(seen.features)
    at_mode = Classified(x, logits, seen.labels, before.head.logit_scale, noise)
    B = posterior["B"]
    spread = spread_left_out((prior["B"], prior["A"]), (B, posterior["A"]), at_mode, without, views)
    return spread * centred_variances(B).mean().to(spread)


def _by_folds(
    task: FitTask, options: PosteriorOptions, device: torch.device | str
) -> tuple[Calibration, Novelty | None]:
    """The same by fits that lack a fold."""
    seen: list[Tensor] = []
    rows: list[Tensor] = []
    sizes: list[int] = []
    twins = twins_of(task.support)
    fold = fold_of(task.support.labels, min(options.folds, len(task.support)), twins).cpu()

    def fits(parts: Sequence[tuple[FitTask, Shots]]) -> Iterator[tuple[Method, Shots]]:
        for part, held in parts:
            method = fit(part, device=device)
            yield method, held
            if not isinstance(method, KalmanNGD):
                continue
            if task.towers is None:
                # after it was predicted with: weight ensembling has then moved its head
                found = _variance(method, held, task.options.tune.alpha)
            elif options.predict == "linearised" and task.options.tune.alpha == 1:
                predictor = predictor_of(method, options)
                found = total_variance(predictor, held.to(predictor.device).inputs).cpu()
            else:
                continue
            rows.append((fold == len(seen)).nonzero().squeeze(1))
            seen.append(found)
            sizes.append(covariance_bytes(method.belief.covariance))

    if single(task.support.labels, twins):
        calibration = calibrate(task, options, device)
        if task.options.method == "kalman" and task.towers is None:
            # they choose no tau; but a belief that has seen no shot would be as sure of one picture as of another
            for _ in fits(held_out_tasks(task, options.folds)):
                pass
    else:
        calibration = calibration_of(fits(calibration_tasks(task, options.folds)), options, task.options.tune.alpha)
    if not seen:
        return calibration, None
    variance = torch.full((len(task.support),), nan, dtype=seen[0].dtype)
    variance[torch.cat(rows)] = torch.cat(seen)
    smaller = 1.0 if task.towers is not None else _shrinkage(task, variance, device, max(sizes))
    return calibration, Novelty.of(variance[~variance.isnan()] * smaller)


def _shrinkage(task: FitTask, by_fold: Tensor, device: torch.device | str, size: int) -> float:
    """How much smaller the variance is for new pictures than for fits that lack a fold, by a few that lack one shot.

    Args:
        task: the fit.
        by_fold: (N,) variance of each shot by a fit without its fold; NaN for shots that were in none.
        device: where to compute.
        size: bytes of a covariance.

    Returns:
        The factor, a median over shots.
    """
    kept, measured = torch.arange(len(task.support)), (~by_fold.isnan()).nonzero().squeeze(1)
    # in the order of classes, so of many of them
    which = measured[torch.linspace(0, len(measured) - 1, min(len(measured), _LEFT_OUT)).round().long()]
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
    return alpha**2 * total_variance(predictor, shots.to(predictor.device).inputs).cpu()


def total_variance(predictor: AnyPredictor, features: Any) -> Tensor:
    """Mean variance of the logits of pictures at tau = 1: what tells pictures out of distribution from others.

    Args:
        predictor: a head or a network, and its belief.
        features: (m, d) unit image embeddings, or what the network takes.

    Returns:
        (m,) variances; zeros without a posterior.
    """
    return predictor.logit_variance(features).mean(1)
