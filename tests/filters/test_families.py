"""The covariance families against the dense oracle, and the contract that all of them keep."""

from collections.abc import Callable

import pytest
import torch
from helpers.cases import FAMILIES, rng
from helpers.compare import max_error
from helpers.jacobians import (
    DOUBLE,
    LAYERS,
    mixed_jacobian,
    posterior,
    randn,
    random_factors,
    stacked_rows,
    whole,
)
from torch import Tensor

from kngd_ray.filters import Belief, Covariance, Dense, Diagonal, Factors, Family, Layer, Part, Rows, update
from kngd_ray.filters import diagonal as diagonal_module

N = 6
ALL = sum(layer.size for layer in LAYERS)
EXACT = 1e-10
EKF, VDEKF = Diagonal(rule="ekf"), Diagonal(rule="vdekf")
PARTS = whole(Layer("w", N, 1, factored=False))


@pytest.fixture
def variances() -> Tensor:
    """A diagonal prior that spans two orders of magnitude."""
    return torch.logspace(-1, 1, N, dtype=DOUBLE)


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def family(request) -> Family:
    return FAMILIES[request.param]


def itself(tensor: Tensor) -> Tensor:
    return tensor


def variance(belief: Belief) -> Tensor:
    return belief.covariance["w"]["variance"]


def matrix(belief: Belief) -> Tensor:
    return belief.covariance["all"]["covariance"]


@pytest.mark.parametrize("m", [1, 3, N, 2 * N])
def test_diagonal_equals_the_dense_posterior_after_one_update(variances, m):
    H, nu, mu = {"w": Rows(randn(m, N))}, randn(m, seed=1), randn(N, seed=9)
    oracle, seen = update(Dense(), Belief(mu, {"all": {"covariance": variances.diag()}}), H, nu)
    ekf, ekf_seen = update(EKF, Belief(mu, {"w": {"variance": variances}}), H, nu)
    vdekf, vdekf_seen = update(VDEKF, Belief(mu, {"w": {"variance": variances}}), H, nu)

    assert max_error(ekf.mu, oracle.mu) < EXACT
    assert max_error(vdekf.mu, oracle.mu) < EXACT
    assert max_error(variance(ekf), matrix(oracle).diagonal()) < EXACT
    assert max_error(1 / variance(vdekf), matrix(oracle).inverse().diagonal()) < EXACT
    assert bool((variance(ekf) >= variance(vdekf) * (1 - 1e-14)).all())
    for found in (ekf_seen, vdekf_seen):
        assert max_error(found.log_evidence, seen.log_evidence) < EXACT
        assert max_error(found.nis, seen.nis) < EXACT


def _each_weight_seen_alone(step: int) -> Tensor:
    chosen = torch.randint(N, (4,), generator=rng(step))  # the same weight may come twice
    return torch.eye(N, dtype=DOUBLE)[chosen] * torch.tensor([0.5, 2.0, -1.0, 3.0]).double()[:, None]


def _orthogonal(step: int) -> Tensor:
    return 1.5 * torch.linalg.qr(randn(N, N, seed=step)).Q


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize("rows", [_each_weight_seen_alone, _orthogonal])
def test_diagonal_is_exact_for_ever_where_the_posterior_stays_diagonal(rule, rows):
    family, like = Diagonal(rule=rule), torch.zeros(N, dtype=DOUBLE)
    exact, diagonal = (Belief(like, f.init(PARTS, 0.7, like)) for f in (Dense(), family))
    for step in range(8):
        H = rows(step)
        y = randn(len(H), seed=100 + step)
        exact = Belief(exact.mu, Dense().predict(exact.covariance, 1.0, 0.01, itself))
        diagonal = Belief(diagonal.mu, family.predict(diagonal.covariance, 1.0, 0.01, itself))
        exact, _ = update(Dense(), exact, {"w": Rows(H)}, y - H @ exact.mu)
        diagonal, _ = update(family, diagonal, {"w": Rows(H)}, y - H @ diagonal.mu)
        assert max_error(diagonal.mu, exact.mu) < EXACT
        assert max_error(variance(diagonal).diag(), matrix(exact)) < EXACT


@pytest.mark.parametrize("budget", [1, 1 << 20], ids=["a sample at a time", "at once"])
@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
@pytest.mark.parametrize(("s", "k"), [(1, 1), (6, 1), (7, 1), (1, 3), (6, 3), (7, 3), (5, 5)])
def test_pairs_of_factors_are_the_same_as_rows(monkeypatch, s, k, rule, budget):
    monkeypatch.setattr(diagonal_module, "_PAIR_NUMBERS", budget)
    monkeypatch.setattr(diagonal_module, "pairs_pay", lambda H: True)
    family, H, nu = Diagonal(rule=rule), random_factors(5, 4, s, k), randn(s * k, seed=5)
    belief = Belief(torch.zeros(20, dtype=DOUBLE), {"w": {"variance": torch.logspace(-1, 1, 20, dtype=DOUBLE)}})
    (pairs, seen), (rows, expected) = (update(family, belief, {"w": h}, nu) for h in (H, Rows(H.rows())))
    assert max_error(pairs.mu, rows.mu) < 1e-12
    assert max_error(variance(pairs), variance(rows)) < 1e-12
    assert max_error(seen.cholesky, expected.cholesky) < 1e-12


@pytest.mark.parametrize("r", [1e-3, 1e-8])
@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
def test_variances_stay_positive_over_confident_float32_updates(rule, r):
    family, g = Diagonal(rule=rule), rng(4)
    always = torch.randn(2, 40, generator=g)  # seen at every step, on top of fresh rows
    start = torch.zeros(40)
    belief = Belief(start, family.init(whole(Layer("w", 40, 1, factored=False)), 1.0, start))
    for _ in range(1000):
        H = torch.cat([always, torch.randn(4, 40, generator=g)]) / r**0.5
        before = variance(belief)
        belief, _ = update(family, belief, {"w": Rows(H)}, 0.01 * torch.randn(6, generator=g) / r**0.5)
        assert bool((variance(belief) > 0).all())
        assert bool((variance(belief) <= before).all())
    assert variance(belief).dtype == torch.float32
    assert bool(torch.isfinite(belief.mu).all())


def test_a_variance_that_rounding_would_take_to_zero_still_moves():
    belief = Belief(torch.zeros(1), {"w": {"variance": torch.ones(1)}})
    for _ in range(50):
        belief, _ = update(EKF, belief, {"w": Rows(torch.full((1, 1), 1e4))}, 1e4 * (torch.ones(1) - belief.mu))
    assert 0 < float(variance(belief)) < 1e-9
    assert float(belief.mu) == pytest.approx(1.0)


def prior(family: Family, updates: int = 2, p0: float = 0.4) -> Belief:
    """A belief about LAYERS whose covariance has all that its family can have."""
    start = torch.zeros(ALL, dtype=DOUBLE)
    belief = Belief(start, family.init(whole(*LAYERS), p0, start))
    for t in range(updates):
        belief, _ = update(family, belief, mixed_jacobian(seed=10 * t), randn(3, seed=t))
    return belief


def dense(family: Family, P: Covariance) -> Tensor:
    """(n, n) P, of which H = I shows everything."""
    H, at, eye = {}, 0, torch.eye(ALL, dtype=DOUBLE)
    for layer in LAYERS:
        rows = eye[:, at : at + layer.size]
        at += layer.size
        # a row of I as the one outer product that it is, where the layer has factors
        g, x = rows.view(ALL, layer.o, layer.i).sum(2), rows.view(ALL, layer.o, layer.i).sum(1)
        H[layer.name] = Factors(g.view(ALL, 1, 1, -1), x.unsqueeze(1)) if layer.factored else Rows(rows)
    return family.spread(family.gram(P, H, torch.zeros(ALL, dtype=DOUBLE))[0], ALL)


@pytest.mark.parametrize("k", [1, 2])
def test_first_update_moves_the_mean_exactly(family, k):
    """From a prior p0 I, which all families have exactly, and with Jacobians of all forms."""
    H, nu = mixed_jacobian(k=k), randn(3 * k, seed=5)
    moved, _ = posterior(0.4 * torch.eye(ALL, dtype=DOUBLE), stacked_rows(H), nu)
    assert max_error(update(family, prior(family, updates=0), H, nu)[0].mu, moved) < EXACT


@pytest.mark.parametrize("k", [1, 2])
def test_gram_and_gain_are_those_of_its_covariance(family, k):
    P, H, nu = prior(family).covariance, mixed_jacobian(k=k, seed=50), randn(3 * k, seed=5)
    full, rows = dense(family, P), stacked_rows(H)
    gram, work = family.gram(P, H, nu)
    assert max_error(family.spread(gram, 3 * k), rows @ full @ rows.mT) < EXACT
    step = family.gain(P, H, gram, work, nu)
    assert list(step) == [layer.name for layer in LAYERS]
    assert max_error(torch.cat(list(step.values())), full @ rows.mT @ nu) < EXACT
    assert float(torch.linalg.eigvalsh(full)[0]) > 0


def test_nothing_is_written_into_the_arguments(family):
    belief, H, nu = prior(family), mixed_jacobian(seed=50), randn(3, seed=5)

    def tensors() -> list[Tensor]:
        factors = [t for h in H.values() for t in ([h.g, h.x] if isinstance(h, Factors) else [h.values])]
        return [belief.mu, nu, *factors, *(t for state in belief.covariance.values() for t in state.values())]

    copies = [t.clone() for t in tensors()]
    update(family, belief, H, nu)
    family.predict(belief.covariance, 0.9, 0.1, itself)
    family.sample(belief.covariance, 3, rng())
    family.diagonal(belief.covariance)
    family.log_det(belief.covariance)
    assert all(torch.equal(a, b) for a, b in zip(tensors(), copies, strict=True))


def test_init_and_predict(family):
    like = torch.zeros(ALL, dtype=DOUBLE)
    P = family.init(whole(*LAYERS), 0.3, like)
    assert max_error(family.diagonal(P), torch.full((ALL,), 0.3, dtype=DOUBLE)) < 1e-14
    predicted = family.predict(P, 0.5, 0.1, itself)
    assert max_error(dense(family, predicted), 0.25 * torch.eye(ALL, dtype=DOUBLE)) < 1e-14
    assert float(family.log_det(P)) == pytest.approx(ALL * float(torch.tensor(0.3).double().log()))
    assert len(family.init([], 0.3, like)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_covariances_are_never_below_float32(family, dtype):
    P = family.init(whole(*LAYERS), 0.1, torch.zeros(3, dtype=dtype))
    assert {t.dtype for state in P.values() for t in state.values()} <= {torch.float32, torch.float64}


def test_a_rank_without_parts_takes_part(family):
    nu = torch.ones(3)
    P: Covariance = family.init([], 0.1, torch.zeros(0))
    P = family.predict(P, 0.9, 0.1, itself)
    gram, work = family.gram(P, {}, nu)
    other, _ = family.gram(family.init(whole(*LAYERS), 0.1, nu), mixed_jacobian(dtype=torch.float32), nu)
    assert (gram.shape, gram.dtype) == (other.shape, other.dtype)
    assert not bool(gram.any())
    assert family.gain(P, {}, gram, work, nu) == {}


def test_predict_adds_noise_on_the_diagonal_only():
    P = prior(Dense()).covariance
    expected = 0.9 * P["all"]["covariance"] + 0.2 * torch.eye(ALL, dtype=DOUBLE)
    assert max_error(Dense().predict(P, 0.9, 0.2, itself)["all"]["covariance"], expected) < 1e-14


def test_predict_keeps_the_trace(family):
    P = prior(family).covariance
    found = family.diagonal(family.predict(P, 0.9, 0.2, itself)).sum()
    assert max_error(found, 0.9 * family.diagonal(P).sum() + 0.2 * ALL) < 1e-12


def test_log_det_and_diagonal(family):
    P = prior(family).covariance
    full = dense(family, P)
    assert max_error(family.log_det(P), torch.linalg.slogdet(full).logabsdet) < EXACT
    assert max_error(family.diagonal(P), full.diagonal()) < EXACT


def test_draws_have_the_covariance(family):
    P = prior(family).covariance
    full, draws = dense(family, P), 50_000
    z = family.sample(P, draws, rng(3))
    assert z.shape == (draws, ALL)
    empirical = z.mT @ z / draws
    error = ((full.square() + full.diagonal()[:, None] * full.diagonal()) / draws).sqrt()
    assert float(((empirical - full).abs() / error).max()) < 5
    assert float((z.mean(0).abs() / (full.diagonal() / draws).sqrt()).max()) < 5
    assert torch.equal(family.sample(P, 10, rng(7)), family.sample(P, 10, rng(7)))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_parts_cut_at_the_grain_are_cut_along_dimension_0(family: Family, layer: Layer):
    grain = family.grain(layer)
    assert 1 <= grain <= layer.o
    assert family.cost(layer) >= 1
    if family.joint or grain == layer.o:
        return
    like = torch.zeros(1, dtype=DOUBLE)
    cut: Callable[[int, int], Covariance] = lambda a, b: family.init([Part(layer, a, b)], 0.3, like)  # noqa: E731
    parts, joined = [cut(0, grain)[layer.name], cut(grain, layer.o)[layer.name]], cut(0, layer.o)[layer.name]
    for key, value in joined.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)
        assert len(value) == layer.size


def test_dense_and_a_kronecker_factor_are_indivisible_and_a_diagonal_is_not():
    weight, bias = LAYERS[:2]
    assert Dense().joint
    assert Dense().grain(weight) == FAMILIES["kronecker"].grain(weight) == weight.o
    assert EKF.grain(weight) == FAMILIES["kronecker"].grain(bias) == 1


def test_every_family_keeps_the_protocol(family):
    assert isinstance(family, Family)
