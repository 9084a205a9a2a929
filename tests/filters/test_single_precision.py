"""Every family in float32 stays near itself in float64, however certain the observations are."""

import pytest
import torch
from helpers.cases import FAMILIES, make_head, make_options, make_support
from helpers.compare import covariance_of, max_error

from kngd_ray.training.batches import BatchSampler
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions


def fitted(family: str, p0: float, dtype: torch.dtype) -> KalmanNGD:
    options = make_options(filter=FilterOptions(covariance=FAMILIES[family], p0=p0))
    method = KalmanNGD(make_head(options.adapter, dtype), options, seed=3)
    sampler = BatchSampler(make_support(30, dtype), 7, 2, seed=5)
    for step in range(sampler.steps):
        method.step(sampler.batch(step))
    return method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("p0", "allowed"), [(0.1, 1e-4), (1.0, 1e-3), (10.0, 2e-2)])
def test_rounding_does_not_take_over(family, p0, allowed):
    single, double = fitted(family, p0, torch.float32), fitted(family, p0, torch.float64)
    assert max_error(single.belief.mu.double(), double.belief.mu) < allowed
    assert max_error(covariance_of(single).diagonal().double(), covariance_of(double).diagonal()) < allowed
