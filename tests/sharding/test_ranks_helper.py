"""The multi-rank helper itself: it names who failed, and it never hangs."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cases import make_options, make_task
from helpers.failing import FailsOnOneRank
from helpers.ranks import RankError, run_ranks
from helpers.resuming import IDENTITY

from kngd_ray.sharding import Group
from kngd_ray.training.job import Job, run_fits


def add_ranks(group: Group, offset: int) -> float:
    return float(group.sum(torch.tensor([group.rank + offset])))


def fail_on_the_last_rank(group: Group) -> None:
    if group.rank == group.world_size - 1:
        raise ValueError("a distinctive reason")
    group.sum(torch.ones(1))  # waits for a rank that will never come


def die_on_rank_one(group: Group) -> None:
    if group.rank == 1:
        os._exit(7)
    group.sum(torch.ones(1))


def stay_away_on_rank_zero(group: Group) -> None:
    if group.rank == 0:
        time.sleep(600)
    group.sum(torch.ones(1))


def test_results_come_in_rank_order():
    assert run_ranks(2, add_ranks, 10) == [21.0, 21.0]


def test_the_failing_rank_is_named():
    with pytest.raises(RankError, match=r"rank 2 failed(?s:.*)a distinctive reason"):
        run_ranks(3, fail_on_the_last_rank)


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match="rank 1 died without a word, exit code 7"):
        run_ranks(2, die_on_rank_one)


def test_a_rank_that_hangs_is_shown_with_its_stack():
    with pytest.raises(RankError, match=r"did not finish in 2 s(?s:.*)stay_away_on_rank_zero"):
        run_ranks(2, stay_away_on_rank_zero, timeout=2)


def fit_that_fails_on_rank_one(group: Group, folder: Path, reason: str) -> None:
    task = make_task(make_options())
    support = FailsOnOneRank(task.support.features, task.support.labels, rank=1, reason=reason)
    run_fits(Job({"fit": replace(task, support=support)}, IDENTITY, folder), lambda event: None, group=group)


@pytest.mark.parametrize(
    ("reason", "says"),
    [("ValueError", r"rank 1 failed(?s:.*)a distinctive reason"), ("death", "rank 1 died without a word, exit code 7")],
)
def test_a_rank_that_fails_in_the_middle_of_a_fit_is_named(reason, says, tmp_path):
    """Before the collective that the others wait in gives up, after 30 minutes: longer than a test may last."""
    with pytest.raises(RankError, match=says):
        run_ranks(3, fit_that_fails_on_rank_one, tmp_path, reason)
