"""On linear-Gaussian data a Kalman filter is Bayes' rule: mean, covariance and evidence are exact."""

import numpy as np
import pytest
import torch
from helpers.cases import rng
from helpers.compare import max_error
from scipy.stats import chi2, multivariate_normal
from torch import Tensor

from kngd_ray.filters import Belief, Dense, Innovation, Layer, Part, RandomWalk, Rows, Whitening, update

N = 5
SIZES = (3, 1, 5, 2, 8, 1)  # ragged: fewer, as many and more observations than weights
EXACT = 1e-10
Batch = tuple[Tensor, Tensor, Tensor]


def belief_of(mu: Tensor, P: Tensor) -> Belief:
    return Belief(mu, {"all": {"covariance": P}})


def matrix(belief: Belief) -> Tensor:
    return belief.covariance["all"]["covariance"]


def observe(belief: Belief, H: Tensor, y: Tensor, R: Tensor) -> tuple[Belief, Innovation, float]:
    """The update with noise R, and its log-evidence, that of the observations before they are whitened."""
    whitening, nu = Whitening(R.unsqueeze(1)), y - H @ belief.mu
    rows = whitening.rows(H.unsqueeze(1)).squeeze(1)
    found, innovation = update(Dense(), belief, {"w": Rows(rows)}, whitening.innovations(nu.unsqueeze(1)).squeeze(1))
    return found, innovation, innovation.log_evidence - whitening.log_volume


@pytest.fixture(scope="module")
def prior() -> Belief:
    A = torch.randn(N, N, generator=rng(0), dtype=torch.float64)
    mu = torch.randn(N, generator=rng(1), dtype=torch.float64)
    return belief_of(mu, A @ A.mT / N + 0.1 * torch.eye(N).double())


@pytest.fixture(scope="module")
def stream(prior) -> list[Batch]:
    """(H, y, R) per batch, each observation with a noise of its own."""
    g = rng(2)
    theta = prior.mu + torch.linalg.cholesky(matrix(prior)) @ torch.randn(N, generator=g, dtype=torch.float64)
    batches = []
    for m in SIZES:
        H = torch.randn(m, N, generator=g, dtype=torch.float64)
        R = 0.05 + torch.rand(m, generator=g, dtype=torch.float64)
        batches.append((H, H @ theta + R.sqrt() * torch.randn(m, generator=g, dtype=torch.float64), R))
    return batches


def test_dense_is_the_batch_posterior_at_every_step(prior, stream):
    belief, evidence = prior, 0.0
    for t, (H, y, R) in enumerate(stream, 1):
        belief, _, log_evidence = observe(belief, H, y, R)
        evidence += log_evidence

        H_all, y_all, R_all = (torch.cat(parts) for parts in zip(*stream[:t], strict=True))
        precision = matrix(prior).inverse() + H_all.mT @ (H_all / R_all[:, None])
        information = matrix(prior).inverse() @ prior.mu + H_all.mT @ (y_all / R_all)
        S = H_all @ matrix(prior) @ H_all.mT + R_all.diag()
        joint = multivariate_normal(H_all @ prior.mu, S).logpdf(y_all)

        assert max_error(matrix(belief), precision.inverse()) < EXACT
        assert max_error(belief.mu, torch.linalg.solve(precision, information)) < EXACT
        assert max_error(evidence, joint) < EXACT
        assert torch.equal(matrix(belief), matrix(belief).mT)


@pytest.mark.parametrize("q", [1e-3, 0.5])
def test_random_walk_equals_a_textbook_filter(prior, stream, q):
    family, process, belief = Dense(), RandomWalk(q=q), prior
    mu, P = prior.mu.numpy().copy(), matrix(prior).numpy().copy()
    for step, (H, y, R) in enumerate(stream):
        transition = process.transition(step, p0=1.0)
        predicted = family.predict(belief.covariance, transition.scale, transition.q, lambda x: x)
        belief, innovation, log_evidence = observe(Belief(belief.mu, predicted), H, y, R)

        h, z, r = H.numpy(), y.numpy(), np.diag(R.numpy())
        P = P + q * np.eye(N)
        S = h @ P @ h.T + r
        K = P @ h.T @ np.linalg.inv(S)
        nu = z - h @ mu
        mu = mu + K @ nu
        J = np.eye(N) - K @ h
        P = J @ P @ J.T + K @ r @ K.T  # Joseph's form, which the filter does not use

        assert max_error(belief.mu, torch.from_numpy(mu)) < EXACT
        assert max_error(matrix(belief), torch.from_numpy(P)) < EXACT
        assert max_error(innovation.nis, nu @ np.linalg.solve(S, nu)) < EXACT
        assert max_error(log_evidence, multivariate_normal(np.zeros(len(nu)), S).logpdf(nu)) < EXACT


def test_order_of_the_batches_does_not_matter(prior, stream):
    def run(batches: list[Batch]) -> tuple[Belief, float]:
        belief, evidence = prior, 0.0
        for batch in batches:
            belief, _, log_evidence = observe(belief, *batch)
            evidence += log_evidence
        return belief, evidence

    (forward, e1), (backward, e2) = run(stream), run(stream[::-1])
    assert max_error(backward.mu, forward.mu) < EXACT
    assert max_error(matrix(backward), matrix(forward)) < EXACT
    assert max_error(e2, e1) < EXACT


def test_nis_of_a_true_model_is_chi_squared():
    """The sum over a long simulation lies within the 1e-4 tails of its distribution."""
    g, family, part = rng(5), Dense(), Part(Layer("w", N, 1, factored=False), 0, N)
    total, count = 0.0, 0
    for _ in range(60):
        theta = torch.randn(N, generator=g, dtype=torch.float64) * 0.3
        belief = Belief(torch.zeros(N, dtype=torch.float64), family.init([part], 0.09, theta))
        for m in (2, 4):
            H = torch.randn(m, N, generator=g, dtype=torch.float64)
            y = H @ theta + 0.2 * torch.randn(m, generator=g, dtype=torch.float64)
            belief, innovation, _ = observe(belief, H, y, torch.full((m,), 0.04, dtype=torch.float64))
            total, count = total + innovation.nis, count + m
    low, high = chi2(count).interval(1 - 2e-4)
    assert low < total < high
