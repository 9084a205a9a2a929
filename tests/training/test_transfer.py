"""A fit over classes that it was not trained on, against its weights applied by hand."""

import pytest
import torch
from helpers.cases import ADAPTERS, FAMILIES, LOGIT_SCALE, make_head, make_support
from helpers.compare import covariance_of, max_error
from helpers.towers import KALMAN, make_network, tiny_model
from torch import Tensor
from torch.nn.functional import normalize

from kngd_ray.clip.adapters import ClassResidual
from kngd_ray.observations import Cosine, trainable, unflatten
from kngd_ray.training.batches import Batch, seeded
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import DRAWS_SEED, PosteriorOptions, Predictor
from kngd_ray.training.transfer import _LeftOut, transferred

OTHERS = ("tree", "sea", "road", "hill", "field")  # more than the classes trained on
TEMPLATES = ("a photo of a {}.",)


@pytest.fixture(scope="module")
def t() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return normalize(torch.randn(len(OTHERS), 6, generator=generator, dtype=torch.float64), dim=1)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return make_support(5).features


def by_hand(head, features: Tensor, t: Tensor) -> Tensor:
    """Logits by the adapters of embeddings alone."""
    z = features
    for adapter in head.adapters:
        z, t = adapter.image(z), adapter.text(t)
    return LOGIT_SCALE * normalize(z, dim=1) @ normalize(t, dim=1).mT


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_of_embeddings_carry_over(adapter, x, t):
    head = make_head(ADAPTERS[adapter])
    head.gamma = 0.6
    own = Predictor(head, None, None, PosteriorOptions())
    before = own.predict(x, 0.0).probabilities
    found = transferred(own, OTHERS, TEMPLATES, t, 0.8).predict(x, 0.0)
    gamma = 0.8 if ClassResidual() in ADAPTERS[adapter] else 0.6  # the head's makes room for what is left out
    assert max_error(found.probabilities, (gamma * by_hand(head, x, t)).softmax(1).detach()) < 1e-12
    if ADAPTERS[adapter] == (ClassResidual(),):
        assert max_error(found.probabilities, (0.8 * LOGIT_SCALE * x @ t.mT).softmax(1)) < 1e-12
    assert torch.equal(own.predict(x, 0.0).probabilities, before)


def fitted(family: str, adapter: str) -> KalmanNGD:
    options = FitOptions(
        adapter=ADAPTERS[adapter],
        observation=(Cosine(r0=0.01),),
        filter=FilterOptions(covariance=FAMILIES[family], p0=1e-4),
    )
    method, support = KalmanNGD(make_head(options.adapter), options), make_support(8)
    method.step(Batch(support.features, support.labels, [8], 0, 0))
    return method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["linear+class_residual", "bottleneck+linear+class_residual"])
def test_the_posterior_is_that_of_what_carries_over(family, adapter, x, t):
    method = fitted(family, adapter)
    linearised = predictor_of(method, PosteriorOptions(predict="linearised"))
    variance = transferred(linearised, OTHERS, TEMPLATES, t).logit_variance(x)
    parameters = dict(trainable(method.head))

    hand = _Hand(make_head(ADAPTERS[adapter]))

    def logits(theta: Tensor) -> Tensor:
        weights = {f"head.{name}": p for name, p in unflatten(theta, parameters).items()}
        return torch.func.functional_call(hand, weights, (x, t))

    H = torch.func.jacrev(logits)(method.belief.mu)
    H = H - H.mean(1, keepdim=True)  # what all logits have in common no softmax sees
    expected = torch.einsum("mci,ij,mcj->mc", H, covariance_of(method), H)
    assert max_error(variance, expected) < 1e-9
    draws = transferred(predictor_of(method, PosteriorOptions(draws=4000)), OTHERS, TEMPLATES, t).predict(x, 1.0)
    assert max_error(draws.logit_std.square(), expected) < 0.15


class _Hand(torch.nn.Module):
    def __init__(self, head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return by_hand(self.head, x, t)


def test_what_is_left_out_keeps_its_weights_in_their_order():
    """Its own as well as those of its parts: the belief is about all of them."""
    adapter = torch.nn.Linear(2, 3)
    adapter.part = torch.nn.Linear(1, 1)
    assert [*dict(_LeftOut(adapter).named_parameters())] == [*dict(adapter.named_parameters())]


def test_without_anything_that_carries_over_there_is_no_uncertainty(x, t):
    own = predictor_of(fitted("ekf", "class_residual"), PosteriorOptions())
    assert not transferred(own, OTHERS, TEMPLATES, t).predict(x, 1.0).logit_std.any()


@pytest.mark.parametrize("case", ["lora-ou", "full-ekf", "cite-vdekf"])
def test_towers_carry_over(case):
    """The image tower with texts by the tuned text tower, or by the pretrained one; each draw by its own weights."""
    network = make_network(KALMAN[case])
    method = KalmanNGD(network, KALMAN[case])
    pretrained = tiny_model().encode_classes(OTHERS, TEMPLATES)
    pretrained = normalize(pretrained.double(), dim=1)  # to more digits than it was encoded with
    other = transferred(predictor_of(method, PosteriorOptions(draws=3)), OTHERS, TEMPLATES, pretrained)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = trainable(network)
    kept = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def logits(deviation: Tensor | None = None) -> Tensor:
        if deviation is not None:
            for name, d in unflatten(deviation, parameters).items():
                parameters[name].copy_(kept[name] + 0.5 * d)
        tokens = tiny_model().tokenize([TEMPLATES[0].format(name) for name in OTHERS])
        t = normalize(network.clip.encode_text(tokens), dim=1) if network.text_trained else pretrained
        found = network.logit_scale * normalize(network.clip.encode_image(images), dim=1) @ t.mT
        for name, p in parameters.items():
            p.copy_(kept[name])
        return found

    assert max_error(other.predict(images, 0.0).probabilities, logits().softmax(1)) < 1e-9
    family, covariance = method.family, method.belief.covariance
    drawn = [logits(family.sample(covariance, 1, seeded(DRAWS_SEED, n))[0]).softmax(1) for n in range(3)]
    assert max_error(other.predict(images, 0.25).probabilities, torch.stack(drawn).mean(0)) < 1e-9
    assert all(torch.equal(p, kept[name]) for name, p in parameters.items())


def test_towers_whose_own_logits_are_linearised_predict_others_at_the_mean():
    """The covariance is one of the logits of the classes trained on, which were taken for those of the others."""
    method = KalmanNGD(make_network(KALMAN["full-ekf"]), KALMAN["full-ekf"])
    pretrained = tiny_model().encode_classes(OTHERS, TEMPLATES)
    pretrained = normalize(pretrained.double(), dim=1)
    own = predictor_of(method, PosteriorOptions(predict="linearised"))
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = transferred(own, OTHERS, TEMPLATES, pretrained).predict(images, 0.25)
    with torch.no_grad():
        logits = method.head.logit_scale * normalize(method.head.clip.encode_image(images), dim=1) @ pretrained.mT
    assert max_error(found.probabilities, logits.softmax(1)) < 1e-9
