"""Iterated steps of a nonlinear head end at the same weights on any number of ranks, in float32 and at scale 100."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.cones import in_both
from helpers.ranks import run_ranks
from torch import Tensor

from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training.fit import FitTask, fit

# what differs between rank counts is the order of sums: a float32 rounding
ROUNDING = 2**-24
# relative, by iterations: six of them; and as many as it takes, which may end one earlier, within the tolerance
BOUND = {6: 5e-4, 30: 5e-3}
CASES = {
    f"{family}/{observation}/{iterations}": (
        f"filter.covariance={family}",
        f"observation={observation}",
        f"filter.iterations={iterations}",
    )
    for family in ("kronecker", "{kind: diagonal, rule: ekf}")
    for observation in ("categorical", "log_likelihood")
    for iterations in (6, 30)
}


def bound(case: str) -> float:
    """How far apart the same fit may end."""
    return BOUND[int(case.rpartition("/")[2])]


def task_of(case: str) -> FitTask:
    """A bottleneck in a cone like that of CLIP's images, 36 shots in two passes."""
    options = ("preset=kalman_diagonal", "adapter=bottleneck", "epochs=2", "batch_size=12", *CASES[case])
    return in_both(3, *options, dtype=torch.float32)[1]


def fitted(group: Group) -> dict[str, Tensor]:
    """The weights (n,) that each case ends at."""
    return {case: fit(task_of(case), group=group).belief.mu for case in CASES}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return fitted(SingleProcess())


def test_two_ranks_end_where_one_does(alone):
    ranks = run_ranks(2, fitted)
    for case, mu in alone.items():
        assert torch.equal(ranks[0][case], ranks[1][case]), case
        assert max_error(ranks[0][case], mu) < bound(case), case


@pytest.mark.parametrize(
    "case", some_slow(CASES, "kronecker/categorical/6", "{kind: diagonal, rule: ekf}/log_likelihood/6")
)
def test_a_rounding_of_the_shots_does_not_grow(alone, case):
    task, signs = task_of(case), torch.Generator().manual_seed(0)
    x = task.support.features
    rounded = x * (1 + ROUNDING * (2 * torch.randint(2, x.shape, generator=signs) - 1))
    assert not torch.equal(rounded, x)
    moved = fit(replace(task, support=replace(task.support, features=rounded)))
    assert max_error(moved.belief.mu, alone[case]) < bound(case)


def test_the_iterations_do_something(alone):
    for case, mu in alone.items():
        one = replace(task_of(case).options.filter, iterations=1)
        task = task_of(case)
        plain = fit(replace(task, options=replace(task.options, filter=one)))
        assert max_error(plain.belief.mu, mu) > 1e-3, case
