"""LO-FI: exact while the rank suffices, exact on the precision's diagonal always, the same however it is cut."""

import pytest
import torch
from helpers.compare import max_error
from helpers.jacobians import DOUBLE, LAYERS, mixed_jacobian, posterior, randn, stacked_rows, whole

from kngd_ray.filters import Belief, Covariance, DiagonalLowRank, Part, innovation_covariance, solve_innovation, update

N = sum(layer.size for layer in LAYERS)
START = torch.zeros(N, dtype=DOUBLE)


def full(P: Covariance) -> torch.Tensor:
    return precision(P).inverse()


def precision(P: Covariance) -> torch.Tensor:
    W = torch.cat([state["factor"] for state in P.values()])
    return torch.cat([state["precision"] for state in P.values()]).diag() + W @ W.mT


def seen(family: DiagonalLowRank, updates: int = 3) -> Covariance:
    belief = Belief(START, family.init(whole(*LAYERS), 0.4, START))
    for t in range(updates):
        belief, _ = update(family, belief, mixed_jacobian(seed=10 * t), randn(3, seed=t))
    return belief.covariance


@pytest.mark.parametrize(("scale", "q"), [(1.0, 0.0), (0.9, 0.0), (1.1, 0.02)])
def test_dense_while_the_rank_suffices(scale, q):
    family = DiagonalLowRank(rank=12)
    belief, mu, P = Belief(START, family.init(whole(*LAYERS), 0.4, START)), START, 0.4 * torch.eye(N, dtype=DOUBLE)
    for t in range(4):
        H, nu = mixed_jacobian(seed=10 * t), randn(3, seed=t)
        P = scale * P + q * torch.eye(N, dtype=DOUBLE)
        belief = Belief(belief.mu, family.predict(belief.covariance, scale, q, lambda x: x))
        moved, P = posterior(P, stacked_rows(H), nu)
        mu = mu + moved
        belief, _ = update(family, belief, H, nu)
        assert max_error(belief.mu, mu) < 1e-11
        assert max_error(full(belief.covariance), P) < 1e-11


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_precision_keeps_its_diagonal_and_its_leading_directions(rank):
    family = DiagonalLowRank(rank=rank)
    P, H, nu = seen(family), mixed_jacobian(seed=77), randn(3, seed=7)
    found = update(family, Belief(START, P), H, nu)[0].covariance
    exact = precision(P) + stacked_rows(H).mT @ stacked_rows(H)
    assert max_error(precision(found).diagonal(), exact.diagonal()) < 1e-12
    W = torch.cat([state["factor"] for state in P.values()])
    expected = torch.linalg.svdvals(torch.cat([W, stacked_rows(H).mT], 1))[:rank]
    kept = torch.linalg.svdvals(torch.cat([state["factor"] for state in found.values()]))
    assert max_error(kept, expected) < 1e-12


@pytest.mark.parametrize("rank", [2, 12])
def test_gram_gain_and_moments_are_those_of_its_own_covariance(rank):
    family = DiagonalLowRank(rank=rank)
    P, H, nu = seen(family), mixed_jacobian(k=2, seed=77), randn(6, seed=7)
    dense, rows = full(P), stacked_rows(H)
    gram, work = family.gram(P, H, nu)
    assert max_error(family.spread(gram, 6), rows @ dense @ rows.mT) < 1e-12
    assert max_error(torch.cat(list(family.gain(P, H, gram, work, nu).values())), dense @ rows.mT @ nu) < 1e-12
    assert max_error(family.diagonal(P), dense.diagonal()) < 1e-12
    assert max_error(family.log_det(P), torch.logdet(dense)) < 1e-12
    predicted = family.predict(P, 0.7, 0.3, lambda x: x)
    assert max_error(full(predicted), 0.7 * dense + 0.3 * torch.eye(N, dtype=DOUBLE)) < 1e-12


def test_parts_need_only_the_sums():
    """Two ranks that cut a layer, and one that owns nothing, together do what one does."""
    family, H, nu = DiagonalLowRank(rank=4), mixed_jacobian(seed=77), randn(3, seed=7)
    first, bias, text, scale = LAYERS
    owned = [
        [Part(first, 0, 3)],
        [],
        [Part(first, 3, 4), Part(bias, 0, 4), Part(text, 0, 2), Part(scale, 0, 3)],
    ]
    whole_P = seen(family)
    parts_P = [
        {p.layer.name: {key: value[p.flat] for key, value in whole_P[p.layer.name].items()} for p in parts}
        for parts in owned
    ]
    parts_H = [{p.layer.name: H[p.layer.name].part(p.start, p.stop) for p in parts} for parts in owned]

    shares: list[torch.Tensor] = []
    for P in parts_P:
        family.predict(P, 0.9, 0.1, lambda x: shares.append(x) or x)
    parts_P = [family.predict(P, 0.9, 0.1, lambda _: torch.stack(shares).sum(0)) for P in parts_P]
    whole_P = family.predict(whole_P, 0.9, 0.1, lambda x: x)

    grams = [family.gram(P, h, nu)[0] for P, h in zip(parts_P, parts_H, strict=True)]
    assert grams[1].shape == grams[0].shape
    gram = torch.stack(grams).sum(0)
    assert max_error(gram, family.gram(whole_P, H, nu)[0]) < 1e-13
    innovation = solve_innovation(innovation_covariance(family.spread(gram, 3)), nu)
    gain = [family.gain(P, h, gram, {}, innovation.weights) for P, h in zip(parts_P, parts_H, strict=True)]
    updated = [family.update(P, h, gram, {}, innovation) for P, h in zip(parts_P, parts_H, strict=True)]
    expected, _ = update(family, Belief(START, whole_P), H, nu)
    assert max_error(torch.cat([step for rank in gain for step in rank.values()]), expected.mu) < 1e-12
    joined = {str(n): state for n, state in enumerate(s for rank in updated for s in rank.values())}
    assert max_error(precision(joined), precision(expected.covariance)) < 1e-12


def test_uncertainty_never_grows_over_confident_float32_updates():
    family, start = DiagonalLowRank(rank=3), torch.zeros(N)
    belief = Belief(start, family.init(whole(*LAYERS), 1.0, start))
    for t in range(300):
        H = {name: h.scaled(torch.full((3,), 1e3)) for name, h in mixed_jacobian(seed=t, dtype=torch.float32).items()}
        before = belief.covariance
        belief, _ = update(family, belief, H, randn(3, seed=t, dtype=torch.float32))
        for name, state in belief.covariance.items():
            assert bool((state["precision"] >= before[name]["precision"]).all())
    assert bool((family.diagonal(belief.covariance) > 0).all())
    assert bool(torch.isfinite(belief.mu).all())


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank_is_refused(rank):
    with pytest.raises(ValueError, match="rank is"):
        DiagonalLowRank(rank=rank)
