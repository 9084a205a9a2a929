"""Kronecker factors: the update against its definition, where it is exact, and what one sweep leaves."""

from itertools import product

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.jacobians import DOUBLE, posterior, randn, random_factors, stacked_rows, whole

from kngd_ray.filters import Belief, Covariance, Factors, Jacobian, Kronecker, Layer, Rows, update
from kngd_ray.filters.kronecker import tokens_pay

FAMILY = Kronecker()
ROWS, COLUMNS = 4, 6
LAYER = Layer("w", ROWS, COLUMNS, factored=True)
FORMS = [(k, T, shared) for k, T, shared in product((1, 3), (1, 3), (False, True))]


def spd(n: int, seed: int) -> torch.Tensor:
    A = randn(n, n, seed=seed)
    return A @ A.mT / n + 0.2 * torch.eye(n, dtype=DOUBLE)


def prior(o: int = ROWS, i: int = COLUMNS) -> Covariance:
    return {"w": {"B": 0.5 * spd(o, 1), "A": spd(i, 2)}}


def full(P: Covariance) -> torch.Tensor:
    return torch.kron(P["w"]["B"], P["w"]["A"])


def step(P: Covariance, H: Jacobian, nu: torch.Tensor) -> Belief:
    n = stacked_rows(H).shape[1]
    return update(FAMILY, Belief(torch.zeros(n, dtype=DOUBLE), P), H, nu)[0]


def as_columns_trace(sigma: torch.Tensor, A: torch.Tensor, o: int, i: int) -> torch.Tensor:
    """1/i Tr_A[Sigma (I (x) A^-1)]."""
    return torch.einsum("aibj,ji->ab", sigma.view(o, i, o, i), A.inverse()) / i


def as_rows_trace(sigma: torch.Tensor, B: torch.Tensor, o: int, i: int) -> torch.Tensor:
    """1/o Tr_B[Sigma (B^-1 (x) I)]."""
    return torch.einsum("aibj,ba->ij", sigma.view(o, i, o, i), B.inverse()) / o


def divergence(sigma: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> float:
    """KL(N(0, Sigma) || N(0, B (x) A))."""
    near = torch.kron(B, A)
    trace = torch.linalg.solve(near, sigma).diagonal().sum()
    return float(trace - len(sigma) + torch.logdet(near) - torch.logdet(sigma)) / 2


@pytest.mark.parametrize("s", [2, 7], ids=["few samples", "many samples"])
@pytest.mark.parametrize(("k", "T", "shared"), FORMS)
def test_gram_gain_and_both_halves_of_the_sweep_follow_their_definitions(s, k, T, shared):
    P, H, nu = prior(), {"w": random_factors(ROWS, COLUMNS, s, k, T, shared)}, randn(s * k, seed=5)
    dense, rows = full(P), stacked_rows(H)
    moved, sigma = posterior(dense, rows, nu)

    gram, _ = FAMILY.gram(P, H, nu)
    assert max_error(gram, rows @ dense @ rows.mT) < 1e-12
    found = step(P, H, nu)
    assert max_error(found.mu, moved) < 1e-12
    B = as_columns_trace(sigma, P["w"]["A"], ROWS, COLUMNS)
    assert max_error(found.covariance["w"]["B"], B) < 1e-12
    assert max_error(found.covariance["w"]["A"], as_rows_trace(sigma, B, ROWS, COLUMNS)) < 1e-12


def test_both_ways_to_compute_are_tried():
    few = {tokens_pay(random_factors(ROWS, COLUMNS, 2, k, T, shared)) for k, T, shared in FORMS}
    assert few == {True, False}


@pytest.mark.parametrize(("k", "T", "shared"), FORMS)
def test_factors_that_come_as_rows_give_the_same(k, T, shared):
    factors, nu = random_factors(ROWS, COLUMNS, 2, k, T, shared), randn(2 * k, seed=5)
    one, two = step(prior(), {"w": factors}, nu), step(prior(), {"w": Rows(factors.rows())}, nu)
    assert max_error(one.mu, two.mu) < 1e-12
    for key in ("B", "A"):
        assert max_error(one.covariance["w"][key], two.covariance["w"][key]) < 1e-12


def test_each_half_is_the_nearest_given_the_other_factor():
    P, H, nu = prior(), {"w": random_factors(ROWS, COLUMNS, 4)}, randn(4, seed=5)
    _, sigma = posterior(full(P), stacked_rows(H), nu)
    state = step(P, H, nu).covariance["w"]
    first, second = divergence(sigma, state["B"], P["w"]["A"]), divergence(sigma, state["B"], state["A"])
    assert second < first < divergence(sigma, P["w"]["B"], P["w"]["A"])
    for seed in range(20):
        dB, dA = randn(ROWS, ROWS, seed=seed), randn(COLUMNS, COLUMNS, seed=seed + 100)
        for size in (1e-3, -1e-3, 1e-2, -1e-2):
            assert divergence(sigma, state["B"] + size * (dB + dB.mT), P["w"]["A"]) > first
            assert divergence(sigma, state["B"], state["A"] + size * (dA + dA.mT)) > second


@pytest.mark.parametrize("s", [2, 8, 24])
def test_one_sweep_is_nearly_as_near_as_many(s, record_property):
    P, H, nu = prior(), {"w": random_factors(ROWS, COLUMNS, s)}, randn(s, seed=5)
    _, sigma = posterior(full(P), stacked_rows(H), nu)
    state = step(P, H, nu).covariance["w"]
    B, A = state["B"], state["A"]
    one = divergence(sigma, B, A)
    for _ in range(200):
        B = as_columns_trace(sigma, A, ROWS, COLUMNS)
        A = as_rows_trace(sigma, B, ROWS, COLUMNS)
    best, untouched = divergence(sigma, B, A), divergence(sigma, P["w"]["B"], P["w"]["A"])
    record_property("divergence", {"prior": untouched, "one sweep": one, "many sweeps": best})
    assert best <= one <= best + 0.1 * (untouched - best)


@pytest.mark.parametrize(("o", "i"), [(1, 5), (4, 1)], ids=["one row", "one column"])
def test_exact_for_ever_on_a_single_row_or_column(o, i):
    belief = Belief(torch.zeros(o * i, dtype=DOUBLE), prior(o, i))
    mu, P = belief.mu, full(belief.covariance)
    for t in range(30):
        H, nu = {"w": random_factors(o, i, s=4, k=1 + t % 2, T=1 + t % 3, seed=t)}, randn(4 * (1 + t % 2), seed=t)
        P = 0.95 * P + 0.02 * torch.eye(o * i, dtype=DOUBLE)  # whose partial traces are itself
        moved, P = posterior(P, stacked_rows(H), nu)
        mu = mu + moved
        belief = Belief(belief.mu, FAMILY.predict(belief.covariance, 0.95, 0.02, lambda x: x))
        belief, _ = update(FAMILY, belief, H, nu)
        assert max_error(belief.mu, mu) < 1e-10
        assert max_error(full(belief.covariance), P) < 1e-10


def test_exact_where_all_weights_are_seen_alike():
    """H = I, as k = o observations of each of i orthonormal inputs."""
    H = {
        "w": Factors(
            torch.eye(ROWS, dtype=DOUBLE).expand(COLUMNS, ROWS, ROWS).unsqueeze(2),
            torch.eye(COLUMNS, dtype=DOUBLE).unsqueeze(1),
        )
    }
    belief = Belief(torch.zeros(ROWS * COLUMNS, dtype=DOUBLE), FAMILY.init(whole(LAYER), 0.3, randn(1)))
    for t in range(1, 6):
        belief, _ = update(FAMILY, belief, H, randn(ROWS * COLUMNS, seed=t))
        assert max_error(full(belief.covariance), torch.eye(ROWS * COLUMNS, dtype=DOUBLE) / (1 / 0.3 + t)) < 1e-12


@pytest.mark.parametrize(("scale", "q"), [(0.9, 0.0), (1.0, 0.07), (1.2, 3.0)])
def test_predict_keeps_both_partial_traces(scale, q):
    P = prior()
    exact = (scale * full(P) + q * torch.eye(ROWS * COLUMNS, dtype=DOUBLE)).view(ROWS, COLUMNS, ROWS, COLUMNS)
    found = full(FAMILY.predict(P, scale, q, lambda x: x)).view(ROWS, COLUMNS, ROWS, COLUMNS)
    assert max_error(torch.einsum("aibi->ab", found), torch.einsum("aibi->ab", exact)) < 1e-13
    assert max_error(torch.einsum("aiaj->ij", found), torch.einsum("aiaj->ij", exact)) < 1e-13


@pytest.mark.parametrize("snr", some_slow([1.0, 1e2, 1e4], 1e4))
@pytest.mark.parametrize(("o", "i", "s", "T"), [(6, 5, 4, 1), (30, 20, 12, 1), (30, 20, 4, 3), (6, 5, 12, 1)])
def test_factors_stay_definite_and_symmetric_over_hundreds_of_float32_updates(o, i, s, T, snr):
    start = torch.zeros(o * i)
    belief = Belief(start, FAMILY.init(whole(Layer("w", o, i, factored=True)), 1.0, start))
    always = random_factors(o, i, 2, T=T, dtype=torch.float32)  # seen at every step, on top of fresh rows
    for t in range(300):
        fresh = random_factors(o, i, s - 2, T=T, seed=t + 1, dtype=torch.float32)
        H = {"w": Factors(snr * torch.cat([always.g, fresh.g]), torch.cat([always.x, fresh.x]))}
        belief, _ = update(FAMILY, belief, H, 0.01 * randn(s, seed=t, dtype=torch.float32))
        for factor in belief.covariance["w"].values():
            assert max_error(factor, factor.mT) < 1e-6
            assert factor.dtype == torch.float32
            assert float(torch.linalg.eigvalsh(factor.double())[0]) > 0
    assert bool(torch.isfinite(belief.mu).all())


def test_samples_without_input_or_derivative_teach_nothing():
    """A saturated sample has g = 0 exactly, and its rows make every small matrix of the update singular."""
    P, H, nu = prior(), random_factors(ROWS, COLUMNS, 4), randn(4, seed=5)
    g, x = H.g.clone(), H.x.clone()
    g[1], x[2] = 0, 0
    found = step(P, {"w": Factors(g, x)}, nu)
    kept = [0, 3]
    expected = step(P, {"w": Factors(g[kept], x[kept])}, nu[kept])
    assert max_error(found.mu, expected.mu) < 1e-12
    assert max_error(full(found.covariance), full(expected.covariance)) < 1e-12


def test_no_observation_changes_nothing():
    P, H = prior(), {"w": random_factors(ROWS, COLUMNS, 0)}
    found = step(P, H, randn(0))
    assert max_error(full(found.covariance), full(P)) < 1e-15


def test_a_share_of_the_prior_is_added_in_any_coordinates():
    """P + share P_0 has the partial traces of the sum where P_0 is the identity, and is the sum where it can be."""
    o, i, share = ROWS, COLUMNS, 0.7
    first = {"B": 2.0 * torch.eye(o, dtype=DOUBLE), "A": spd(i, 3)}
    P = {**FAMILY.with_prior(first), "B": spd(o, 4), "A": spd(i, 5)}
    found = FAMILY.drifted_layer(P, share)
    exact = full({"w": P}) + share * full({"w": first})
    L = torch.linalg.cholesky(first["A"]).contiguous()
    white = torch.kron(torch.eye(o, dtype=DOUBLE) / 2**0.5, L.inverse().contiguous())

    def traces(S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = (white @ S @ white.mT).view(o, i, o, i)
        return torch.einsum("aibi->ab", blocks), torch.einsum("aiaj->ij", blocks)

    for mine, of_sum in zip(traces(full({"w": found})), traces(exact), strict=True):
        assert max_error(mine, of_sum) < 1e-5
    T = randn(i, i, seed=6)  # other coordinates of the inputs
    again = FAMILY.drifted_layer({key: T @ X @ T.mT if key in ("A", "A0") else X for key, X in P.items()}, share)
    assert max_error(full({"w": again}), full({"w": {**found, "A": T @ found["A"] @ T.mT}})) < 1e-4
    independent = {**P, "B": 0.3 * first["B"]}
    exact = full({"w": independent}) + share * full({"w": first})
    found = FAMILY.drifted_layer(independent, share)
    assert max_error(full({"w": found}), exact) < 1e-5
    assert torch.equal(found["A0"], first["A"]), "the prior is kept"
