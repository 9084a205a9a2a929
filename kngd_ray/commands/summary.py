"""Figures over seeds: mean and 95 % interval in each figure's place."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


def over_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine nested figures of several seeds.

    Args:
        reports: the same nested mapping of numbers per seed.

    Returns:
        The report itself for one seed; otherwise ``{"mean", "low", "high"}`` in each figure's place,
        the interval Student's t at 95 %.
    """
    if len(reports) == 1:
        return dict(reports[0])
    combined: dict[str, Any] = {}
    for key, first in reports[0].items():
        values = [report[key] for report in reports]
        combined[key] = over_seeds(values) if isinstance(first, Mapping) else interval(values)
    return combined


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval of a figure over seeds.

    Args:
        values: one per seed, two or more.

    Returns:
        ``mean``, ``low`` and ``high``.
    """
    array = np.asarray(values, float)
    mean = float(array.mean())
    half = float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
    return {"mean": mean, "low": mean - half, "high": mean + half}


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
