"""Choosing tau, sharpening and a scaling temperature on the training shots alone, by cross-validation.

A model is right about nearly all of the shots that it was fitted on, so they say nothing about its calibration. Here
the shots are cut into folds, each fold is predicted by a fit on the others, and the held-out predictions choose the
posterior temperature tau on a grid (least NLL, or the most probable tau where it has a prior). A tau can only make
predictions less certain. With few shots of many classes the mean of the belief may be too uncertain by itself: its
prior holds logits back. Then the logits are multiplied by a factor, the sharpening, which has a prior towards 1. The
temperature T of ``p^(1/T)``, fitted for what both leave, serves figures alone. The test split is never touched.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from math import exp, inf, isfinite
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import nll_loss

from kngd_ray.clip import CLIPHead, CLIPNetwork, Head
from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Family
from kngd_ray.observations import flatten, trainable
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.fit import FitTask, build_head, fit, head_task
from kngd_ray.training.folds import ENOUGH, fold_of, single, twins_of
from kngd_ray.training.informing import decided
from kngd_ray.training.kalman import KalmanNGD, chosen_variance
from kngd_ray.training.method import Method, MethodState
from kngd_ray.training.metrics import correct
from kngd_ray.training.network_predictor import NetworkPredictor
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import TAU_GRID, Prediction, Predictor

_MAX_LOG_T = 3.0
_SPREAD = 10.0  # of log T a priori


@dataclass(frozen=True)
class Calibration:
    """What the training shots say about calibration.

    Attributes:
        tau: posterior temperature.
        scaling: T of the temperature scaling p^(1/T) that figures "after scaling" have.
        held_out_nll: NLL of the held-out shots as predicted, nats per sample; None without folds, and of single shots.
        held_out_accuracy: share of the held-out shots classified right at tau; None likewise.
        sharpening: what predictions multiply the logits by, 1 or more.
        chosen: whether shots have chosen any of it; runs of earlier versions do not say.
    """

    tau: float
    scaling: float
    held_out_nll: float | None = None
    held_out_accuracy: float | None = None
    sharpening: float = 1.0
    chosen: bool = False

    def predict(self, predictor: "AnyPredictor", inputs: Any) -> Prediction:
        """Predict by a predictor as calibrated.

        Args:
            predictor: of a head or a network.
            inputs: what it takes.

        Returns:
            Probabilities at tau and sharpening, and the spread of the logits at tau.
        """
        found = predictor.predict(inputs, self.tau)
        return replace(found, probabilities=sharpened(found.probabilities, self.sharpening))


AnyPredictor = Predictor | NetworkPredictor


def predictor_of(method: Method, options: PosteriorOptions, alpha: float = 1.0) -> AnyPredictor:
    """A predictor from a method that ran in one process.

    Args:
        method: the finished fit.
        options: how the posterior enters.
        alpha: weight ensembling with the pretrained model; below 1 the method's own weights are moved.

    Returns:
        The predictor; without a posterior unless the method is Kalman.
    """
    family, belief = (method.family, method.belief) if isinstance(method, KalmanNGD) else (None, None)
    return assembled(method.head, family, belief, options, alpha)


def assembled(
    head: Head, family: Family | None, belief: Belief | None, options: PosteriorOptions, alpha: float
) -> AnyPredictor:
    """A predictor at the weights of an ensemble with the pretrained model.

    Args:
        head: trained; its weights are moved.
        family: covariance family of the belief; None for a method without a posterior.
        belief: the whole belief; None for a method without a posterior.
        options: how the posterior enters.
        alpha: 0 is the pretrained model, 1 the trained one; deviations shrink as the weights do.

    Returns:
        The predictor.
    """
    if alpha != 1.0:
        head.blend(alpha)
        if not alpha:
            belief = None  # of CLIP as it is
        if belief is not None and family is not None:
            # of LoRA's product B A only B is averaged, and adapters that were fitted first are not
            kept = (".down",) if not isinstance(head, CLIPNetwork) or not head.started else (".down", *head.started)
            moved = {name: state for name, state in belief.covariance.items() if not name.endswith(kept)}
            shrunk = family.predict(moved, alpha**2, 0.0, lambda share: share)
            belief = Belief(flatten(trainable(head)), {**belief.covariance, **shrunk})
    if isinstance(head, CLIPNetwork):
        return NetworkPredictor(head, family, belief, options)
    return Predictor(head, family, belief, options)


def held_out_tasks(task: FitTask, folds: int) -> list[tuple[FitTask, Shots]]:
    """The fits of a cross-validation over the shots.

    Args:
        task: the fit.
        folds: number of folds; the shots are cut into as many at most as there are.

    Returns:
        For each fold the fit on the others, and the fold.
    """
    folds = min(folds, len(task.support))
    fold = fold_of(task.support.labels, folds, twins_of(task.support))
    return [(task.part(fold != f), task.support.subset(fold == f)) for f in range(folds)]


def decided_task(task: FitTask, fitted: MethodState | None = None, device: torch.device | str = "cpu") -> FitTask:
    """The fit with its prior variance fixed to what its shots decide: parts of the shots need not decide it again.

    Args:
        task: the fit.
        fitted: its result, if it was run, which says what was decided.
        device: where to decide it if not.

    Returns:
        The fit.
    """
    prior = task.options.filter
    if not task.options.at_mode or task.prior is not None or not prior.logit_spread:
        return task
    variance = None if fitted is None else chosen_variance(fitted)
    if variance is None:
        head, shots = build_head(task, device), task.to(device).support
        assert isinstance(head, CLIPHead)
        assert isinstance(shots, Support)
        _, variance = decided(head, prior, shots, at_mode=True)
    fixed = replace(prior, logit_variance=variance, logit_spread=0.0)
    return replace(task, options=replace(task.options, filter=fixed))


def calibration_tasks(task: FitTask, folds: int) -> list[tuple[FitTask, Shots]]:
    """The fits that choose tau, and the shots that each has not seen.

    These are the fits of a cross-validation, with no more folds than the shots are enough for. But where no class has
    two shots, every fold would lack its classes altogether, and say nothing about a fit that knows them. Then it is the
    belief before the first step, which has seen none of the shots.

    Args:
        task: the fit.
        folds: number of folds; the shots are cut into as many at most as there are.

    Returns:
        For each fold the fit, and the fold; of single shots there is one.
    """
    if not single(task.support.labels, twins_of(task.support)):
        parts = held_out_tasks(task, folds)
        seen = list(accumulate(len(held) for _, held in parts))
        return parts[: 1 + sum(total < ENOUGH for total in seen[:-1])]
    return [(replace(task, options=replace(task.options, epochs=0)), task.support)]


def calibrate(
    task: FitTask,
    options: PosteriorOptions,
    device: torch.device | str = "cpu",
    fitted: MethodState | None = None,
) -> Calibration:
    """Choose tau and sharpening and fit the scaling temperature by cross-validation over the shots.

    Args:
        task: the fit to calibrate; its folds are fitted in this process.
        options: posterior options; a given temperature is kept as tau.
        device: where the folds are fitted.
        fitted: the fit's result, if it was run.

    Returns:
        The choice. Without folds, tau is the given temperature, or the median of its prior, or 1; nothing is scaled.
    """
    if min(options.folds, len(task.support)) < 2:
        return Calibration(options.unasked, 1.0)
    task = decided_task(task, fitted, device)
    # one after another: a fold of whole towers is let go before the next one is fitted
    fits = ((fit(part, device=device), held) for part, held in calibration_tasks(task, options.folds))
    found = calibration_of(fits, options, task.options.tune.alpha)
    # of single shots these would be figures of a fit that has learned nothing
    alone = single(task.support.labels, twins_of(task.support))
    return replace(found, held_out_nll=None, held_out_accuracy=None) if alone else found


def calibrate_by_head(task: FitTask, options: PosteriorOptions, device: torch.device | str = "cpu") -> Calibration:
    """Choose tau and sharpening of towers by folds of the head that they started from: a fold of theirs takes minutes.

    Args:
        task: a fit of towers that starts at a head.
        options: posterior options of the towers; a given temperature is kept as tau.
        device: where the head's folds are fitted.

    Returns:
        The choice, without figures of what was held out: that was from the head alone.
    """
    assert task.head is not None
    if options.predict != "linearised":  # of draws and of the mean another tau is right
        return Calibration(options.unasked, 1.0)
    found = calibrate(head_task(task), posterior_of_head(task, options), device)
    return Calibration(found.tau, found.scaling, sharpening=found.sharpening, chosen=found.chosen)


def posterior_of_head(task: FitTask, options: PosteriorOptions) -> PosteriorOptions:
    """How the head of towers is calibrated: by its own folds, as far as the towers' options do not say otherwise.

    Args:
        task: a fit of towers that starts at a head.
        options: posterior options of the towers.

    Returns:
        Posterior options of the head.
    """
    assert task.head is not None
    of_head = replace(task.head.posterior, sharpening_spread=options.sharpening_spread)
    return of_head if options.temperature is None else replace(of_head, temperature=options.temperature)


def uncalibrated(options: PosteriorOptions, error: FilterError, *, believes: bool = True) -> tuple[Calibration, str]:
    """What predicts where a fit went well and a fold of its shots cannot be fitted.

    Args:
        options: posterior options.
        error: why it cannot.
        believes: whether the method has a belief, whose tau is told.

    Returns:
        The calibration of no folds, and a warning that nothing was chosen.
    """
    found = Calibration(options.unasked, 1.0)
    tau = f"tau is {found.tau:g}, and " if believes else ""
    return found, f"folds of the shots could not be fitted ({str(error).rstrip('.')}): {tau}nothing was chosen"


def below_zero_shot(task: FitTask, found: Calibration, folds: int) -> str | None:
    """Warn of a fit that is right about fewer of its held-out shots than zero-shot CLIP.

    Args:
        task: the fit.
        found: its calibration, by `folds`.
        folds: number of folds.

    Returns:
        A sentence; None where it is not, where nothing was held out, and where towers are trained, whose shots are not
        embeddings.
    """
    if found.held_out_accuracy is None or task.towers is not None:
        return None
    held = [part for _, part in calibration_tasks(task, folds)]
    head = CLIPHead(task.class_embeddings.cpu(), task.logit_scale)
    with torch.no_grad():
        right = [correct(head(part.inputs.cpu()), part.labels.cpu()) for part in held]
    zero_shot = float(torch.cat(right).mean())
    spread = float((task.class_embeddings - task.class_embeddings[0]).abs().max())
    if found.held_out_accuracy >= zero_shot or not spread:  # without texts there is no zero-shot
        return None
    return (
        f"the fit is right about {100 * found.held_out_accuracy:.1f} % of the training pictures that were held out "
        f"from it, and CLIP as it is about {100 * zero_shot:.1f} %: look at labels and prompts, or take more shots"
    )


def calibration_of(fits: Iterable[tuple[Method, Shots]], options: PosteriorOptions, alpha: float = 1.0) -> Calibration:
    """Choose tau and sharpening and fit the scaling temperature on shots that fits have not seen.

    Args:
        fits: fits of one task on parts of its shots, each with the shots held out from it.
        options: posterior options; a given temperature is kept as tau. For fits without a posterior, tau is 0.
        alpha: weight ensembling with the pretrained model.

    Returns:
        The choice, and how well it predicts them.
    """
    predicted: dict[float, list[Tensor]] = {}
    labels = []
    for method, held in fits:
        predictor = predictor_of(method, options, alpha)
        held = held.to(predictor.device)
        labels.append(held.labels.cpu())
        if predictor.belief is not None and options.temperature is not None:
            taus: tuple[float, ...] = (options.temperature,)
        else:
            taus = TAU_GRID if predictor.belief is not None and options.predict != "mean" else (0.0,)
        for tau in taus:
            predicted.setdefault(tau, []).append(predictor.predict(held.inputs, tau).probabilities.cpu())
    return _chosen({tau: torch.cat(parts) for tau, parts in predicted.items()}, torch.cat(labels), options)


def _chosen(predicted: Mapping[float, Tensor], labels: Tensor, options: PosteriorOptions) -> Calibration:
    """The tau and then the sharpening likeliest given held-out shots, under their priors, and what they say at both."""
    tau = min(predicted, key=lambda t: len(labels) * _nll(predicted[t], labels) - options.log_prior(t))
    right = (predicted[tau].argmax(1) == labels).double().mean()
    sharpening = fit_sharpening(predicted[tau], labels, options.sharpening_spread)
    found = sharpened(predicted[tau], sharpening)
    return Calibration(tau, fit_temperature(found, labels), _nll(found, labels), float(right), sharpening, chosen=True)


def fit_sharpening(probabilities: Tensor, labels: Tensor, spread: float) -> float:
    """The power s >= 1 that makes p^s, renormalised, most probable, where log s is half-normal a priori.

    Args:
        probabilities: (m, C) held-out predictions.
        labels: (m,) true classes.
        spread: standard deviation of the normal that is the prior's upper half; 0 is always 1.

    Returns:
        s, from 1 to exp(3).
    """
    return 1.0 / _most_probable_temperature(probabilities, labels, spread, 0.0) if spread else 1.0


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The T that makes p^(1/T), renormalised, most likely (Guo et al., arXiv 1706.04599), under a wide prior.

    Where all shots are classified right, the smaller T the likelier they are, and rounding would decide. Of log T the
    prior is N(0, 10^2): elsewhere it moves no digit that is shown.

    Args:
        probabilities: (m, C) held-out predictions.
        labels: (m,) true classes.

    Returns:
        T, within exp(-3) and exp(3).
    """
    return _most_probable_temperature(probabilities, labels, _SPREAD, _MAX_LOG_T)


def _most_probable_temperature(probabilities: Tensor, labels: Tensor, spread: float, highest: float) -> float:
    """The T, up to exp(highest), that is most probable given held-out shots, where log T is N(0, spread^2) a priori."""

    def energy(log_t: float) -> float:
        return len(labels) * _nll(scale(probabilities, exp(log_t)), labels) + 0.5 * (log_t / spread) ** 2

    found = minimize_scalar(energy, bounds=(-_MAX_LOG_T, highest), method="bounded")
    return exp(min(0.0, found.x, key=energy))  # which comes near an end of its bounds, but not there


def sharpened(probabilities: Tensor, factor: float) -> Tensor:
    """Probabilities of logits that are multiplied by a factor; the most probable class stays the same.

    Args:
        probabilities: (m, C).
        factor: above 0; 1 leaves them as they are, to the last bit.

    Returns:
        (m, C) probabilities.
    """
    return probabilities if factor == 1.0 else scale(probabilities, 1.0 / factor).to(probabilities)


def scale(probabilities: Tensor, T: float) -> Tensor:
    """p^(1/T), renormalised.

    Args:
        probabilities: (m, C).
        T: temperature.

    Returns:
        (m, C) probabilities.
    """
    return (probabilities.double().clamp_min(1e-12).log() / T).softmax(1)


def _nll(probabilities: Tensor, labels: Tensor) -> float:
    nll = float(nll_loss(probabilities.double().clamp_min(1e-12).log(), labels))
    return nll if isfinite(nll) else inf  # a NaN would win every comparison
