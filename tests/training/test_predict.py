"""Predictions from the posterior: draws against the linearised variance, and the point as tau goes to 0."""

import math

import pytest
import torch
from helpers.cases import ADAPTERS, CLASSES, DIM, FAMILIES, LOGIT_SCALE, make_head, make_support
from helpers.compare import covariance_of, max_error

from kngd_ray.clip import CLIPHead
from kngd_ray.observations import Cosine, flatten, trainable
from kngd_ray.training.batches import Batch
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import PosteriorOptions, Predictor

DRAWS = 4000


def fitted(family: str = "dense", adapter: str = "class_residual", dtype: torch.dtype = torch.float64) -> KalmanNGD:
    """A belief after two steps, its variances far from equal."""
    options = FitOptions(
        adapter=ADAPTERS[adapter],
        observation=(Cosine(r0=0.01),),
        filter=FilterOptions(covariance=FAMILIES[family], p0=0.01),
    )
    method, support = KalmanNGD(make_head(options.adapter, dtype), options), make_support(8, dtype)
    for step in range(2):
        method.step(Batch(support.features, support.labels, [8], 0, step))
    return method


def predictor(family: str = "dense", adapter: str = "class_residual", **options) -> Predictor:
    return predictor_of(fitted(family, adapter), PosteriorOptions(**options))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return make_support(5).features


@pytest.mark.parametrize("family", FAMILIES)
def test_an_ensemble_ends_at_the_pretrained_model(family, x):
    at_clip = predictor_of(fitted(family), PosteriorOptions(), alpha=0.0)
    assert at_clip.belief is None
    zero_shot = CLIPHead(at_clip.head.class_embeddings, LOGIT_SCALE)
    assert max_error(at_clip.predict(x, 0.3).probabilities, zero_shot(x).softmax(1)) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_linearised_variance_is_the_variance_of_draws_on_a_linear_head(family, tau, x):
    spread = predictor(family, draws=DRAWS).predict(x, tau).logit_std.square()
    linearised = tau * predictor(family).logit_variance(x)
    assert float((spread / linearised - 1).abs().max()) < 5 * (2 / DRAWS) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_linearised_variance_in_closed_form(family, x):
    """Logit c of a class residual is s z^T delta_c: less its mean over classes its variance is that of C P C^T."""
    method = fitted(family)
    P = covariance_of(method).view(CLASSES, DIM, CLASSES, DIM)
    centre = torch.eye(CLASSES, dtype=P.dtype) - 1 / CLASSES
    joint = torch.einsum("md,cdke,me->mck", x, P, x)
    expected = LOGIT_SCALE**2 * (centre @ joint @ centre).diagonal(dim1=1, dim2=2)
    found = predictor_of(method, PosteriorOptions()).logit_variance(x)
    assert max_error(found, expected) < 1e-11


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_linearised_variance_does_not_depend_on_chunks(adapter, x, monkeypatch):
    p = predictor("ekf", adapter)
    whole = p.logit_variance(x)
    monkeypatch.setattr("kngd_ray.filters._update._ROWS", 1)
    monkeypatch.setattr("kngd_ray.training.predict._LINEARISED", 2)
    assert max_error(p.logit_variance(x), whole) < 1e-12
    assert p.logit_variance(x[:0]).shape == (0, CLASSES)


def test_draws_do_not_depend_on_chunks(x, monkeypatch):
    p = predictor(predict="draws")
    whole = p.predict(x, 0.3)
    monkeypatch.setattr("kngd_ray.training.predict._ENTRIES", 1)
    assert max_error(p.predict(x, 0.3).probabilities, whole.probabilities) < 1e-12
    assert max_error(p.predict(x, 0.3).logit_std, whole.logit_std) < 1e-12


@pytest.mark.parametrize("predict", ["draws", "linearised", "mean"])
def test_without_temperature_the_prediction_is_the_mean(predict, x):
    p = predictor(predict=predict)
    found = p.predict(x, 0.0)
    assert torch.equal(found.probabilities, p.head(x).softmax(1))
    assert not found.logit_std.any()


@pytest.mark.parametrize("predict", ["draws", "linearised"])
def test_prediction_is_continuous_in_the_temperature(predict, x):
    p = predictor(predict=predict)
    assert max_error(p.predict(x, 1e-12).probabilities, p.predict(x, 0.0).probabilities) < 1e-5


def test_draws_average_the_softmax(x):
    """Against quadrature that knows nothing of draws: the logits of a linear head are exactly Gaussian."""
    method = fitted()
    p = predictor_of(method, PosteriorOptions(draws=DRAWS))
    found = p.predict(x, 1.0)
    theta = torch.distributions.MultivariateNormal(p.belief.mu, covariance_of(method))
    torch.manual_seed(0)
    delta = theta.sample((20_000,)).view(-1, CLASSES, DIM)
    residual = p.head.adapters[0].delta.weight.detach()
    logits = p.head(x).detach() + LOGIT_SCALE * torch.einsum("md,ncd->nmc", x, delta - residual)
    probabilities = logits.softmax(2)
    error = probabilities.std(0) * (1 / DRAWS + 1 / 20_000) ** 0.5
    assert float(((found.probabilities - probabilities.mean(0)).abs() / error).max()) < 5


def test_linearised_is_the_probit_moderation(x):
    p = predictor(predict="linearised")
    variance = 0.5 * p.logit_variance(x)
    P = covariance_of(fitted()).view(CLASSES, DIM, CLASSES, DIM)
    joint = 0.5 * LOGIT_SCALE**2 * torch.einsum("md,cdke,me->mck", x, P, x)
    own = joint.diagonal(dim1=1, dim2=2)
    pairs = (own.unsqueeze(2) + own.unsqueeze(1) - 2 * joint).sum((1, 2)) / (CLASSES * (CLASSES - 1))
    expected = (p.head(x) / (1 + math.pi / 8 * pairs.unsqueeze(1)).sqrt()).softmax(1)
    found = p.predict(x, 0.5)
    assert max_error(found.probabilities, expected.detach()) < 1e-12
    assert max_error(found.logit_std, variance.sqrt()) < 1e-12


@pytest.mark.parametrize("predict", ["draws", "linearised", "mean"])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_probabilities_sum_to_one_and_repeat(predict, tau, x):
    first, second = (predictor(predict=predict).predict(x, tau) for _ in range(2))
    assert torch.equal(first.probabilities, second.probabilities)
    assert torch.allclose(first.probabilities.sum(1), torch.ones(5, dtype=torch.float64))


def test_samples_are_predicted_alike_alone_and_together(x):
    p = predictor()
    together = p.predict(x, 1.0).probabilities
    assert max_error(torch.cat([p.predict(row[None], 1.0).probabilities for row in x]), together) < 1e-12


def test_a_method_without_a_posterior_predicts_its_point(x):
    head = make_head(ADAPTERS["class_residual"])
    p = Predictor(head, None, None, PosteriorOptions())
    assert torch.equal(p.predict(x, 1.0).probabilities, head(x).softmax(1))
    assert not p.logit_variance(x).any()


def test_predicting_leaves_the_weights_alone(x):
    p = predictor()
    before = flatten(trainable(p.head))
    p.predict(x, 1.0)
    assert torch.equal(flatten(trainable(p.head)), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"draws": 0}, "draws is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"folds": 1}, "folds is 1"),
        ({"folds": -2}, "folds is -2"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        PosteriorOptions(**options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("predict", ["draws", "linearised"])
def test_a_head_in_float32_predicts_in_float32(family, predict, x):
    p = predictor_of(fitted(family, dtype=torch.float32), PosteriorOptions(predict=predict))
    found = p.predict(x.float(), 1.0)
    assert found.probabilities.dtype == found.logit_std.dtype == torch.float32
