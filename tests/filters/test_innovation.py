"""The innovation: evidence, NIS, gain weights, and what is refused."""

import pytest
import torch
from helpers.cases import rng
from helpers.compare import max_error
from torch.distributions import MultivariateNormal

from kngd_ray.errors import FilterError
from kngd_ray.filters import solve_innovation


def covariance(m: int, seed: int = 0) -> torch.Tensor:
    A = torch.randn(m, m, generator=rng(seed), dtype=torch.float64)
    return A @ A.mT + 0.1 * torch.eye(m, dtype=torch.float64)


@pytest.mark.parametrize("m", [1, 2, 9])
def test_evidence_and_nis_are_those_of_a_multivariate_normal(m):
    S, nu = covariance(m), torch.randn(m, generator=rng(1), dtype=torch.float64)
    found = solve_innovation(S, nu)
    assert max_error(found.log_evidence, MultivariateNormal(torch.zeros(m).double(), S).log_prob(nu)) < 1e-12
    assert max_error(found.nis, nu @ torch.linalg.solve(S, nu)) < 1e-11
    assert max_error(found.weights, torch.linalg.solve(S, nu)) < 1e-11
    assert max_error(found.cholesky @ found.cholesky.mT, S) < 1e-13
    assert found.jitter == 0


def test_whitened_gain():
    S, U = covariance(4), torch.randn(7, 4, generator=rng(2), dtype=torch.float64)
    X = solve_innovation(S, torch.zeros(4, dtype=torch.float64)).whiten(U)
    assert max_error(X @ X.mT, U @ S.inverse() @ U.mT) < 1e-12


def test_nothing_observed():
    found = solve_innovation(torch.zeros(0, 0), torch.zeros(0))
    assert (found.nis, found.log_evidence, found.jitter) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariance_gets_a_small_jitter(dtype):
    S = torch.full((3, 3), 2.0, dtype=dtype)  # three times the same observation without noise
    found = solve_innovation(S, torch.ones(3, dtype=dtype))
    assert 0 < found.jitter <= 2.0 * torch.finfo(dtype).eps * 1e5
    assert bool(torch.isfinite(found.weights).all())
    assert found.nis == pytest.approx(0.5, rel=1e-2)  # as one observation of variance 2


@pytest.mark.parametrize(
    ("S", "nu", "says"),
    [
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "1 of 2 innovations"),
        (torch.eye(2), torch.tensor([float("inf"), float("nan")]), "2 of 2 innovations"),
        (torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]), torch.ones(2), "NaN or infinite"),
        (torch.diag(torch.tensor([1.0, float("inf")])), torch.ones(2), "NaN or infinite"),
        (torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2), "not positive definite"),
        (-torch.eye(2), torch.ones(2), "not positive definite"),
    ],
)
def test_what_cannot_be_used_is_refused_and_left_alone(S, nu, says):
    before = S.clone(), nu.clone()
    with pytest.raises(FilterError, match=says):
        solve_innovation(S, nu)
    assert torch.equal(S.nan_to_num(7), before[0].nan_to_num(7))
    assert torch.equal(nu.nan_to_num(7), before[1].nan_to_num(7))


def test_arguments_are_not_written():
    for S in (covariance(3), torch.ones(3, 3)):
        nu = torch.ones(3, dtype=S.dtype)
        kept = S.clone()
        solve_innovation(S, nu)
        assert torch.equal(S, kept)
        assert torch.equal(nu, torch.ones(3, dtype=S.dtype))
