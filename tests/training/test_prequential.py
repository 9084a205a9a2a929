"""Fits in the order in which labels can be predicted before they are learned from, and the evidence taken from them."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import ADAPTERS, CLASSES, FAMILIES, in_turn, make_options, make_support, make_task
from helpers.compare import max_error

from kngd_ray.errors import FilterError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.batches import BatchSampler
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.fit import StepRecord, begin, fit
from kngd_ray.training.method import StepStats
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import TAU_GRID, PosteriorOptions
from kngd_ray.tuning import Fitted, fit_alone
from kngd_ray.tuning.fitting import evidence


def test_each_batch_is_visited_as_often_as_there_are_epochs_before_the_next():
    support = make_support(15)
    usual = BatchSampler(support, 7, 3, seed=4)
    ordered = BatchSampler(support, 7, 3, seed=4, prequential=True)
    assert ordered.steps == usual.steps == 9
    for step in range(9):
        batch = ordered.batch(step)
        assert torch.equal(batch.labels, usual.batch(step // 3).labels)
        assert batch.step == step
        assert batch.scored == (step % 3 == 0)
        assert not usual.batch(step).scored


@pytest.mark.parametrize(("family", "adapter"), in_turn(FAMILIES, ADAPTERS))
def test_a_scored_batch_is_predicted_as_the_linearised_posterior_would(family, adapter):
    options = make_options(family, adapter=adapter, process="ornstein_uhlenbeck", epochs=2)
    task = replace(make_task(options), prequential=True)
    method, sampler = begin(task, SingleProcess()), task.sampler
    anchor = method.belief.mu
    for step in range(3):
        batch = sampler.batch(step)
        transition = options.noise.process.transition(step, options.filter.p0)
        before = replace(method.belief, mu=method.belief.mu.clone())
        expected = None
        if batch.scored:
            method.posterior.belief = method.posterior.filter.predict(before, transition, anchor)
            method.posterior.go_on(method.belief, method.noise)
            predictor = predictor_of(method, PosteriorOptions(predict="linearised"))
            p = [predictor.predict(batch.inputs, tau).probabilities for tau in TAU_GRID]
            expected = [float(each.gather(1, batch.labels.unsqueeze(1)).log().sum()) for each in p]
            method.posterior.go_on(before, method.noise)
        found = method.step(batch).log_predictive
        assert (found is None) == (expected is None)
        if expected is not None:
            assert max_error(torch.tensor(found), torch.tensor(expected)) < 1e-4


def test_scoring_does_not_change_the_fit():
    task = replace(make_task(make_options(process="ornstein_uhlenbeck")), prequential=True)
    method, sampler = begin(task, SingleProcess()), task.sampler
    for step in range(sampler.steps):
        method.step(replace(sampler.batch(step), scored=False))
    assert torch.equal(method.belief.mu, fit(task).belief.mu)


def test_a_gradient_method_predicts_by_its_weights():
    task = replace(make_task(FitOptions(method="adamw", epochs=2, batch_size=7)), prequential=True)
    records = []
    fit(task, on_step=records.append)
    for record in records:
        scored = record.step % 2 == 1
        assert (record.stats.log_predictive is not None) == scored
        if scored:
            batch = task.sampler.batch(record.step - 1)
            assert record.stats.log_predictive == pytest.approx((-record.stats.nll * batch.total,))


def steps(*scores: tuple[float, ...] | None) -> list[StepRecord]:
    return [
        StepRecord(n, len(scores), 1.0, StepStats(nll=1.0, accuracy=0.5, log_predictive=score))
        for n, score in enumerate(scores, start=1)
    ]


def test_evidence_is_of_the_later_half_at_the_best_tau():
    records = steps((-90.0, -90.0), None, (-80.0, -80.0), None, (-8.0, -4.0), None, (-2.0, -3.0), None)
    assert evidence(Fitted(None, records, [4] * 8)) == pytest.approx(-7 / 8)


def test_evidence_of_two_batches_is_that_of_the_second():
    assert evidence(Fitted(None, steps((-9.0,), (-4.0,)), [8, 2])) == pytest.approx(-2.0)


def test_a_refused_step_leaves_no_evidence():
    records = steps((-9.0,), (-4.0,))
    records[1] = replace(records[1], stats=None, refused="nu is NaN")
    with pytest.raises(FilterError, match="step 2 of 2 was refused: nu is NaN"):
        evidence(Fitted(None, records, [8, 8]))


def test_better_priors_have_more_evidence():
    """A prior so narrow that nothing is learned says less of the labels to come than one that lets it learn."""
    found = []
    for p0 in (1e-8, 1e-2):
        options = make_options("ekf", epochs=4, batch_size=5)
        options = replace(options, filter=replace(options.filter, p0=p0))
        (fitted,) = fit_alone([replace(make_task(options, shots=10 * CLASSES), prequential=True)])
        found.append(evidence(fitted))
    assert found[0] < found[1]
