"""Which settings change nothing of a fit, because others say so."""

from collections.abc import Iterable, Mapping
from typing import Any

from kngd_ray.filters import Categorical as LikelihoodNoise
from kngd_ray.filters import NoGate
from kngd_ray.training.options import FitOptions
from kngd_ray.training.posterior_options import PosteriorOptions

_OF_TOWERS = ("filter.towers", "filter.tower_logit_variance")
_OF_TAU = ("temperature", "tau_median", "tau_spread")  # of what `posterior` holds
# of the belief before the first shot, which a fit that continues another has from there
_OF_START = ("filter.logit_variance", "filter.logit_spread", "filter.mean", "filter.mean.gamma", *_OF_TOWERS)
_OF_CROPS = ("tune.views", "tune.augment", "tune.crop_scale")
_OF_HEADS = ("parameters", "views", "augment", "crop_scale", "alpha")  # of what `tune` holds


def without_effect(
    options: FitOptions,
    posterior: PosteriorOptions,
    key: str,
    *,
    protocol: str | None = None,
    prior: str | None = None,
) -> str | None:
    """Why a setting changes nothing of a fit, nor of what it predicts.

    Args:
        options: of the fit.
        posterior: how the posterior enters predictions.
        key: of the setting, dotted.
        protocol: of the run; None where it has none.
        prior: the run that it continues; None if it starts from CLIP.

    Returns:
        The setting that leaves it without effect, ``method=kalman``; None where it may have one.
    """
    head, _, rest = key.partition(".")
    kalman = options.method == "kalman"
    if head in ({"optimizer"} if kalman else {"filter", "noise", "observation"}):
        return f"method={options.method}"
    if prior is not None and key in {*_OF_START, "tune.refit"}:
        return f"prior={prior}"
    if key == "optimizer.momentum" and options.method != "sgd":
        return f"method={options.method}"
    if not options.tune.images and (key in _OF_TOWERS or (head == "tune" and rest and rest not in _OF_HEADS)):
        return f"tune.parameters={options.tune.parameters}"
    if key == "tune.refit" and not kalman:
        return f"method={options.method}"
    if head != "posterior":
        return _without_effect_on_fit(options, key, protocol)
    if protocol == "stream" and rest in {"folds", "sharpening_spread"}:  # what has been predicted so far chooses
        return "protocol=stream"
    if rest == "folds":  # they are there for temperature scaling too
        return None
    if rest == "sharpening_spread":  # of other methods too; towers have that of their head's folds
        return None if posterior.folds or options.tune.images else "posterior.folds=0"
    if not kalman:
        return f"method={options.method}"
    if rest == "draws" and posterior.predict != "draws":
        return f"posterior.predict={posterior.predict}"
    if rest in _OF_TAU and posterior.predict == "mean":
        return "posterior.predict=mean"
    if rest in {"tau_median", "tau_spread"} and posterior.temperature is not None:
        return f"posterior.temperature={posterior.temperature:g}"
    if rest == "tau_spread" and posterior.tau_median is None:
        return "posterior.tau_median=null"
    if rest == "tau_spread" and not posterior.folds and protocol != "stream":
        return "posterior.folds=0"  # nothing chooses tau: it is the median
    return None


def _without_effect_on_fit(options: FitOptions, key: str, protocol: str | None) -> str | None:
    """Why a setting of the filter, of what it observes or of crops changes nothing; see :func:`without_effect`."""
    head, _, rest = key.partition(".")
    if key == "filter.tolerance" and not options.at_mode:
        if options.filter.iterations == 1:
            return "filter.iterations=1"
        if options.filter.serial:
            return f"filter.serial={options.filter.serial}"
        return None if isinstance(options.filter.gate, NoGate) else f"filter.gate={options.filter.gate.kind}"
    place, _, option = rest.rpartition(".")
    if head == "observation" and option == "r0" and isinstance(options.noise.observation, LikelihoodNoise):
        models = options.observation[int(place) : int(place) + 1] if place.isdecimal() else options.observation
        known = models and all(model.likelihood is not None for model in models)
        return "noise.observation=categorical" if known else None
    if key in _OF_CROPS and key != "tune.augment" and options.tune.augment == "none":
        return "tune.augment=none"
    if key in {"tune.views", "tune.refit"} and options.tune.images and not options.tune.after_head:
        return f"tune.start={options.tune.start}"
    if key == "tune.refit":
        return _keeps_the_head(options)
    if key in _OF_CROPS and not options.tune.images:  # towers crop the pictures themselves
        if protocol == "stream":
            return "protocol=stream"
        if not options.at_mode and options.epochs < 2:
            return f"epochs={options.epochs}"
    return None


def _keeps_the_head(options: FitOptions) -> str | None:
    """The setting by which the head of trained towers is not fitted again, whatever ``tune.refit`` says."""
    if options.filter.tower_logit_variance == 0:
        return "filter.tower_logit_variance=0"
    if options.epochs == 0:
        return "epochs=0"
    return None if options.tune.alpha == 1 else f"tune.alpha={options.tune.alpha:g}"


def ignored(
    options: FitOptions,
    posterior: PosteriorOptions,
    keys: Iterable[str],
    *,
    protocol: str | None = None,
    prior: str | None = None,
) -> dict[str, str]:
    """Settings that change nothing of a fit, nor of what it predicts.

    Args:
        options: of the fit.
        posterior: how the posterior enters predictions.
        keys: of the settings, dotted.
        protocol: of the run; None where it has none.
        prior: the run that it continues; None if it starts from CLIP.

    Returns:
        By key, the setting that leaves it without effect.
    """
    found = {key: without_effect(options, posterior, key, protocol=protocol, prior=prior) for key in keys}
    return {key: cause for key, cause in found.items() if cause is not None}


def set_too_late(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings of the belief before the first shot that were changed when shots had been seen.

    Args:
        before: settings by dotted key, as they were.
        now: as they are.

    Returns:
        Their keys.
    """
    return [key for key in _OF_START if before.get(key) != now.get(key)]
