"""Every observation model against autograd on a definition of h written here."""

import pytest
import torch
from helpers.cases import CLASSES, LOGIT_SCALE, OBSERVATIONS, rng
from helpers.compare import max_error
from torch.autograd.functional import jacobian

from kngd_ray.observations import Categorical, Cosine, LogLikelihood, Observation, Probability, stack

C, M = 5, 7
EXACT = 1e-12


@pytest.fixture
def logits() -> torch.Tensor:
    return 2 * torch.randn(M, C, generator=rng(0), dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(C, (M,), generator=rng(1))


def none_drawn(m: int) -> torch.Tensor:
    return torch.zeros(m, 0, dtype=torch.float64)


# (model, h of one sample's logits and label, target of h); log p has innovation 1 by definition
SCALARS = {
    "cosine": (Cosine(), lambda row, y: row[y] / LOGIT_SCALE, 1.0),
    "probability": (Probability(), lambda row, y: row[y].exp() / row.exp().sum(), 1.0),
    "log_likelihood": (LogLikelihood(), lambda row, y: row[y] - row.exp().sum().log(), None),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalar_models_are_the_derivative_of_their_h(name, logits, labels):
    model, h, target = SCALARS[name]
    seen = model.observe(logits, labels, LOGIT_SCALE, none_drawn(M))
    assert seen.cotangent.shape == (M, 1, C)
    assert torch.equal(seen.channel, labels[:, None])
    for i, (row, y) in enumerate(zip(logits, labels, strict=True)):
        expected = jacobian(lambda r, y=y: h(r, y), row)
        assert max_error(seen.cotangent[i, 0], expected) < EXACT
        innovation = torch.tensor(1.0).double() if target is None else target - h(row, y)
        assert max_error(seen.innovation[i, 0], innovation) < EXACT
        p = float(h(row, y))
        base = p * (1 - p) if name == "probability" else 0.0
        assert float(seen.base_noise[i, 0]) == pytest.approx(base, abs=1e-14)


def ggn(logits: torch.Tensor) -> torch.Tensor:
    """Second derivative of the cross-entropy in the logits, by autograd: (m, C, C)."""
    return torch.stack([torch.autograd.functional.hessian(lambda r: r.logsumexp(0), row) for row in logits])


def gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Derivative of log p(y|x) in the logits, by autograd: (m, C)."""
    leaf = logits.clone().requires_grad_()
    (g,) = torch.autograd.grad(-torch.nn.functional.cross_entropy(leaf, labels, reduction="sum"), leaf)
    return g


def test_exact_categorical_is_the_generalised_gauss_newton_matrix(logits, labels):
    seen = Categorical().observe(logits, labels, LOGIT_SCALE, none_drawn(M))
    V, nu = seen.cotangent, seen.innovation
    assert max_error(V.mT @ V, ggn(logits)) < EXACT
    assert max_error((V.mT @ nu[:, :, None]).squeeze(2), gradient(logits, labels)) < EXACT
    assert torch.equal(seen.channel, torch.arange(C).expand(M, C))
    assert not seen.base_noise.any()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_sampled_categorical_has_the_exact_gradient(samples, logits, labels):
    uniforms = torch.rand(M, samples, generator=rng(2), dtype=torch.float64)
    seen = Categorical(samples=samples).observe(logits, labels, LOGIT_SCALE, uniforms)
    V, nu = seen.cotangent, seen.innovation
    assert V.shape == (M, samples + 1, C)
    assert max_error((V.mT @ nu[:, :, None]).squeeze(2), gradient(logits, labels)) < EXACT
    assert not nu[:, 1:].any()
    assert torch.equal(seen.channel[:, 0], labels)
    assert bool((seen.channel[:, 1:] != labels[:, None]).all())
    again = Categorical(samples=samples).observe(logits, labels, LOGIT_SCALE, uniforms)
    assert torch.equal(again.cotangent, V)


@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_categorical_is_unbiased(samples):
    """The mean over many draws lies within five standard errors of the exact matrix, entry by entry."""
    draws = 40_000
    row = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=torch.float64)
    for y in range(4):
        logits, labels = row.expand(draws, 4), torch.full((draws,), y)
        uniforms = torch.rand(draws, samples, generator=rng(y), dtype=torch.float64)
        V = Categorical(samples=samples).observe(logits, labels, LOGIT_SCALE, uniforms).cotangent
        drawn = V.mT @ V
        error = drawn.std(0) / draws**0.5
        assert float(((drawn.mean(0) - ggn(row)[0]).abs() / (error + 1e-12)).max()) < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_random_number_never_draws_the_true_class(dtype):
    """1 - 2^-53 is 1 in float32: the draw must stay on the last class that has probability."""
    logits = torch.randn(4, 4, generator=rng(0)).to(dtype)
    uniforms = torch.tensor([[0.0, 1 - 2.0**-53]]).double().expand(4, 2)
    seen = Categorical(samples=2).observe(logits, torch.arange(4), LOGIT_SCALE, uniforms)
    assert seen.channel[:, 1].tolist() == [1, 0, 0, 0]
    assert seen.channel[:, 2].tolist() == [3, 3, 3, 2]


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_saturated_logits_stay_finite(name):
    logits = torch.tensor([[200.0, 0.0, -200.0, 0.0]]).expand(4, 4)
    for model in OBSERVATIONS[name]:
        uniforms = torch.rand(4, model.draws(CLASSES), generator=rng(0))
        seen = model.observe(logits, torch.arange(4), LOGIT_SCALE, uniforms)
        for tensor in (seen.innovation, seen.cotangent, seen.base_noise):
            assert bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_a_non_finite_logit_reaches_the_innovation(name):
    """The filter refuses what it can see; a sample that went wrong must not look right."""
    for model in OBSERVATIONS[name]:
        logits = torch.zeros(2, 4)
        logits[1] = float("nan")
        uniforms = torch.rand(2, model.draws(4), generator=rng(0))
        seen = model.observe(logits, torch.tensor([0, 1]), LOGIT_SCALE, uniforms)
        assert bool(torch.isfinite(seen.innovation[0]).all())
        assert not bool(torch.isfinite(seen.innovation[1]).all())


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_no_samples(name):
    for model in OBSERVATIONS[name]:
        seen = model.observe(
            torch.zeros(0, C), torch.zeros(0, dtype=torch.long), LOGIT_SCALE, torch.zeros(0, model.draws(C))
        )
        k = seen.innovation.shape[1]
        assert seen.cotangent.shape == (0, k, C)
        assert seen.base_noise.shape == seen.channel.shape == (0, k)


@pytest.mark.parametrize("model", [Cosine, Probability, LogLikelihood, Categorical])
@pytest.mark.parametrize("r0", [0.0, -1.0, float("nan")])
def test_a_noise_that_is_not_positive_is_refused(model, r0):
    with pytest.raises(ValueError, match="r0 is"):
        model(r0=r0)


def test_a_negative_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="samples is -1"):
        Categorical(samples=-1)


@pytest.mark.parametrize(("channels", "expected"), [(1, [0, 1, 1]), (3, [2, 4, 5])])
def test_stack_numbers_the_channels_through_all_models(channels, expected):
    def one(values, classes):
        k = len(values)
        row = torch.tensor([values], dtype=torch.float64)
        return Observation(row, row[:, :, None].expand(1, k, 3), row / 10, torch.tensor([classes]))

    seen = stack([one([1.0], [2]), one([2.0, 3.0], [1, 2])], channels)
    assert seen.innovation.tolist() == [[1.0, 2.0, 3.0]]
    assert seen.cotangent[0, :, 0].tolist() == [1.0, 2.0, 3.0]
    assert seen.base_noise.tolist() == [[0.1, 0.2, 0.3]]
    assert seen.channel.tolist() == [expected]
