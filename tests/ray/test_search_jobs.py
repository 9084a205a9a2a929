"""Searches on Ray Tune: the trials of one process, and what becomes of those whose process dies."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import cases, searching
from helpers.searching import Deadly, open_study, workload
from ray import cloudpickle

from kngd_ray.cluster import run_search
from kngd_ray.cluster.tune_job import _reason
from kngd_ray.config import TrainerConfig
from kngd_ray.errors import KngdError
from kngd_ray.tuning import Driver, Workload, fit_alone, parse_space, run_here

pytestmark = pytest.mark.ray

SPACE = parse_space({"filter.p0": {"low": 0.001, "high": 1.0, "log": True}})
MARKED = 0.1  # p0 of the first trial


@dataclass
class Search:
    """A search without a command around it."""

    folder: Path
    work: Workload
    driver: Driver
    ended: list[int]

    @property
    def results(self) -> list[Any]:
        return self.driver.study.results()

    @property
    def states(self) -> dict[int, str]:
        return {result.number: result.state for result in self.results}


def make(folder: Path, *settings: str, **options: Any) -> Search:
    options = {"num_samples": 6, "batch": 3, "sampler": "random", "seeds": (0, 1), **options}
    study = open_study(folder, SPACE, points=({"filter.p0": MARKED},), **options)
    ended: list[int] = []
    work = replace(workload(*settings), search=study.options)
    work = replace(work, shots=workload(seeds=study.options.seeds).shots)
    return Search(
        folder, work, Driver(study, lambda trial: None, lambda result, best: ended.append(result.number)), ended
    )


def deadly(search: Search) -> Workload:
    return Deadly(**{f.name: getattr(search.work, f.name) for f in fields(Workload)}, p0=MARKED)


@pytest.fixture(autouse=True)
def _helpers_travel_along() -> Iterator[None]:
    """Workers know the package, not the tests."""
    for module in (cases, searching):
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in (cases, searching):
        cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "settings", "options"),
    [
        ("local", (), {"objective": ("held_out_nll", "held_out_accuracy")}),
        pytest.param("batched", (), {"concurrency": 1}, marks=pytest.mark.slow),
        pytest.param(
            "train",
            (),
            {"num_samples": 1, "seeds": (0,), "objective": ("evidence", "held_out_nll")},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_trial_is_the_same_wherever_it_runs(mode, settings, options, ray_up: None, tmp_path: Path) -> None:
    on_ray, here = (make(tmp_path / name, *settings, **options) for name in ("ray", "here"))
    run_here(here.driver, here.work, fit_alone, 1)
    run_search(on_ray.driver, on_ray.work, TrainerConfig(num_workers=2), mode, on_ray.folder)
    assert sorted(on_ray.ended) == here.ended
    tolerance = 1e-9 if mode == "local" else 1e-4
    for found, expected in zip(on_ray.results, here.results, strict=True):
        assert (found.number, found.state, found.settings) == (expected.number, "finished", expected.settings)
        assert found.objective == pytest.approx(expected.objective, rel=tolerance)
        for name, scores in expected.figures["by_seed"].items():
            assert found.figures["by_seed"][name] == pytest.approx(scores, rel=tolerance)
    assert not list(on_ray.folder.glob(".trial-*")), "checkpoints of jobs do not outlive them"


@pytest.mark.slow  # a worker that dies in the middle of a job is among the quick ones: test_train_jobs.py
@pytest.mark.parametrize("mode", ["local", "batched"])
def test_a_trial_whose_process_dies_fails_alone(mode: str, ray_up: None, tmp_path: Path) -> None:
    """With others in its turn, all of them are tried again one by one."""
    search = make(tmp_path / "study", concurrency=1)
    run_search(search.driver, deadly(search), TrainerConfig(num_workers=2), mode, search.folder)
    assert search.states == {0: "failed", **dict.fromkeys(range(1, 6), "finished")}
    assert search.results[0].reason == "its process died (killed, out of memory, or its node is gone)"
    assert sorted(search.ended) == list(range(6)), "each is told of once"
    here = make(tmp_path / "here")
    run_here(here.driver, here.work, fit_alone, 1)
    for found, expected in zip(search.results[1:], here.results[1:], strict=True):
        assert found.objective == pytest.approx(expected.objective, rel=1e-4)


@pytest.mark.slow
def test_too_many_deaths_end_the_search(ray_up: None, tmp_path: Path) -> None:
    search = make(tmp_path / "study", max_failures=0, batch=1)
    with pytest.raises(KngdError, match=r"1 trials failed, more than search\.max_failures=0 allows.*process died"):
        run_search(search.driver, deadly(search), TrainerConfig(num_workers=2), "local", search.folder)
    assert search.states == {0: "failed"}


def test_asha_stops_those_that_are_behind(ray_up: None, tmp_path: Path) -> None:
    seeds = (0, 1, 2, 3)
    search = make(tmp_path / "study", scheduler="asha", seeds=seeds, num_samples=12, batch=6, concurrency=2)
    run_search(search.driver, search.work, TrainerConfig(num_workers=2), "local", search.folder)
    states = list(search.states.values())
    assert states.count("stopped") > 0
    assert states.count("finished") > 0
    assert len(states) == 12 == states.count("stopped") + states.count("finished")
    trials = search.driver.study.study.trials
    for result in search.results:
        judged = len(trials[result.number].intermediate_values)
        assert judged < len(seeds)
        if result.state == "stopped":
            assert judged >= 1
    finished = [result.objective["evidence"] for result in search.results if result.state == "finished"]
    assert search.driver.study.best()[0].objective["evidence"] == max(finished)


@pytest.mark.slow
def test_two_drivers_on_one_cluster(ray_up: None, tmp_path: Path) -> None:
    """The second one finds trials that a dead one had begun, and its own; all of it is one history."""
    whole, dead = make(tmp_path / "whole"), make(tmp_path / "study")
    run_here(whole.driver, whole.work, fit_alone, 1)
    dead.driver.study.claim(2)
    searching.die(dead.driver.study)
    heir = make(tmp_path / "study")
    run_search(heir.driver, heir.work, TrainerConfig(num_workers=2), "local", heir.folder)
    assert [result.settings for result in heir.results] == [result.settings for result in whole.results]
    assert set(heir.states.values()) == {"finished"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("The actor died unexpectedly before finishing this task.\n\tclass_name: X", "its process died (killed,"),
        ("Task was killed due to the node running low on memory.\nMore", "it ran out of memory: lower"),
        ("Traceback\n  File x\nValueError: a distinctive reason.", "a distinctive reason"),
        ("Traceback\nMemoryError", "MemoryError"),
        ("", "its process ended without a word"),
    ],
)
def test_reasons_are_one_line(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "error.txt"
    file.write_text(f"Failure # 1 (occurred at some time)\n{text}\n")
    found = _reason(SimpleNamespace(error_file=str(file)))
    assert found.startswith(says)
    assert "\n" not in found
    assert not found.endswith(".")


def test_a_trial_that_left_no_error_has_a_reason(tmp_path: Path) -> None:
    for path in (None, str(tmp_path / "none.txt")):
        assert _reason(SimpleNamespace(error_file=path)) == "its process ended without a word"
