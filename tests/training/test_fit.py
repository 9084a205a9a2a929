"""The step loop: what it reports, what it skips, when it gives up."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import make_options, make_task

from kngd_ray.errors import FilterError
from kngd_ray.observations import flatten, trainable
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.batches import Support
from kngd_ray.training.fit import FitTask, build_head, build_method, fit

METHODS = ["kalman", "adamw", "sgd"]


def poisoned(task: FitTask, samples: range) -> FitTask:
    """The same task with some shots' features NaN."""
    features = task.support.features.clone()
    features[list(samples)] = float("nan")
    return replace(task, support=Support(features, task.support.labels))


@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_reported_in_order(method):
    task, records = make_task(make_options(method=method)), []
    fit(task, on_step=records.append)
    assert [r.step for r in records] == list(range(1, 7))
    assert {r.steps for r in records} == {6}
    assert all(r.milliseconds > 0 and r.stats is not None for r in records)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_is_its_steps(method):
    task = make_task(make_options(method=method))
    by_hand = build_method(task, build_head(task), SingleProcess())
    for step in range(task.sampler.steps):
        by_hand.step(task.sampler.batch(step))
    assert torch.equal(flatten(trainable(fit(task).head)), flatten(trainable(by_hand.head)))


@pytest.mark.parametrize("method", METHODS)
def test_single_refused_steps_are_skipped(method):
    """One NaN shot in batches of one: as if that batch had never come."""
    task = poisoned(make_task(make_options(method=method, batch_size=1, epochs=1)), range(4, 5))
    records = []
    found = fit(task, on_step=records.append)
    refused = [r.step for r in records if r.stats is None]
    assert len(refused) == 1
    by_hand = build_method(task, build_head(task), SingleProcess())
    for step in range(task.sampler.steps):
        if step + 1 not in refused:
            by_hand.step(task.sampler.batch(step))
    assert torch.equal(flatten(trainable(found.head)), flatten(trainable(by_hand.head)))


@pytest.mark.parametrize("method", METHODS)
def test_ten_refused_steps_in_a_row_end_the_fit(method):
    task, records = poisoned(make_task(make_options(method=method, batch_size=1)), range(15)), []
    with pytest.raises(FilterError, match="10 steps in a row were refused, the last at step 10"):
        fit(task, on_step=records.append)
    assert len(records) == 9


def test_nine_refused_steps_do_not():
    task, records = poisoned(make_task(make_options(batch_size=1, epochs=1), shots=10), range(9)), []
    fit(task, on_step=records.append)
    assert sum(r.stats is None for r in records) == 9


def test_a_short_fit_that_never_moved_has_failed():
    task = poisoned(make_task(make_options(batch_size=3, epochs=1), shots=9), range(9))
    with pytest.raises(FilterError, match="3 steps in a row were refused"):
        fit(task)


def test_a_good_step_starts_the_count_again():
    """Fourteen NaN shots of fifteen, twice: 28 refused steps, but never ten in a row with this seed."""
    for seed in range(200):
        task = poisoned(make_task(make_options(batch_size=1, epochs=2), shots=14, seed=seed), range(12))
        bad = [bool(task.sampler.batch(s).inputs.isnan().any()) for s in range(28)]
        longest = max(len(run) for run in "".join("x" if b else " " for b in bad).split())
        if sum(bad) >= 20 and longest < 10:
            break
    else:
        pytest.fail("no seed spreads the good shots")
    records = []
    fit(task, on_step=records.append)
    assert [r.stats is None for r in records] == bad


def test_checkpoints_come_on_time_and_once_at_the_end():
    calls = []
    fit(make_task(make_options()), on_checkpoint=lambda done, method: calls.append(done), checkpoint_every=2)
    assert calls == [2, 4, 6]
    calls.clear()
    fit(make_task(make_options()), on_checkpoint=lambda done, method: calls.append(done))
    assert calls == [6]


def test_no_epochs_leaves_the_initial_head():
    task = make_task(make_options(epochs=0))
    assert torch.equal(flatten(trainable(fit(task).head)), flatten(trainable(build_head(task))))
