"""The statistics of a comparison: which way a metric is better, paired differences, the Pareto front. Pure functions.

Differences are taken seed by seed, since a seed is a support set that both methods saw. Their interval is Student's t
(:mod:`~kngd_ray.experiment.aggregate`), each for one comparison alone. Of several comparisons one looks good by chance
more often than one in twenty times: whether a difference is significant is decided with Holm's
correction over the rows of a table, so that one table in twenty at most claims what is not there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kngd_ray.experiment.aggregate import EQUAL, LEVEL, possible, student

TIE = EQUAL
"""Differences up to this size are ties."""

_BETTER = {
    **dict.fromkeys(("accuracy", "auroc", "evidence", "log_posterior", "learned", "final"), 1),
    **dict.fromkeys(("nll", "ece", "brier", "aurc", "forgetting", "fit_s", "step_ms", "refused", "bytes_per_step"), -1),
    "covariance_bytes": -1,
}


@dataclass(frozen=True)
class Difference:
    """One method against another, over the seeds that both have.

    Attributes:
        seeds: the seeds.
        mean: of the differences.
        low: lower end of the 95 % interval of this difference alone; None for a single seed, and where all seeds have
            the same difference or learned from the same shots: by how much it may vary is then not known.
        high: its upper end.
        wins: seeds on which the first is better.
        ties: seeds on which they differ by at most :data:`TIE`.
        losses: seeds on which it is worse.
        p: how often noise gives such a difference; None without an interval.
        p_holm: the same among all differences that it is one of; `p` for one alone.
        one_support: whether all seeds learned from the same shots.
    """

    seeds: tuple[int, ...]
    mean: float
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int
    p: float | None
    p_holm: float | None
    one_support: bool = False

    @property
    def decided(self) -> bool:
        """Whether it is significant, corrected for all differences in its table."""
        return self.p_holm is not None and self.p_holm < 1 - LEVEL


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
    values: Mapping[int, float],
    baseline: Mapping[int, float],
    direction: int = 1,
    metric: str = "",
    *,
    one_support: bool = False,
) -> Difference | None:
    """The difference of two methods, paired by seed.

    Args:
        values: figure by seed.
        baseline: figure by seed of what it is compared with.
        direction: 1 where more is better, -1 where less is.
        metric: what the figure is; the interval ends where differences of such figures do.
        one_support: all seeds learned from the same shots.

    Returns:
        The difference; None without a common seed.
    """
    seeds = tuple(sorted(values.keys() & baseline.keys()))
    if not seeds:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds], float)
    low = high = p = None
    if len(seeds) > 1 and np.ptp(differences) > TIE and not one_support:
        found, (least, most) = student(differences.tolist()), possible(metric)
        low, high, p = max(found.low, least - most), min(found.high, most - least), found.p
    gains = differences * direction
    wins, losses = int((gains > TIE).sum()), int((gains < -TIE).sum())
    ties = len(seeds) - wins - losses
    return Difference(seeds, float(differences.mean()), low, high, wins, ties, losses, p, p, one_support)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's correction: p-values, each valid as if it were a single comparison's.

    Args:
        ps: p-values of comparisons that are looked at together.

    Returns:
        The corrected ones, in the same order.
    """
    corrected = [1.0] * len(ps)
    reached = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        reached = max(reached, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = reached
    return corrected


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
