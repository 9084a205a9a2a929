"""What a step costs at least: its arithmetic at the rate of a large product, its bytes at that of a copy.

The model and its formulas are in the package's docstring.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.step_cost.cases import REFERENCE, Case, families
from kngd_ray.filters import DiagonalLowRank, Family
from kngd_ray.filters._products import product

_REPEATS = 5


@dataclass(frozen=True)
class Rates:
    """What the machine does at best.

    Attributes:
        flops: per second, of a product of two 1024 x 1024 float32 matrices, as filters make large ones.
        bytes: per second read and written, of a copy of 256 MB.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, device: str, threads: int | None = None) -> "Rates":
        """The best of a few repeats, with as many threads as torch has now or as are given."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        a, b = torch.randn(2, 1024, 1024, device=device)
        source = torch.zeros(1 << 26, device=device)
        target = torch.empty_like(source).copy_(source)
        found = cls(
            2 * 1024**3 / _best(lambda: product(a, b), device),
            2 * source.nbytes / _best(lambda: target.copy_(source), device),
        )
        torch.set_num_threads(before)
        return found


def _best(work: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, rates: Rates) -> float:
        """The floor."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def work_of(method: str, case: Case) -> Work | None:
    """What a method must do on a case, by the formulas in the package's docstring.

    Args:
        method: name of the method.
        case: head and batch.

    Returns:
        Its arithmetic and its bytes; None for a family that has no formula.
    """
    n, m, M = case.n, case.m, case.m * case.k
    behind = n - case.layers[0].size  # weights that derivatives pass on their way to the first layer
    if method == REFERENCE:
        return Work(2 * m * (2 * n + behind), 28 * n)
    common = Work(2 * m * n + 2 * M * behind + 2 * m * n + M**3, 12 * n)
    if method == "naive":
        return common + Work(3 * M**2 * n + 3 * M * n, 28 * M * n)
    form = _FORMULAS.get(method)
    return None if form is None else common + form(families()[method], case)


def _ekf(family: Family, case: Case) -> Work:
    return Work(2 * case.m * (case.m + 1) * case.n, 12 * case.n)


def _vdekf(family: Family, case: Case) -> Work:
    return Work(case.m * (case.m + 1) * case.n + 2 * case.m * case.n, 12 * case.n)


def _kronecker(family: Family, case: Case) -> Work:
    m, M = case.m, case.m * case.k
    flops = sum(3 * (m * y.i**2 + M * y.o**2) + 3 * (m**2 * y.i + M**2 * y.o) for y in case.layers)
    return Work(flops, sum(12 * (y.i**2 + y.o**2) for y in case.layers))


def _block_diagonal(family: Family, case: Case) -> Work:
    numbers = sum(map(family.cost, case.layers))
    return Work(3 * case.m * numbers + 2 * case.m**2 * case.n, 12 * numbers)


def _diagonal_low_rank(family: Family, case: Case) -> Work:
    assert isinstance(family, DiagonalLowRank)
    m, r = case.m, family.rank
    return Work((m * (m + 3) + 6 * m * r + 4 * r**2) * case.n, 12 * (r + 1) * case.n)


_FORMULAS: Mapping[str, Callable[[Family, Case], Work]] = {
    "diagonal ekf": _ekf,
    "diagonal vdekf": _vdekf,
    "kronecker": _kronecker,
    "block_diagonal": _block_diagonal,
    "diagonal_low_rank": _diagonal_low_rank,
}
