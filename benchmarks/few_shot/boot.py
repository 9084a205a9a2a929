"""Bootstrap intervals over problems and support sets.

A problem is a (data, domain, shots), the support sets of a data set are numbered by seed, and fewer shots of a seed are
part of more. A replicate therefore draws, for each data set by itself (the strata), its problems and its seeds, and
takes every drawn problem on every drawn seed. Each problem counts the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import numpy.typing as npt
import pandas as pd

from kngd_ray.experiment.aggregate import student

REPLICATES = 2000
_SEED = 7
PROBLEM = ["data", "domain", "shots"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval: the bootstrap's over problems, Student's t over the few seeds of one."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """The same in other units."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


NOTHING = Interval(nan, nan, nan)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over the support sets of one problem; nothing is resampled, they are too few."""
    array = np.asarray(values, float)
    array = array[~np.isnan(array)]
    if not len(array):
        return NOTHING
    if len(array) == 1 or not np.isfinite(array).all():
        return exactly(float(array.mean()))
    found = student(array.tolist())
    return Interval(found.mean, found.low, found.high)


def grids(frame: pd.DataFrame, value: str) -> list[Array]:
    """For each data set the values (problems, seeds); a problem without all seeds of its data set is left out.

    Args:
        frame: a row for each problem and seed.
        value: which column; problems without it are left out.

    Returns:
        The matrices.
    """
    found = []
    for _, part in frame.dropna(subset=[value]).groupby("data", sort=True):
        grid = part.pivot_table(index=["domain", "shots"], columns="seed", values=value).dropna(how="any")
        if grid.size:
            found.append(grid.to_numpy(float))
    return found


def over_problems(strata: Sequence[Array], *, absolute: bool = False) -> Interval:
    """Mean over the problems of all data sets.

    Args:
        strata: for each data set the values (problems, seeds).
        absolute: of each problem's mean over the support sets take the absolute value.

    Returns:
        The figure.
    """
    if not strata:
        return NOTHING
    rng = np.random.default_rng(_SEED)
    size: Callable[[Array], Array] = np.abs if absolute else np.asarray
    total = sum(len(grid) for grid in strata)
    sums = np.zeros(REPLICATES)
    for grid in strata:
        problems, seeds = _drawn(rng, *grid.shape, REPLICATES)
        sums += size(grid[problems[:, :, None], seeds[:, None, :]].mean(2)).sum(1)
    return _interval(sum(float(size(grid.mean(1)).sum()) for grid in strata) / total, sums / total)


def replicates(shapes: Sequence[tuple[int, int]], count: int) -> Iterator[list[tuple[Array, Array]]]:
    """Draws of problems and seeds for statistics that are no means.

    Args:
        shapes: for each data set the numbers of problems and seeds.
        count: of replicates.

    Yields:
        For each data set the problems and the seeds that were drawn.
    """
    rng = np.random.default_rng(_SEED)
    for _ in range(count):
        yield [tuple(draw[0] for draw in _drawn(rng, *shape, 1)) for shape in shapes]  # type: ignore[misc]


def _drawn(rng: np.random.Generator, problems: int, seeds: int, count: int) -> tuple[Array, Array]:
    return rng.integers(problems, size=(count, problems)), rng.integers(seeds, size=(count, seeds))


def exactly(value: float) -> Interval:
    """A figure that nothing is drawn for."""
    return Interval(value, value, value)


def of_replicates(value: float, drawn: Sequence[float]) -> Interval:
    """A statistic and the middle 95 % of its replicates."""
    return _interval(value, np.asarray(drawn, float))


def _interval(mean: float, drawn: Array) -> Interval:
    # not interpolated: a share of the replicates may be infinite
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return Interval(mean, float(low), float(high))


def paired(frame: pd.DataFrame, first: tuple[str, str], second: tuple[str, str]) -> pd.DataFrame:
    """Differences of two methods on the same problems and support sets.

    Args:
        frame: all rows.
        first: method and figure.
        second: method and figure that is subtracted.

    Returns:
        A row for each problem and seed that both have, with ``difference``.
    """
    keys = [*PROBLEM, "seed"]
    a, b = (
        frame.loc[frame["method"] == method, [*keys, figure]].rename(columns={figure: name})
        for name, (method, figure) in (("a", first), ("b", second))
    )
    both = a.merge(b, on=keys)
    return both.assign(difference=both["a"] - both["b"])


def won(
    frame: pd.DataFrame, lower_is_better: bool, interval: Callable[[Sequence[float]], Interval] = over_seeds
) -> str:
    """Wins / ties / losses over problems; a tie is where the interval over support sets contains 0.

    Args:
        frame: differences.
        lower_is_better: whether a negative one is a win.
        interval: of the differences of one problem.

    Returns:
        ``wins/ties/losses``.
    """
    counts = [0, 0, 0]
    for _, part in frame.dropna(subset=["difference"]).groupby(PROBLEM):
        found = interval(part["difference"].tolist())
        sign = 0 if found.low <= 0 <= found.high else (1 if found.mean > 0 else -1)
        counts[1 - (-sign if lower_is_better else sign)] += 1
    return "/".join(map(str, counts))
