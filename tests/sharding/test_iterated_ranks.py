"""Iterated steps of a nonlinear head end at the same weights on any number of ranks, in float32 and at scale 100."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

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

# every family, observation and number of iterations
TAKING_TURNS = ["kronecker/categorical/6", "{kind: diagonal, rule: ekf}/log_likelihood/30"]


def bound(case: str) -> float:
    """How far apart the same fit may end."""
    return BOUND[int(case.rpartition("/")[2])]


def task_of(case: str) -> FitTask:
    """A bottleneck in a cone like that of CLIP's images, 36 shots in two passes."""
    options = ("preset=kalman_diagonal", "adapter=bottleneck", "epochs=2", "batch_size=12", *CASES[case])
    return in_both(3, *options, dtype=torch.float32)[1]


def fitted(group: Group, cases: Sequence[str]) -> dict[str, Tensor]:
    """The weights (n,) that each case ends at."""
    return {case: fit(task_of(case), group=group).belief.mu for case in cases}


@cache
def alone(case: str) -> Tensor:
    """In one process."""
    return fitted(SingleProcess(), [case])[case]


@pytest.mark.parametrize(
    "cases",
    [TAKING_TURNS, pytest.param([case for case in CASES if case not in TAKING_TURNS], marks=pytest.mark.slow)],
    ids=["taking turns", "the others"],
)
def test_two_ranks_end_where_one_does(cases):
    ranks = run_ranks(2, fitted, cases)
    for case in cases:
        assert torch.equal(ranks[0][case], ranks[1][case]), case
        assert max_error(ranks[0][case], alone(case)) < bound(case), case


@pytest.mark.parametrize("case", some_slow(CASES, *TAKING_TURNS))
def test_a_rounding_of_the_shots_does_not_grow(case):
    task, signs = task_of(case), torch.Generator().manual_seed(0)
    x = task.support.features
    rounded = x * (1 + ROUNDING * (2 * torch.randint(2, x.shape, generator=signs) - 1))
    assert not torch.equal(rounded, x)
    moved = fit(replace(task, support=replace(task.support, features=rounded)))
    assert max_error(moved.belief.mu, alone(case)) < bound(case)


@pytest.mark.parametrize("case", some_slow(CASES, *TAKING_TURNS))
def test_the_iterations_do_something(case):
    task = task_of(case)
    one = replace(task.options.filter, iterations=1)
    plain = fit(replace(task, options=replace(task.options, filter=one)))
    assert max_error(plain.belief.mu, alone(case)) > 1e-3
