"""In what a trial is run where ``search.trial`` leaves it open."""

from dataclasses import replace

import pytest
from helpers.searching import workload

from kngd_ray.tuning import mode, mode_of, parse_space

P0 = {"filter.p0": {"low": 0.001, "high": 1.0, "log": True}}
WIDER = {**P0, "adapter": {"choices": ["class_residual", "linear"]}}
FULLER = {**P0, "filter.covariance": {"choices": ["diagonal", "dense"]}}


def of(space: dict, trial: str = "auto", scheduler: str = "none") -> str:
    work = workload("adapter=class_residual")
    return mode_of(replace(work, search=replace(work.search, trial=trial, scheduler=scheduler)), parse_space(space))


@pytest.mark.parametrize("trial", ["local", "batched", "train"])
def test_what_is_asked_for(trial: str) -> None:
    assert of(P0, trial) == trial


def test_a_scheduler_looks_at_one_trial_at_a_time() -> None:
    assert of(P0) == "batched"
    assert of(P0, scheduler="asha") == "local"


@pytest.mark.parametrize("space", [P0, WIDER, FULLER], ids=["p0", "adapter", "covariance"])
def test_the_largest_covariance_in_the_space_decides(space: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for budget in (1, 1 << 40):
        monkeypatch.setattr(mode, "_SEVERAL", budget)
        found.append(of(space))
    assert found == ["local", "batched"]
    monkeypatch.setattr(mode, "_ONE_PROCESS", 1)
    assert of(space) == "train"


def test_a_space_of_large_choices_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    work = workload("adapter=class_residual")
    sizes = [
        max(mode._numbers(c, work) for c in mode._shapes(work.config, parse_space(s))) for s in (P0, WIDER, FULLER)
    ]
    assert sizes[0] <= sizes[1]
    assert sizes[0] < sizes[2]
