"""The statistics of a comparison: which way a metric is better, paired differences, the Pareto front. Pure functions.

Differences are taken seed by seed, since a seed is a support set that both methods saw. Their interval is
the bootstrap's *expanded percentile* interval: over n seeds the plain percentile interval is too narrow, by
sqrt((n - 1) / n) and for want of Student's t, so a wider level is asked of the bootstrap, the one that makes up
for both (Hesterberg, "What Teachers Should Know about the Bootstrap", arXiv 1411.5279).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

TIE = 1e-12
"""Differences up to this size are ties: equal figures, give or take their last digit."""

LEVEL = 0.95

_BETTER = {
    **dict.fromkeys(("accuracy", "auroc", "evidence", "log_posterior"), 1),
    **dict.fromkeys(("nll", "ece", "brier", "aurc", "fit_s", "step_ms", "refused", "bytes_per_step"), -1),
    "covariance_bytes": -1,
}
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """One method against another, over the seeds that both have.

    Attributes:
        seeds: the seeds.
        mean: of the differences.
        low: lower end of the 95 % interval; None for a single seed.
        high: its upper end.
        wins: seeds on which the first is better.
        ties: seeds on which they differ by at most :data:`TIE`.
        losses: seeds on which it is worse.
    """

    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int

    @property
    def decided(self) -> bool:
        """Whether there is an interval, and it excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def better(metric: str) -> int:
    """Which way a metric is better, by the end of its name.

    Args:
        metric: ``id/accuracy``, ``ood/mean/nll``, ``objective/held_out_nll``.

    Returns:
        1 where more is better, -1 where less is, 0 where it is not known.
    """
    figure = metric.rpartition("/")[2]
    return next((sign for name, sign in _BETTER.items() if figure == name or figure.endswith(f"_{name}")), 0)


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], direction: int = 1
) -> Difference | None:
    """The difference of two methods, paired by seed.

    Args:
        values: figure by seed.
        baseline: figure by seed of what it is compared with.
        direction: 1 where more is better, -1 where less is.

    Returns:
        The difference; None without a common seed.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds], float)
    low, high = bootstrap_interval(differences) if len(seeds) > 1 else (None, None)
    gains = differences * direction
    wins, losses = int((gains > TIE).sum()), int((gains < -TIE).sum())
    return Difference(seeds, float(differences.mean()), low, high, wins, len(seeds) - wins - losses, losses)


def bootstrap_interval(values: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Expanded percentile interval of a mean; the same values give the same interval.

    It never leaves the range of the values, and so covers a median at most :func:`coverage_limit` of the time.

    Args:
        values (n,): two or more.
        level: nominal coverage.

    Returns:
        Its ends.
    """
    n = len(values)
    reach = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + level) / 2, n - 1)
    # 1 itself would ask for quantiles that scipy refuses
    expanded = min(1 - 2 * float(stats.norm.cdf(-reach)), 1 - 1e-9)
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=expanded,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def coverage_limit(seeds: int) -> float:
    """The most that an interval inside the range of n values can cover of what they scatter evenly around.

    Args:
        seeds: n.

    Returns:
        1 - 2^(1 - n): 0.75 for 3, 0.94 for 5, 0.97 for 6.
    """
    return 1 - 2.0 ** (1 - seeds)


def pareto_front(points: Sequence[Sequence[float]], directions: Sequence[int]) -> list[bool]:
    """Which points no other point dominates: at least as good in every figure, and better in one.

    Args:
        points: figures of each point; a NaN keeps a point from the front, and from dominating.
        directions: 1 where more of a figure is better, -1 where less is.

    Returns:
        Whether each point is on the front; equal points are on it together.
    """
    gains = np.asarray(points, float).reshape(len(points), len(directions)) * np.asarray(directions)
    known = np.isfinite(gains).all(1)
    front = []
    for gain, is_known in zip(gains, known, strict=True):
        dominates = (gains >= gain).all(1) & (gains > gain).any(1) & known
        front.append(bool(is_known and not dominates.any()))
    return front
