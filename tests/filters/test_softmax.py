"""The mode and the covariance of a linear softmax classifier, against an optimiser and a dense posterior."""

from math import log, pi

import pytest
import torch
from helpers.compare import max_error
from helpers.pretended_device import pretended_device
from torch.nn.functional import cross_entropy, one_hot

from kngd_ray.errors import FilterError
from kngd_ray.filters import Classified, HeldOut, condition_softmax, newton
from kngd_ray.filters.newton import Whitened
from kngd_ray.filters.softmax import nearest_product

ROWS, COLUMNS, SCALE = 5, 6, 7.0  # classes, inputs, logit scale


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def covariance(n: int, seed: int) -> torch.Tensor:
    X = torch.randn(n, n + 2, dtype=torch.float64, generator=rng(seed))
    return X @ X.mT / n


def batch(N: int, seed: int = 0, noise: float = 1.0) -> Classified:
    g = rng(seed)
    x = torch.randn(N, COLUMNS, dtype=torch.float64, generator=g)
    logits = 3 * torch.randn(N, ROWS, dtype=torch.float64, generator=g)
    return Classified(x, logits, torch.randint(ROWS, (N,), generator=g), SCALE, noise)


def whitened(seen: Classified, A: torch.Tensor) -> Whitened:
    return Whitened.of(seen.scale * seen.x, A)


def by_lbfgs(B: torch.Tensor, A: torch.Tensor, seen: Classified) -> torch.Tensor:
    """W - W^- at the mode, by an optimiser that knows nothing of filters."""
    roots = torch.linalg.cholesky(B), torch.linalg.cholesky(A)
    U = torch.zeros(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [U], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = seen.logits + seen.scale * seen.x @ (roots[0] @ U @ roots[1].mT).mT
        loss = cross_entropy(logits, seen.labels, reduction="sum") / seen.noise + 0.5 * U.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return (roots[0] @ U @ roots[1].mT).detach()


@pytest.mark.parametrize("N", [1, 4, 30])  # fewer samples than inputs, and more
@pytest.mark.parametrize("noise", [1.0, 3.0])
@pytest.mark.parametrize("rows", ["identity", "any"])
def test_the_mean_is_the_mode(N, noise, rows):
    B = 0.4 * torch.eye(ROWS, dtype=torch.float64) if rows == "identity" else covariance(ROWS, 1)
    A, seen = covariance(COLUMNS, 2), batch(N, 3, noise)
    found = condition_softmax(B, A, seen, tolerance=1e-9, linearisations=60)
    assert found.settled
    logits = [seen.scale * seen.x @ step.mT for step in (found.step, by_lbfgs(B, A, seen))]
    assert max_error(*logits) < 1e-5


@pytest.mark.parametrize("N", [1, 30])
def test_inputs_of_zeros_say_nothing(N):
    seen = batch(N, 3)
    seen.x.zero_()
    found = condition_softmax(covariance(ROWS, 1), covariance(COLUMNS, 2), seen, tolerance=1e-6, linearisations=9)
    assert found.settled
    assert max_error(found.step, torch.zeros(ROWS, COLUMNS, dtype=torch.float64)) == 0
    assert bool(torch.isfinite(found.A).all())


def test_wide_priors_and_separable_labels_settle():
    """The case that overshoots without halved steps: labels that fit, a prior that lets logits go far."""
    seen = batch(20, 5)
    found = condition_softmax(
        1e4 * torch.eye(ROWS, dtype=torch.float64), covariance(COLUMNS, 2), seen, tolerance=1e-6, linearisations=100
    )
    assert found.settled
    assert bool(torch.isfinite(found.step).all())


def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing():
    B, A, seen = covariance(ROWS, 1), covariance(COLUMNS, 2), batch(12, 4)
    moved = Classified(seen.x, seen.logits + 25 * torch.rand(12, 1, dtype=torch.float64), seen.labels, SCALE)
    one, other = (condition_softmax(B, A, s, tolerance=1e-9, linearisations=60) for s in (seen, moved))
    assert max_error(one.step, other.step) < 1e-7
    assert max_error(one.B, other.B) < 1e-7
    assert max_error(one.A, other.A) < 1e-7
    assert one.log_evidence == pytest.approx(other.log_evidence, abs=1e-7)


def dense_precision(B: torch.Tensor, A: torch.Tensor, seen: Classified, p: torch.Tensor) -> torch.Tensor:
    H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    data = torch.einsum("nab,ni,nj->aibj", H, seen.x, seen.x).reshape(ROWS * COLUMNS, ROWS * COLUMNS)
    return torch.kron(torch.linalg.inv(B), torch.linalg.inv(A)) + seen.scale**2 / seen.noise * data


def divergence(B: torch.Tensor, A: torch.Tensor, precision: torch.Tensor) -> float:
    """KL(N(0, B x A) || N(0, precision^-1)), nats."""
    P = torch.kron(B, A)
    return float(0.5 * ((precision @ P).trace() - len(P) - torch.linalg.slogdet(precision @ P).logabsdet))


@pytest.mark.parametrize("N", [4, 9])  # fewer samples than inputs, and more
@pytest.mark.parametrize("kind", ["any", "certain", "twice"])
def test_the_covariance_is_the_nearest_product(N, kind):
    B, A, seen = covariance(ROWS, 1), covariance(COLUMNS, 2), batch(N, 3, 2.0)
    if kind == "certain":  # its curvature is 0 to rounding
        seen.logits[1] = 900.0 * one_hot(seen.labels[1], ROWS)
    elif kind == "twice":  # x A x^T is singular
        seen.x[1], seen.logits[1] = seen.x[0], seen.logits[0]
    p = seen.logits.softmax(1)
    B_new, A_new, log_det = nearest_product(B, A, whitened(seen, A), p, seen.noise)
    precision = dense_precision(B, A, seen, p)
    best = divergence(B_new, A_new, precision)
    assert best < 0.5 * divergence(B, A, precision)
    for n in range(20):  # no product near it is nearer
        other_B = B_new + 1e-3 * covariance(ROWS, 10 + n) * (-1) ** n * B_new.diagonal().mean()
        other_A = A_new + 1e-3 * covariance(COLUMNS, 50 + n) * (-1) ** (n // 2) * A_new.diagonal().mean()
        assert divergence(other_B, other_A, precision) > best - 1e-9
    expected = 0.5 * (torch.linalg.slogdet(torch.kron(B_new, A_new))[1] - torch.linalg.slogdet(torch.kron(B, A))[1])
    assert log_det == pytest.approx(float(expected), abs=1e-8)


def test_the_covariance_is_exact_where_it_is_a_product():
    """One input direction and a prior of one: the posterior over the rows is all there is."""
    B, A = covariance(ROWS, 1), torch.ones(1, 1, dtype=torch.float64)
    seen = batch(8, 3)
    seen = Classified(seen.x[:, :1], seen.logits, seen.labels, SCALE)
    p = seen.logits.softmax(1)
    B_new, A_new, _ = nearest_product(B, A, whitened(seen, A), p, seen.noise)
    H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.linalg.inv(torch.linalg.inv(B) + SCALE**2 * (seen.x.square().unsqueeze(2) * H).sum(0))
    assert max_error(B_new * A_new, expected) < 1e-6


def test_the_evidence_is_laplaces():
    """Of one weight, where the product is exact: log p(y | f) - |u|^2 / 2 + (log P - log P^-) / 2, at the mode."""
    B, A = torch.eye(2, dtype=torch.float64), torch.full((1, 1), 0.3, dtype=torch.float64)
    x = torch.tensor([[1.0], [-0.5], [2.0]], dtype=torch.float64)
    seen = Classified(x, torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0, 1, 0]), 2.0)
    found = condition_softmax(B, A, seen, tolerance=1e-10, linearisations=60)
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    # the difference of the two logits is all that matters: its prior variance is 2 s^2 x^2 A
    d = grid * (2 * 0.3) ** 0.5
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    log_joint = torch.nn.functional.logsigmoid(signs[:, None] * 2.0 * x * d).sum(0) - 0.5 * grid.square()
    exact = torch.logsumexp(log_joint, 0) + log(24 / 40_000) - 0.5 * log(2 * pi)
    assert found.log_evidence == pytest.approx(float(exact), abs=0.05)


def test_modes_under_several_variances_are_those_of_each():
    A, seen = covariance(COLUMNS, 2), batch(10, 3)
    other = torch.randn(4, COLUMNS, dtype=torch.float64, generator=rng(9))
    variances = (0.1, 1.0, 30.0)
    fewer = Classified(seen.x[:7], seen.logits[:7], seen.labels[:7], SCALE)
    held_out = HeldOut([(A, seen, other), (A, fewer, other[:3])], tolerance=1e-9, linearisations=60)
    for v in variances:
        moved, of_fewer = held_out.logits(v)
        one = condition_softmax(v * torch.eye(ROWS, dtype=torch.float64), A, seen, tolerance=1e-9, linearisations=60)
        assert max_error(moved, SCALE * other @ one.step.mT) < 1e-6
        one = condition_softmax(v * torch.eye(ROWS, dtype=torch.float64), A, fewer, tolerance=1e-9, linearisations=60)
        assert max_error(of_fewer, SCALE * other[:3] @ one.step.mT) < 1e-6


def test_no_sample_changes_nothing():
    B, A = covariance(ROWS, 1), covariance(COLUMNS, 2)
    found = condition_softmax(B, A, batch(0), tolerance=1e-6, linearisations=5)
    assert not found.step.any()
    assert torch.equal(found.B, B)
    assert torch.equal(found.A, A)


def test_what_is_not_finite_is_refused():
    seen = batch(3)
    seen.x[1, 2] = float("nan")
    with pytest.raises(FilterError, match="NaN or infinite"):
        condition_softmax(covariance(ROWS, 1), covariance(COLUMNS, 2), seen, tolerance=1e-6, linearisations=5)


def test_float32_ends_where_float64_does():
    B, A, seen = 50 * torch.eye(ROWS), covariance(COLUMNS, 2), batch(40, 3)
    wide = condition_softmax(B.double(), A, seen, tolerance=1e-9, linearisations=60)
    narrow = Classified(seen.x.float(), seen.logits.float(), seen.labels, SCALE)
    found = condition_softmax(B, A.float(), narrow, tolerance=1e-3, linearisations=60)
    assert found.step.dtype == found.B.dtype == torch.float32
    logits = [SCALE * seen.x @ step.double().mT for step in (found.step, wide.step)]
    assert max_error(*logits) < 1e-3


def test_each_label_is_more_likely_than_before():
    seen = batch(15, 8)
    found = condition_softmax(
        torch.eye(ROWS, dtype=torch.float64), covariance(COLUMNS, 2), seen, tolerance=1e-6, linearisations=60
    )
    after = seen.logits + SCALE * seen.x @ found.step.mT
    assert float(cross_entropy(after, seen.labels)) < float(cross_entropy(seen.logits, seen.labels))
    residual = one_hot(seen.labels, ROWS).double() - after.softmax(1)
    expected = SCALE * residual.mT @ seen.x @ covariance(COLUMNS, 2)
    assert max_error(found.step, expected) < 1e-5


def test_a_direction_that_was_cut_short_is_no_sign_of_having_arrived(monkeypatch):
    """On a device, where products are few to begin with, and nobody looks whether they were enough."""
    monkeypatch.setattr(newton, "_UNREAD", 1)
    g, (N, C, d) = rng(1), (60, 20, 40)
    x = torch.randn(N, d, dtype=torch.float64, generator=g) / d**0.5
    logits = 3 * torch.randn(N, C, dtype=torch.float64, generator=g)
    seen = Classified(x, logits, torch.randint(C, (N,), generator=g), 20.0)
    problem = seen.problem(whitened(seen, covariance(d, 2)).Z)
    one = torch.ones((), dtype=torch.float64)
    expected = newton.mode(problem, newton.RowRoot(one), tolerance=1e-9, linearisations=100).log_p
    with pretended_device() as machine:
        parts = (problem.Z, problem.logits, problem.labels, problem.counts)
        there = newton.Problem(*(part.to(machine.device) for part in parts))
        found = newton.mode(there, newton.RowRoot(one.to(machine.device)), tolerance=0.3, linearisations=100)
        log_p = found.log_p.cpu()
    assert found.settled
    assert float((log_p - expected).abs().max()) < 0.01


def test_a_step_that_only_rounding_is_left_of_is_not_halved_again_and_again(monkeypatch):
    """A head that is certain of its labels: their log-probability is 0 in float32, and any step has a length."""
    taken = []
    log_softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda *given: taken.append(given) or log_softmax(*given))
    logits = torch.tensor([[17.0, 0.0, 0.0], [0.0, 17.0, 0.0]])[None]
    problem = newton.Problem(torch.eye(2)[None], logits, torch.tensor([[0, 1]]), torch.ones(1, 2))
    found = newton.mode(problem, newton.RowRoot(torch.tensor(30.0)), tolerance=0.3, linearisations=5)
    assert found.settled
    assert not found.U.any()
    assert len(taken) == 3, "at the start, at the step that raises the objective, and without it"
