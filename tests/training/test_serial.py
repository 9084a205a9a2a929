"""Conditioning on a batch a few samples at a time is conditioning on all of it."""

import pytest
import torch
from helpers.cases import FAMILIES, make_head, make_options, make_support
from helpers.compare import covariance_of, max_error

from kngd_ray.errors import FilterError
from kngd_ray.filters import Skip
from kngd_ray.training.batches import BatchSampler
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions


def fitted(family: str, serial: int, **filter_options: object) -> tuple[KalmanNGD, torch.Tensor, torch.Tensor]:
    options = make_options(
        adapter="bottleneck+linear+class_residual",
        observation="all",
        tempering="none",  # with it the evidence is that of other noise than the belief has learned by
        filter=FilterOptions(covariance=FAMILIES[family], p0=0.05, serial=serial, **filter_options),
    )
    method = KalmanNGD(make_head(options.adapter), options, seed=3)
    sampler = BatchSampler(make_support(15), 7, 2, seed=5)
    stats = [method.step(sampler.batch(step)) for step in range(sampler.steps)]
    evidence = torch.tensor([s.log_evidence for s in stats], dtype=torch.float64)
    return method, evidence, torch.tensor([s.nis for s in stats], dtype=torch.float64)


@pytest.mark.parametrize(
    ("serial", "other", "iterations"),
    # iterated, a whole batch steps to its mode, where it has its covariance; runs have no objective to step by
    [(1, 0, 1), (3, 0, 1), (7, 0, 1), (100, 0, 1), (1, 2, 2), (3, 2, 2), (7, 0, 2), (100, 0, 2)],
)
def test_the_exact_posterior_does_not_depend_on_how_a_batch_is_cut(serial, other, iterations):
    whole, evidence, nis = fitted("dense", other, iterations=iterations)
    cut, cut_evidence, cut_nis = fitted("dense", serial, iterations=iterations)
    assert max_error(cut.belief.mu, whole.belief.mu) < 1e-10
    assert max_error(covariance_of(cut), covariance_of(whole)) < 1e-10
    assert max_error(cut_evidence, evidence) < 1e-10
    assert max_error(cut_nis, nis) < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_as_long_as_the_batch_are_the_batch(family):
    whole, cut = fitted(family, 0)[0], fitted(family, 7)[0]
    assert torch.equal(cut.belief.mu, whole.belief.mu)
    assert torch.equal(covariance_of(cut), covariance_of(whole))


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_come_back_to_their_form_more_often(family):
    """The result differs only by what each return to the form gives up: it stays close to the batch's."""
    whole, cut = fitted(family, 0)[0], fitted(family, 2)[0]
    assert 0 <= max_error(cut.belief.mu, whole.belief.mu) < 0.1
    assert max_error(covariance_of(cut).diagonal(), covariance_of(whole).diagonal()) < 0.1


def test_a_step_refused_in_a_later_run_leaves_all_as_it_was():
    method = fitted("ekf", 3, gate=Skip(quantile=0.9))[0]
    before = method.belief.mu.clone(), covariance_of(method).clone(), method.noise.clone()
    batch = BatchSampler(make_support(15), 7, 2, seed=5).batch(0)
    batch.inputs[-1] = float("nan")
    with pytest.raises(FilterError):
        method.step(batch)
    after = method.belief.mu, covariance_of(method), method.noise
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    head = torch.cat([p.detach().flatten() for p in method.head.parameters()])
    assert torch.equal(head, before[0])
