"""The covariance families against the dense oracle, and the contract that all of them keep."""

from itertools import pairwise

import pytest
import torch
from helpers.cases import FAMILIES, rng
from helpers.compare import max_error

from kngd_ray.filters import Belief, Dense, Diagonal, Family, update

N = 6
EXACT = 1e-10
EKF, VDEKF = Diagonal(rule="ekf"), Diagonal(rule="vdekf")


def observations(m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = rng(seed)
    H = torch.randn(m, N, generator=g, dtype=torch.float64)
    nu = torch.randn(m, generator=g, dtype=torch.float64)
    return H, nu, 0.1 + torch.rand(m, generator=g, dtype=torch.float64)


@pytest.fixture
def variances() -> torch.Tensor:
    """A diagonal prior that spans two orders of magnitude."""
    return torch.logspace(-1, 1, N, dtype=torch.float64)


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.mark.parametrize("m", [1, 3, N, 2 * N])
def test_diagonal_equals_the_dense_posterior_after_one_update(variances, m):
    H, nu, R = observations(m)
    mu = torch.randn(N, generator=rng(9), dtype=torch.float64)
    oracle, seen = update(Dense(), Belief(mu, variances.diag()), H, nu, R)
    ekf, ekf_seen = update(EKF, Belief(mu, variances), H, nu, R)
    vdekf, vdekf_seen = update(VDEKF, Belief(mu, variances), H, nu, R)

    assert max_error(ekf.mu, oracle.mu) < EXACT
    assert max_error(vdekf.mu, oracle.mu) < EXACT
    assert max_error(ekf.covariance, oracle.covariance.diagonal()) < EXACT
    assert max_error(1 / vdekf.covariance, oracle.covariance.inverse().diagonal()) < EXACT
    assert bool((ekf.covariance >= vdekf.covariance * (1 - 1e-14)).all())
    for found in (ekf_seen, vdekf_seen):
        assert max_error(found.log_evidence, seen.log_evidence) < EXACT
        assert max_error(found.nis, seen.nis) < EXACT


def _each_weight_seen_alone(step: int) -> torch.Tensor:
    chosen = torch.randint(N, (4,), generator=rng(step))  # the same weight may come twice
    return torch.eye(N, dtype=torch.float64)[chosen] * torch.tensor([0.5, 2.0, -1.0, 3.0]).double()[:, None]


def _orthogonal(step: int) -> torch.Tensor:
    return 1.5 * torch.linalg.qr(torch.randn(N, N, generator=rng(step), dtype=torch.float64)).Q


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize("rows", [_each_weight_seen_alone, _orthogonal])
def test_diagonal_is_exact_for_ever_where_the_posterior_stays_diagonal(rule, rows):
    family = Diagonal(rule=rule)
    like = torch.zeros(N, dtype=torch.float64)
    exact, diagonal = Belief(like, Dense().init(N, 0.7, like)), Belief(like, family.init(N, 0.7, like))
    for step in range(8):
        H = rows(step)
        y = torch.randn(len(H), generator=rng(100 + step), dtype=torch.float64)
        R = torch.full((len(H),), 0.3, dtype=torch.float64)
        exact = Belief(exact.mu, Dense().predict(exact.covariance, 1.0, 0.01))
        diagonal = Belief(diagonal.mu, family.predict(diagonal.covariance, 1.0, 0.01))
        exact, _ = update(Dense(), exact, H, y - H @ exact.mu, R)
        diagonal, _ = update(family, diagonal, H, y - H @ diagonal.mu, R)
        assert max_error(diagonal.mu, exact.mu) < EXACT
        assert max_error(diagonal.covariance.diag(), exact.covariance) < EXACT


@pytest.mark.parametrize("r", [1e-3, 1e-8])
@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
def test_variances_stay_positive_over_confident_float32_updates(rule, r):
    family, g = Diagonal(rule=rule), rng(4)
    always = torch.randn(2, 40, generator=g)  # seen at every step, on top of fresh rows
    belief = Belief(torch.zeros(40), family.init(40, 1.0, torch.zeros(40)))
    for _ in range(1000):
        H = torch.cat([always, torch.randn(4, 40, generator=g)])
        before = belief.covariance
        belief, _ = update(family, belief, H, 0.01 * torch.randn(6, generator=g), torch.full((6,), r))
        assert bool((belief.covariance > 0).all())
        assert bool((belief.covariance <= before).all())
    assert belief.covariance.dtype == torch.float32
    assert bool(torch.isfinite(belief.mu).all())


def test_a_variance_that_rounding_would_take_to_zero_still_moves():
    belief = Belief(torch.zeros(1), EKF.init(1, 1.0, torch.zeros(1)))
    for _ in range(50):
        belief, _ = update(EKF, belief, torch.ones(1, 1), torch.ones(1) - belief.mu, torch.full((1,), 1e-8))
    assert 0 < float(belief.covariance) < 1e-9
    assert float(belief.mu) == pytest.approx(1.0)


def _state_of(family: Family, variances: torch.Tensor) -> torch.Tensor:
    if isinstance(family, Diagonal):
        return variances
    A = torch.randn(N, N, generator=rng(8), dtype=torch.float64)
    return A @ A.mT / N + variances.diag()


def test_nothing_is_written_into_the_arguments(family, variances):
    H, nu, R = observations(4)
    arguments = [torch.zeros(N, dtype=torch.float64), _state_of(family, variances), H, nu, R]
    copies = [a.clone() for a in arguments]
    mu, P, H, nu, R = arguments
    update(family, Belief(mu, P), H, nu, R)
    family.predict(P, 0.9, 0.1)
    family.sample(P, 3, rng())
    assert all(torch.equal(a, c) for a, c in zip(arguments, copies, strict=True))


def test_init_and_predict(family):
    like = torch.zeros(N, dtype=torch.float64)
    P = family.init(N, 0.3, like)
    assert torch.equal(family.diagonal(P), torch.full((N,), 0.3, dtype=torch.float64))
    assert torch.allclose(family.diagonal(family.predict(P, 0.5, 0.1)), torch.full((N,), 0.25).double())
    assert float(family.log_det(P)) == pytest.approx(N * float(torch.tensor(0.3).double().log()))
    assert len(family.init(0, 0.3, like)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_variances_are_never_below_float32(family, dtype):
    assert family.init(3, 0.1, torch.zeros(3, dtype=dtype)).dtype in (torch.float32, torch.float64)


def test_predict_adds_noise_on_the_diagonal_only(variances):
    P = _state_of(Dense(), variances)
    expected = 0.9 * P + 0.2 * torch.eye(N, dtype=torch.float64)
    assert max_error(Dense().predict(P, 0.9, 0.2), expected) < 1e-14


def test_log_det_and_diagonal(family, variances):
    P = _state_of(family, variances)
    full = P.diag() if P.dim() == 1 else P
    assert max_error(family.log_det(P), torch.linalg.slogdet(full).logabsdet) < 1e-12
    assert torch.equal(family.diagonal(P), full.diagonal())


def test_draws_have_the_covariance(family, variances):
    P = _state_of(family, variances)
    full = P.diag() if P.dim() == 1 else P
    draws = 50_000
    z = family.sample(P, draws, rng(3))
    assert z.shape == (draws, N)
    empirical = z.mT @ z / draws
    error = ((full.square() + full.diagonal()[:, None] * full.diagonal()) / draws).sqrt()
    assert float(((empirical - full).abs() / error).max()) < 5
    assert float((z.mean(0).abs() / (full.diagonal() / draws).sqrt()).max()) < 5
    assert torch.equal(family.sample(P, 10, rng(7)), family.sample(P, 10, rng(7)))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_cuts_run_from_zero_to_n(family, n):
    cuts = list(family.cuts(n))
    assert cuts[0] == 0
    assert cuts[-1] == n
    assert all(a <= b for a, b in pairwise(cuts))


def test_dense_is_indivisible_and_diagonal_is_not():
    assert list(Dense().cuts(5)) == [0, 5]
    assert list(EKF.cuts(3)) == [0, 1, 2, 3]


def test_every_family_keeps_the_protocol(family):
    assert isinstance(family, Family)
