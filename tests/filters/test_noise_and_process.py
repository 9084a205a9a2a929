"""Observation noise against a loop over observations, whitening, process models, and the options' ranges."""

import pytest
import torch
from helpers.cases import rng
from helpers.compare import max_error
from helpers.jacobians import DOUBLE, randn
from torch import Tensor
from torch.distributions import MultivariateNormal

from kngd_ray.filters import (
    Belief,
    Categorical,
    Dense,
    Ema,
    Fixed,
    Forgetting,
    OrnsteinUhlenbeck,
    RandomWalk,
    Rows,
    Seen,
    Transition,
    Whitening,
    update,
)


def one_batch(seed: int, channels: int, s: int = 4, k: int = 3) -> Seen:
    g = rng(seed)
    nu, root = randn(s, k, seed=seed), randn(s, k, k, seed=seed + 500)
    base = 0.2 * torch.rand(s, k, generator=g).double()
    counts = (torch.rand(s, k, generator=g) > 0.2).double()
    return Seen(nu, root @ root.mT, base, torch.randint(channels, (s, k), generator=g), counts)


def looped(r: Tensor, beta: float, seen: Seen) -> Tensor:
    """The recursion of the docstring, one channel after another, in plain floats."""
    updated = []
    for c, value in enumerate(r.tolist()):
        energies = [
            float(seen.nu[i, j]) ** 2 + float(seen.predicted[i, j, j]) - float(seen.base[i, j])
            for i in range(len(seen.nu))
            for j in range(seen.nu.shape[1])
            if int(seen.channel[i, j]) == c and seen.counts[i, j] == 1
        ]
        average = beta * value + (1 - beta) * sum(energies) / len(energies) if energies else value
        updated.append(max(average, 1e-8) if energies else value)
    return torch.tensor(updated, dtype=DOUBLE)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_ema_equals_a_plain_loop(beta, channels):
    noise = Ema(beta=beta, form="diagonal" if channels > 1 else "scalar")
    r = expected = 0.1 + torch.rand(channels, generator=rng(0), dtype=DOUBLE)
    for step in range(6):
        seen = one_batch(step, channels)
        r, expected = noise.update(r, seen), looped(expected, beta, seen)
        assert max_error(r, expected) < 1e-12


def test_a_channel_without_observations_keeps_its_value():
    r = torch.tensor([0.3, 0.4, 0.5], dtype=DOUBLE)
    seen = one_batch(0, 3)
    updated = Ema(form="diagonal").update(
        r, Seen(seen.nu, seen.predicted, seen.base, torch.full((4, 3), 1), seen.counts)
    )
    assert torch.equal(updated[[0, 2]], r[[0, 2]])
    assert updated[1] != r[1]
    assert torch.equal(r, torch.tensor([0.3, 0.4, 0.5], dtype=DOUBLE))


@pytest.mark.parametrize("form", ["scalar", "full"])
def test_variance_never_reaches_zero(form):
    """The likelihood's own variance can exceed what was seen; the estimate then stops at a floor."""
    zero = torch.zeros(4, 1)
    seen = Seen(zero, torch.zeros(4, 1, 1), torch.full((4, 1), 0.25), zero.long(), zero + 1)
    noise = Ema(beta=0.1, form=form)
    r = noise.init(torch.tensor([0.1]), torch.tensor([float("nan")]), [1], 3)
    for _ in range(100):
        r = noise.update(r, seen)
    assert 0 < float(r) <= 1e-7


def test_full_form_stays_a_covariance():
    noise, k = Ema(beta=0.5, form="full"), 3
    r = noise.init(torch.tensor([0.1, 2.0]).double(), torch.tensor([float("nan")] * 2), [1, 2], 7)
    assert torch.equal(r, torch.tensor([0.1, 2.0, 2.0]).double().diag())
    for step in range(20):
        seen = one_batch(step, 1, s=2, k=k)
        overstated = Seen(seen.nu, 0.01 * seen.predicted, 10 * seen.base, seen.channel, seen.counts)
        r = noise.update(r, overstated if step % 2 else seen)
        assert max_error(r, r.mT) < 1e-14
        assert float(torch.linalg.eigvalsh(r)[0]) > 0
        assert max_error(noise.covariance(r, seen.base, seen.channel)[1], r + seen.base[1].diag()) < 1e-15


def test_full_form_keeps_what_no_sample_shows():
    """The covariance of two observations that were never both kept stays as it was."""
    r, seen = torch.tensor([[1.0, 0.3], [0.3, 2.0]]).double(), one_batch(0, 1, s=4, k=2)
    counts = torch.tensor([[1.0, 0.0]] * 4).double()
    found = Ema(beta=0.5, form="full").update(r, Seen(seen.nu, seen.predicted, seen.base, seen.channel, counts))
    assert max_error(found[1], r[1]) < 1e-12
    assert abs(float(found[0, 0] - r[0, 0])) > 1e-3


def test_full_form_finds_the_noise_of_a_linear_system():
    """As the weights become known, H P H^T fades and the average tends to R."""
    truth = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=DOUBLE)
    half, noise, s, k, n = torch.linalg.cholesky(truth), Ema(beta=0.99, form="full"), 8, 2, 3
    theta, belief = (
        randn(n, seed=1),
        Belief(torch.zeros(n, dtype=DOUBLE), {"all": {"covariance": torch.eye(n).double()}}),
    )
    r = noise.init(torch.tensor([3.0]).double(), torch.tensor([float("nan")]), [k], 1)
    zero, channel = torch.zeros(s, k, dtype=DOUBLE), torch.zeros(s, k, dtype=torch.long)
    for step in range(800):
        H = randn(s, k, n, seed=step + 10)
        nu = H @ (theta - belief.mu) + randn(s, k, seed=step + 5000) @ half.mT
        whitening = Whitening(noise.covariance(r, zero, channel))
        rows = whitening.rows(H)
        predicted = whitening.restored(rows @ belief.covariance["all"]["covariance"] @ rows.mT)
        belief, _ = update(Dense(), belief, {"w": Rows(rows.flatten(0, 1))}, whitening.innovations(nu).flatten())
        r = noise.update(r, Seen(nu, predicted, zero, channel, zero + 1))
    assert max_error(r, truth) < 0.15
    assert max_error(belief.mu, theta) < 0.1


def test_fixed_stays():
    r = torch.tensor([0.5, 2.0])
    assert torch.equal(Fixed().update(r, one_batch(0, 2)), r)


def test_categorical_noise_is_the_likelihoods():
    noise, nan = Categorical(), float("nan")
    r = noise.init(torch.tensor([0.5, 0.7]), torch.tensor([1.0, nan]), [2, 1], 4)
    assert torch.equal(r, torch.tensor([1.0, 0.7]))
    base = torch.tensor([[0.25, 0.0, 0.1]])
    assert torch.equal(noise.covariance(r, base, torch.tensor([[0, 0, 1]])), torch.tensor([[1.25, 1.0, 0.8]]))
    assert torch.equal(noise.update(r, one_batch(0, 2)), r)


def test_channels():
    assert Fixed().channels(7) == 1
    assert Categorical().channels(7) == 1
    assert Ema(form="scalar").channels(7) == 1
    assert Ema(form="full").channels(7) == 1
    assert Ema(form="diagonal").channels(7) == 7


@pytest.mark.parametrize("form", ["variances", "covariances"])
def test_whitened_innovations_have_unit_noise_and_the_same_density(form):
    s, k = 4, 3
    A = randn(s, k, k, seed=1)
    R = torch.rand(s, k, generator=rng(2), dtype=DOUBLE) + 0.1
    full = R.diag_embed() if form == "variances" else A @ A.mT + 0.1 * torch.eye(k, dtype=DOUBLE)
    whitening = Whitening(R if form == "variances" else full)
    L, nu, V = torch.linalg.cholesky(full), randn(s, k, seed=3), randn(s, k, 5, seed=4)

    z = whitening.innovations(nu)
    assert max_error((L @ z.unsqueeze(2)).squeeze(2), nu) < 1e-13
    assert max_error(L @ whitening.rows(V), V) < 1e-13
    assert max_error(whitening.restored(whitening.rows(V) @ whitening.rows(V).mT), V @ V.mT) < 1e-12
    unit = MultivariateNormal(torch.zeros(k, dtype=DOUBLE), torch.eye(k, dtype=DOUBLE))
    exact = MultivariateNormal(torch.zeros(s, k, dtype=DOUBLE), full).log_prob(nu).sum()
    assert max_error(unit.log_prob(z).sum() - whitening.log_volume, exact) < 1e-12


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_memory_outside_its_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta is"):
        Ema(beta=beta)


@pytest.mark.parametrize("q", [-1e-9, float("nan")])
def test_negative_process_noise_is_refused(q):
    with pytest.raises(ValueError, match="q is"):
        RandomWalk(q=q)


def test_random_walk_is_the_same_at_every_step():
    assert RandomWalk(q=0.2).transition(0, 1.0) == RandomWalk(q=0.2).transition(99, 5.0) == Transition(1.0, 1.0, 0.2)


def test_a_drift_is_a_share_of_the_prior():
    """Of p0 I where that is the prior, and told as it is where the prior is kept."""
    assert RandomWalk(drift=0.3).transition(0, 2.0) == Transition(1.0, 1.0, 0.6)
    assert RandomWalk(drift=0.3).transition(0, None) == Transition(1.0, 1.0, 0.0, 0.3)
    assert OrnsteinUhlenbeck(gamma=0.8).transition(0, None) == pytest.approx(Transition(0.8, 0.64, 0.0, 0.36))
    assert Forgetting().share == RandomWalk(q=0.2).share == 0.0
    with pytest.raises(ValueError, match=r"q is 0.1 and drift 0.2: process noise is given twice"):
        RandomWalk(q=0.1, drift=0.2)
    with pytest.raises(ValueError, match="drift is"):
        RandomWalk(drift=-0.1)


@pytest.mark.parametrize("gamma", [0.5, 0.99, 1.0])
def test_ornstein_uhlenbeck_returns_to_the_prior(gamma):
    transition, p0 = OrnsteinUhlenbeck(gamma=gamma).transition(3, 0.7), 0.7
    assert transition.scale * p0 + transition.q == pytest.approx(p0)  # the prior is stationary
    mean, variance = 5.0, 0.01
    for _ in range(4):
        mean, variance = transition.decay * mean, transition.scale * variance + transition.q
    assert mean == pytest.approx(5.0 * gamma**4)
    assert variance == pytest.approx(p0 + gamma**8 * (0.01 - p0))


def test_forgetting_follows_its_recursion():
    process, memory = Forgetting(factor=0.9, rate=0.97), 0.9
    for step in range(200):
        decay, scale, q, _ = process.transition(step, 1.0)
        assert (decay, q) == (1.0, 0.0)
        assert scale == pytest.approx(1 / memory)
        memory = 0.97 * memory + (1 - 0.97)
    assert memory == pytest.approx(1.0, abs=1e-3)
    assert Forgetting(factor=0.9, rate=1.0).transition(500, 1.0).scale == pytest.approx(1 / 0.9)


@pytest.mark.parametrize(
    ("process", "options", "says"),
    [
        (OrnsteinUhlenbeck, {"gamma": 0.0}, "gamma is"),
        (OrnsteinUhlenbeck, {"gamma": 1.1}, "gamma is"),
        (Forgetting, {"factor": 0.0}, "factor is"),
        (Forgetting, {"factor": 1.5}, "factor is"),
        (Forgetting, {"rate": -0.1}, "rate is"),
        (Forgetting, {"rate": float("nan")}, "rate is"),
    ],
)
def test_process_options_outside_their_range_are_refused(process, options, says):
    with pytest.raises(ValueError, match=says):
        process(**options)
