"""Figures over seeds: mean and 95 % interval in each figure's place; the one interval that the product shows of seeds.

It is Student's t. Seeds are few, two to ten: a bootstrap or a normal interval of so few values is far too narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import numpy as np
from scipy import special

ZERO_SHOT = "zero-shot"
CHANCE = "chance"  # what zero-shot is called where there are no class embeddings, and logits are equal

LEVEL = 0.95
EQUAL = 1e-12
"""Figures that differ by no more are equal, give or take their last digit."""

# what a figure can be, by its name or the end of it; an interval says nothing of what lies outside
_RANGES = {
    **dict.fromkeys(("accuracy", "auroc", "aurc", "ece", "hm", "learned", "final"), (0.0, 1.0)),
    "forgetting": (-1.0, 1.0),
    "brier": (0.0, 2.0),
    **dict.fromkeys(("nll", "fit_s", "step_ms", "refused", "bytes_per_step", "covariance_bytes"), (0.0, inf)),
}


@dataclass(frozen=True)
class Student:
    """What Student's t says of the mean of a few values.

    Attributes:
        mean: of the values.
        low: lower end of its 95 % interval.
        high: its upper end.
        p: how often values that scatter around 0 would have a mean as far from it; two-sided.
    """

    mean: float
    low: float
    high: float
    p: float


def student(values: Sequence[float]) -> Student:
    """Mean, interval and test against 0, as by ``scipy.stats.ttest_1samp`` in a fiftieth of its time.

    Args:
        values: two or more.

    Returns:
        What they say; of equal values the interval has no width.
    """
    array = np.asarray(values, float)
    n, mean = len(array), float(array.mean())
    if np.ptp(array) <= EQUAL:
        return Student(mean, mean, mean, 1.0 if abs(mean) <= EQUAL else 0.0)
    error = float(array.std(ddof=1)) / sqrt(n)
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    return Student(mean, mean - half, mean + half, 2 * float(special.stdtr(n - 1, -abs(mean) / error)))


def possible(metric: str) -> tuple[float, float]:
    """The least and the most that a figure can be.

    Args:
        metric: ``accuracy``, ``id/accuracy``, ``objective/held_out_nll``.

    Returns:
        The bounds, infinite where nothing is known of the figure.
    """
    figure = metric.rpartition("/")[2]
    found = (bounds for name, bounds in _RANGES.items() if figure == name or figure.endswith(f"_{name}"))
    return next(found, (-inf, inf))


def over_seeds(reports: Sequence[Mapping[str, Any]], *, one_support: bool = False) -> dict[str, Any]:
    """Combine nested figures of several seeds.

    Args:
        reports: the same nested mapping of numbers per seed.
        one_support: all seeds learned from the same shots, so that how far others would lead is not known.

    Returns:
        The report itself for one seed; otherwise ``{"mean", "low", "high"}`` in each figure's place,
        the interval Student's t at 95 %; the mean alone of one support set.
    """
    if len(reports) == 1:
        return dict(reports[0])
    combined: dict[str, Any] = {}
    for key, first in reports[0].items():
        values = [report[key] for report in reports]
        if isinstance(first, Mapping):
            combined[key] = over_seeds(values, one_support=one_support)
        else:
            combined[key] = float(np.mean(values)) if one_support else interval(values, key)
    return combined


def interval(values: Sequence[float], metric: str = "") -> dict[str, float]:
    """Mean and 95 % interval of a figure over seeds.

    Args:
        values: one per seed, two or more.
        metric: what it is; the interval ends where such a figure does, of accuracies at 0 and 1.

    Returns:
        ``mean``, ``low`` and ``high``.
    """
    found, (least, most) = student(values), possible(metric)
    return {"mean": found.mean, "low": max(found.low, least), "high": min(found.high, most)}


def flat_metrics(report: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested figures as MLflow metrics: ``id/accuracy``, ``ood/sketch/nll``, ``ood/mean/ece/low``.

    Args:
        report: nested mapping of numbers.
        prefix: of every name.

    Returns:
        Numbers by path; an interval's mean carries the plain name. Texts, such as a protocol's name, are no metrics.
    """
    flat: dict[str, float] = {}
    for key, value in report.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if set(value) == {"mean", "low", "high"} and not isinstance(value["mean"], Mapping):
                flat[name] = value["mean"]
                flat |= {f"{name}/{bound}": value[bound] for bound in ("low", "high")}
            else:
                flat |= flat_metrics(value, f"{name}/")
        elif not isinstance(value, str):
            flat[name] = float(value)
    return flat
