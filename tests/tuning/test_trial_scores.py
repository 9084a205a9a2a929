"""What a trial is judged by: the same by whatever process, on training shots alone, and one that fails alone."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import CLASSES, some_slow
from helpers.compare import max_error
from helpers.pretended_device import pretended_device
from helpers.searching import open_study, workload

from kngd_ray.config import override
from kngd_ray.errors import FilterError, KngdError, StorageError
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import calibrate
from kngd_ray.training.fit import FitTask, Towers
from kngd_ray.tuning import (
    Driver,
    Fitter,
    TrialResult,
    Workload,
    fit_alone,
    fit_together,
    parse_space,
    run_here,
    score_trials,
)
from kngd_ray.tuning.driver import Report
from kngd_ray.tuning.objective import TrialScores

BOTH = ("evidence", "held_out_nll", "held_out_accuracy")
PRIORS = [{"filter.p0": 0.01 * 3**n, "noise.process.q": 1e-4 * n, "observation.0.r0": 0.5 + n} for n in range(5)]


def judged(trials: Sequence[dict], work: Workload, fitter: Fitter = fit_alone) -> list[TrialScores]:
    *_, last = score_trials(trials, work, fitter)
    return last


def test_objectives_come_one_support_set_at_a_time() -> None:
    work = workload(objective=BOTH, seeds=(3, 1, 2))
    counts = []
    for found in score_trials(PRIORS[:2], work, fit_alone):
        counts.append([len(one.scores[name]) for one in found for name in BOTH])
        assert all(isfinite(value) for one in found for value in one.objective.values())
    assert counts == [[n] * 6 for n in (1, 2, 3)]
    assert found[0].scores["evidence"] != found[1].scores["evidence"]
    for seed, score in zip((3, 1, 2), zip(*found[0].scores.values(), strict=True), strict=True):
        (alone,) = judged(PRIORS[:1], replace(work, search=replace(work.search, seeds=(seed,))))
        assert tuple(alone.objective.values()) == score, "each support set by itself, in the order of search.seeds"


@pytest.mark.parametrize("fitter", some_slow([fit_alone, fit_together], fit_together))
def test_all_support_sets_at_once_are_the_same(fitter: Fitter) -> None:
    work = workload(objective=BOTH)
    (at_once,) = score_trials(PRIORS[:3], work, fitter, at_once=True)
    for one, other in zip(at_once, judged(PRIORS[:3], work), strict=True):
        for name in BOTH:
            assert one.scores[name] == pytest.approx(other.scores[name], rel=1e-4)


@pytest.mark.parametrize("fitter", some_slow([fit_alone, fit_together], fit_together))
def test_a_device_gives_the_same(fitter: Fitter) -> None:
    work = workload(objective=BOTH, seeds=(0,))
    expected = judged(PRIORS[:2], work, fitter)
    with pretended_device() as machine:
        found = judged(PRIORS[:2], work, partial(fitter, device=machine.device))
        assert machine.counts.kernels.total() > 0
    for one, other in zip(found, expected, strict=True):
        assert one.reason is None
        for name in BOTH:
            assert one.scores[name] == pytest.approx(other.scores[name], rel=1e-4)


def test_held_out_objectives_are_those_of_the_calibration() -> None:
    work = workload(objective=BOTH)
    (found,) = judged([PRIORS[1]], work)
    config = override(work.config, PRIORS[1])
    for n, seed in enumerate(work.search.seeds):
        task = FitTask(config.fit_options, seed, work.shots[seed], work.class_embeddings, work.logit_scale)
        expected = calibrate(task, config.posterior)
        assert found.scores["held_out_nll"][n] == pytest.approx(expected.held_out_nll, abs=1e-12)
        assert found.scores["held_out_accuracy"][n] == expected.held_out_accuracy
        assert found.figures["tau"][n] == expected.tau
        assert found.figures["sharpening"][n] == expected.sharpening


@pytest.mark.parametrize(
    "settings",
    [
        (),
        pytest.param(("filter.gate=skip", "filter.gate.quantile=0.9"), marks=pytest.mark.slow),
        pytest.param(("noise.observation=ema", "noise.process=ornstein_uhlenbeck"), marks=pytest.mark.slow),
        ("filter.covariance=kronecker",),
        pytest.param(("adapter=linear", "observation=probability"), marks=pytest.mark.slow),
    ],
    ids=["plain", "gate", "noise", "kronecker", "linear"],
)
def test_together_or_alone_is_the_same(settings: tuple[str, ...]) -> None:
    priors = [{"filter.p0": 0.01 * 3**n, "observation.0.r0": 0.5 + n} for n in range(3)]
    work = workload(*settings, objective=BOTH)
    alone, together = judged(priors, work), judged(priors, work, fit_together)
    for one, other in zip(alone, together, strict=True):
        for name in BOTH:
            assert max_error(torch.tensor(other.scores[name]), torch.tensor(one.scores[name])) < 1e-4, name
    by_itself = [judged([prior], work, fit_together)[0].objective for prior in priors]
    assert by_itself == [one.objective for one in alone], "a group of one is a fit alone"


def test_trials_of_several_shapes_keep_their_order() -> None:
    work = workload(objective=BOTH)
    mixed = [
        {**prior, "adapter": ("linear", "class_residual")[n % 2], "epochs": 1 + n % 3} for n, prior in enumerate(PRIORS)
    ]
    for one, other in zip(judged(mixed, work), judged(mixed, work, fit_together), strict=True):
        assert other.objective == pytest.approx(one.objective, rel=1e-4)


@pytest.mark.parametrize("fitter", [fit_alone, fit_together])
def test_the_default_is_judged_by_the_same_objectives(fitter: Fitter) -> None:
    work = workload("preset=kalman", "filter.logit_spread=0", objective=BOTH)
    few, many = judged([{"filter.logit_variance": v} for v in (10.0, 1000.0)], work, fitter)
    for one in (few, many):
        assert one.reason is None
        assert all(isfinite(value) for value in one.objective.values())
    assert few.objective != many.objective


@pytest.mark.parametrize("fitter", [fit_alone, fit_together])
def test_log_posterior_is_the_held_out_log_probability_and_the_prior_of_the_settings(fitter: Fitter) -> None:
    space = parse_space({"filter.p0": {"low": 1e-3, "high": 3.0, "log": True, "median": 0.1, "spread": 1.0}})
    work = replace(workload(objective=("log_posterior",)), space=space)
    priors = [{"filter.p0": 0.1}, {"filter.p0": 0.3}]
    different = len({shot.numpy().tobytes() for shots in work.shots.values() for shot in shots.features})
    assert different > len(work.shots[work.search.seeds[0]])  # than of one support set: the prior counts once
    for prior, found in zip(priors, judged(priors, work, fitter), strict=True):
        for n in range(len(work.search.seeds)):
            expected = space.log_prior(prior) / different - found.figures["held_out_nll"][n]
            assert found.scores["log_posterior"][n] == pytest.approx(expected, abs=1e-12)


def test_support_sets_of_the_same_shots_count_as_one() -> None:
    work = workload(objective=("log_posterior",))
    (first, *_) = work.shots.values()
    assert replace(work, shots=dict.fromkeys(work.shots, first)).different == len(first)


def test_single_shots_say_nothing_so_that_the_prior_decides() -> None:
    space = parse_space({"filter.p0": {"low": 1e-3, "high": 3.0, "log": True, "median": 0.1, "spread": 1.0}})
    work = replace(workload(objective=("log_posterior",)), space=space)
    firsts = {
        seed: shots.subset(torch.tensor([int((shots.labels == c).nonzero()[0]) for c in shots.labels.unique()]))
        for seed, shots in work.shots.items()
    }
    median, wide = judged([{"filter.p0": 0.1}, {"filter.p0": 3.0}], replace(work, shots=firsts))
    assert median.objective["log_posterior"] == 0
    assert wide.objective["log_posterior"] < 0


def test_gradient_methods_are_judged_by_held_out_shots() -> None:
    work = workload("method=adamw", objective=("held_out_nll", "held_out_accuracy"))
    slow, fast = judged([{"optimizer.lr": 1e-6}, {"optimizer.lr": 1e-2}], work)
    assert slow.objective["held_out_nll"] != fast.objective["held_out_nll"]


@pytest.mark.parametrize("fitter", some_slow([fit_alone, fit_together], fit_together))
def test_a_bad_combination_of_settings_fails_alone(fitter: Fitter) -> None:
    bad = {"filter.gate.quantile": 0.9}  # of no gate
    good, failed, other = judged([PRIORS[0], bad, PRIORS[2]], workload(objective=BOTH), fitter)
    assert failed.reason is not None
    assert "filter.gate is none" in failed.reason
    assert failed.scores == {}
    assert [one.reason for one in (good, other)] == [None, None]
    expected = judged([PRIORS[0], PRIORS[2]], workload(objective=BOTH), fitter)
    assert [good.objective, other.objective] == [one.objective for one in expected]


@pytest.mark.parametrize("fitter", [fit_alone, fit_together])
def test_a_fit_that_diverges_fails_alone_and_is_not_fitted_again(fitter: Fitter) -> None:
    work = workload(objective=("evidence",))
    asked: list[int] = []

    def counting(tasks: Sequence[FitTask]) -> list[Any]:
        asked.append(len(tasks))
        return fitter(tasks)

    wild = {"filter.p0": 1e38, "observation.0.r0": 1e-30}
    good, failed, other = judged([PRIORS[0], wild, PRIORS[2]], work, counting)
    assert failed.reason is not None
    assert failed.reason.startswith("on the support set of seed 0: ")
    assert asked == [3, 2]
    for one, prior in ((good, PRIORS[0]), (other, PRIORS[2])):
        assert one.objective == pytest.approx(judged([prior], work)[0].objective, rel=1e-4)


def test_no_passes_at_all_is_no_crash() -> None:
    (found,) = judged([{"epochs": 0}], workload(objective=BOTH))
    assert found.reason is not None or all(isfinite(value) for value in found.objective.values())


def test_a_workload_has_no_test_pictures() -> None:
    """Whatever can be reached from it: shots by seed of the support set, their features, text embeddings, settings."""
    work = workload(objective=BOTH)
    sizes = [len(tensor) for tensor in tensors(work)]
    assert sorted(sizes) == sorted([16, 16, 16, 16, CLASSES])
    allowed = {"config", "search", "shots", "features", "class_embeddings", "logit_scale", "towers", "space"}
    assert {f.name for f in fields(Workload)} == allowed
    assert {f.name for f in fields(Towers)} == {"model", "class_names", "templates"}
    assert {f.name for f in fields(Support)} == {"features", "labels", "crops"}


def tensors(found: Any) -> list[torch.Tensor]:
    """All tensors that an object leads to."""
    if isinstance(found, torch.Tensor):
        return [found]
    if is_dataclass(found):
        return [t for f in fields(found) for t in tensors(getattr(found, f.name))]
    if isinstance(found, dict):
        return [t for value in found.values() for t in tensors(value)]
    if isinstance(found, (list, tuple)):
        return [t for value in found for t in tensors(value)]
    assert found is None or isinstance(found, (str, int, float, bool)), found
    return []


# The driver


class Told:
    """A search in this process, and what its driver says of it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        space = parse_space({"filter.p0": {"low": 0.001, "high": 1.0, "log": True}})
        self.study = open_study(folder / "study", space, points=({"filter.p0": 0.1},), **options)
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.driver = Driver(self.study, lambda trial: self.begun.append(trial.number), self._end)
        self.work = replace(workload(objective=("evidence",)), search=self.study.options)

    def _end(self, result: TrialResult, best: dict[str, float]) -> None:
        self.ended.append(result.number)
        assert not result.objective or best["evidence"] >= result.objective["evidence"]

    def run(self, fitter: Fitter, size: int = 1) -> list[str]:
        run_here(self.driver, self.work, fitter, size)
        return [result.state for result in self.study.results()]


@pytest.mark.parametrize("size", [1, 4])
def test_a_search_in_this_process(tmp_path: Path, size: int) -> None:
    told = Told(tmp_path, num_samples=8, seeds=(0, 1))
    assert told.run(fit_alone, size) == ["finished"] * 8
    assert told.begun == told.ended == list(range(8))
    result = told.study.results()[3]
    (expected,) = judged([result.settings], told.work)
    assert result.objective == expected.objective
    assert result.figures["by_seed"] == expected.scores


def test_failures_end_the_search_when_they_are_too_many(tmp_path: Path) -> None:
    told = Told(tmp_path, num_samples=8, seeds=(0, 1), max_failures=2)

    def failing(tasks: Sequence[FitTask]) -> list[Any]:
        return [FilterError("a distinctive reason.") for _ in tasks]

    assert told.run(failing) == ["failed"] * 3
    assert isinstance(told.driver.problem, KngdError)
    assert "3 trials failed, more than search.max_failures=2 allows" in str(told.driver.problem)
    assert "on the support set of seed 0: a distinctive reason" in str(told.driver.problem)
    assert told.begun == told.ended == [0, 1, 2]


def test_a_report_of_what_is_done_says_nothing_new(tmp_path: Path) -> None:
    """Tune tells the last report of a turn twice, and of several trials one may have failed early."""
    told = Told(tmp_path, num_samples=2, seeds=(0, 1))
    trials = told.driver.claim(2)
    failed = Report(scores={}, figures={}, reason="it diverged")
    half, whole = (Report(scores={"evidence": [-1.0] * n}, figures={}, reason=None) for n in (1, 2))
    assert not told.driver.heard(trials, [failed, half])
    assert told.driver.heard(trials, [failed, whole])
    assert told.driver.heard(trials, [failed, whole])
    assert [result.state for result in told.study.results()] == ["failed", "finished"]
    assert told.ended == [0, 1]


def test_what_cannot_be_written_ends_the_search(tmp_path: Path) -> None:
    told = Told(tmp_path, num_samples=8, seeds=(0, 1))

    def full(result: TrialResult, best: dict[str, float]) -> None:
        raise StorageError("no space left")

    told.driver = Driver(told.study, lambda trial: None, full)
    assert told.run(fit_alone) == ["finished"]
    assert isinstance(told.driver.problem, StorageError)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_a_fit_cannot_explain_fails_one_trial(tmp_path: Path, error: Exception) -> None:
    """Of several that ran together it is not known which it was: they are tried again one by one."""
    told = Told(tmp_path, num_samples=8, seeds=(0, 1))

    def bursting(tasks: Sequence[FitTask]) -> list[Any]:
        if any(task.options.filter.p0 == 0.1 for task in tasks):
            raise error
        return fit_alone(tasks)

    assert told.run(bursting, 4) == ["failed"] + ["finished"] * 7
    assert told.study.results()[0].reason
    assert sorted(told.begun) == sorted(told.ended) == list(range(8))
