"""Predictions of whole towers: at the mean, over draws that are networks of their own, and of no pictures at all."""

from dataclasses import replace

import pytest
import torch
from helpers.compare import max_error
from helpers.tower_fits import FITS, in_dtype, make_task, started, write_shots
from helpers.towers import CLASSES, tiny_model
from torch import Tensor

from kngd_ray.clip import CLIPNetwork
from kngd_ray.errors import UsageError
from kngd_ray.filters import Belief
from kngd_ray.observations import flatten, trainable, unflatten
from kngd_ray.training.batches import seeded
from kngd_ray.training.calibration import decided_task, predictor_of
from kngd_ray.training.fit import fit, head_task
from kngd_ray.training.interval import probability_interval
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.network_predictor import NetworkPredictor, check_affordable, decisive
from kngd_ray.training.novelty import Novelty, compare_towers, total_variance, variance_left_out
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.predict import DRAWS_SEED, PosteriorOptions

DRAWS, TAU = 3, 0.3
OPTIONS = PosteriorOptions(predict="draws", draws=DRAWS)


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Pictures:
    return write_shots(tmp_path_factory.mktemp("shots") / "pictures.arrow", 70)


@pytest.fixture(scope="module", params=["full-vdekf", "cite-vdekf", "lora-kronecker"])
def method(request, shots) -> KalmanNGD:
    found = fit(make_task(request.param, shots.subset(torch.arange(7))))
    assert isinstance(found, KalmanNGD)
    return found


@pytest.fixture
def predictor(method) -> NetworkPredictor:
    found = predictor_of(method, OPTIONS)
    assert isinstance(found, NetworkPredictor)
    return found


def pixels(shots: Pictures, network: CLIPNetwork, count: int) -> Tensor:
    return torch.cat(list(shots.subset(torch.arange(count)).pixels(network.transform)))


def by_hand(predictor: NetworkPredictor, images: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Mean probabilities, and spread of the logits less their mean over classes, of draws as networks of their own."""
    network = predictor.head
    parameters = trainable(network)
    mean = flatten(parameters)
    assert predictor.family is not None
    assert predictor.belief is not None
    found = []
    try:
        for number in range(DRAWS):
            deviation = predictor.family.sample(predictor.belief.covariance, 1, seeded(DRAWS_SEED, number))[0]
            for name, value in unflatten(mean + tau**0.5 * deviation, parameters).items():
                parameters[name].data.copy_(value)
            with torch.no_grad():
                found.append(torch.cat([network.classify(image.unsqueeze(0)) for image in images]))
    finally:
        for name, value in unflatten(mean, parameters).items():
            parameters[name].data.copy_(value)
    logits = torch.stack(found).double()
    return logits.softmax(2).mean(0), (logits - logits.mean(2, keepdim=True)).std(0, correction=0)


def test_the_mean_is_the_network(predictor, shots) -> None:
    network = predictor.head
    images = pixels(shots, network, 5)
    with torch.no_grad():
        expected = network.classify(images).softmax(1)
    for prediction in (
        predictor.predict(images, 0.0),
        NetworkPredictor(network, predictor.family, predictor.belief, PosteriorOptions(predict="mean")).predict(
            images, TAU
        ),
        NetworkPredictor(network, None, None, OPTIONS).predict(images, TAU),
    ):
        torch.testing.assert_close(prediction.probabilities, expected)
        assert not prediction.logit_std.any()


def test_draws_are_networks_of_their_own(predictor, shots) -> None:
    images = pixels(shots, predictor.head, 4)
    before = flatten(trainable(predictor.head))
    found = predictor.predict(images, TAU)
    probabilities, spread = by_hand(predictor, images, TAU)
    assert max_error(found.probabilities, probabilities) < 1e-4
    assert max_error(found.logit_std, spread) < 1e-3
    assert float(found.logit_std.min()) > 0
    assert torch.equal(flatten(trainable(predictor.head)), before)
    assert (found.probabilities - predictor.predict(images, 0.0).probabilities).abs().max() > 1e-6
    again = predictor.predict(images, TAU)
    assert torch.equal(found.probabilities, again.probabilities)
    assert predictor.predict(images, 4 * TAU).logit_std.mean() > found.logit_std.mean()


def test_a_draw_that_fails_leaves_the_mean(predictor, shots, monkeypatch) -> None:
    images = pixels(shots, predictor.head, 2)
    before = flatten(trainable(predictor.head))

    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(CLIPNetwork, "classify", fails)
    with pytest.raises(MemoryError):
        predictor.predict(images, TAU)
    assert torch.equal(flatten(trainable(predictor.head)), before)


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_pictures_and_pixels_alike_in_batches(predictor, shots, tau) -> None:
    """More than go through the towers at once."""
    found = predictor.predict(shots, tau)
    assert found.probabilities.shape == (70, 3)
    expected = predictor.predict(pixels(shots, predictor.head, 70), tau)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tau", [0.0, TAU])
def test_no_pictures(predictor, shots, tau) -> None:
    """As a fold holds out that has none."""
    none = shots.subset(torch.zeros(70, dtype=torch.bool))
    for inputs in (none, pixels(shots, predictor.head, 1)[:0]):
        found = predictor.predict(inputs, tau)
        assert found.probabilities.shape == found.logit_std.shape == (0, 3)


def test_class_texts_are_encoded_once_a_draw(shots, monkeypatch) -> None:
    task = make_task("full-vdekf", shots.subset(torch.arange(7)))
    tune = replace(task.options.tune, include=("*",))
    method = fit(replace(task, options=replace(task.options, tune=tune)))
    network = method.head
    assert network.live_text
    counted = []
    classifier = CLIPNetwork.classifier

    def count(self: CLIPNetwork) -> Tensor:
        counted.append(1)
        return classifier(self)

    monkeypatch.setattr(CLIPNetwork, "classifier", count)
    predictor = predictor_of(method, OPTIONS)
    predictor.predict(shots, 0.0)
    assert len(counted) == 1
    predictor.predict(shots, TAU)
    assert len(counted) == 1 + DRAWS


def test_linearised_of_text_towers_is_of_the_head_alone(shots) -> None:
    task = make_task("start-lora", shots.subset(torch.arange(7)))
    tune = replace(task.options.tune, include=("transformer.*",))
    method = fit(started(replace(task, options=replace(task.options, tune=tune, epochs=1), head=None)))
    linearised = PosteriorOptions(predict="linearised")
    predictor = predictor_of(method, linearised)
    assert isinstance(predictor, NetworkPredictor)
    assert predictor.left_out
    assert bool((predictor.predict(torch.randn(2, 12), TAU).logit_std > 0).all())


def test_linearised_is_not_for_text_towers_of_class_logits() -> None:
    linearised = PosteriorOptions(predict="linearised")
    task = FITS["lora-ou"]
    network = CLIPNetwork(tiny_model(), CLASSES, ("a {}.",), task.tune, task.adapter)
    with pytest.raises(UsageError, match="set it to mean or draws"):
        check_affordable(linearised, network)
    check_affordable(OPTIONS, network)
    NetworkPredictor(network, None, None, linearised)  # of a method without a posterior it says nothing


def test_linearised_is_the_variance_along_what_decides(shots) -> None:
    """Head's part and towers' part, as derivatives of single pictures give them."""
    task = make_task("start-lora", shots.subset(torch.arange(7)))
    task = replace(task, options=replace(task.options, epochs=1))
    method = fit(started(replace(task, head=None)))
    assert isinstance(method, KalmanNGD)
    network, P = method.head, method.belief.covariance
    assert isinstance(network, CLIPNetwork)
    images, C = pixels(shots, network, 4), network.classes
    predictor = NetworkPredictor(network, method.family, method.belief, PosteriorOptions(predict="linearised"))
    found = predictor.logit_variance(images)
    towers = {name: p for name, p in trainable(network).items() if name.startswith("clip.")}
    head = P["head.adapters.0.delta.weight"]
    residual = network.head.residual
    assert residual is not None
    for image, variance in zip(images, found, strict=True):
        z = network.encode(image.unsqueeze(0))
        logits = network.head(z)[0]
        r = decisive(logits.detach().unsqueeze(0))[0]
        gradient = torch.autograd.grad(logits @ r, list(towers.values()))
        v = sum((P[name]["variance"].view_as(g) * g.square()).sum() for name, g in zip(towers, gradient, strict=True))
        x = residual.inputs(z)[0].detach()
        centre = torch.eye(C) - 1 / C
        of_head = network.logit_scale**2 * (x @ head["A"] @ x) * (centre @ head["B"] @ centre).diagonal()
        assert max_error(variance, of_head + v / r.square().sum() * (1 - 1 / C)) < 1e-4
        assert float(v) > 0
        along = predictor.variance_along(image.unsqueeze(0), r.view(1, 1, C))
        assert max_error(along[0, 0], network.logit_scale**2 * (x @ head["A"] @ x) * (r @ head["B"] @ r) + v) < 1e-4
    tempered = predictor.predict(images, TAU)
    assert max_error(tempered.logit_std.square(), TAU * found) < 1e-4
    plain = predictor.predict(images, 0.0).probabilities
    assert torch.equal(tempered.probabilities.argmax(1), plain.argmax(1))
    assert bool((tempered.probabilities.max(1).values < plain.max(1).values).all())


def test_linearised_without_towers_is_the_heads(shots) -> None:
    """At a prior variance of 0: probabilities and standard deviations of the head's own run."""
    task = make_task("start-lora", shots.subset(torch.arange(7)))
    narrow, tune = replace(task.options.filter, tower_logit_variance=0.0), replace(task.options.tune, views=0)
    task = started(replace(task, options=replace(task.options, filter=narrow, tune=tune), head=None))
    assert task.head is not None
    options = PosteriorOptions(predict="linearised")
    head = predictor_of(fit(head_task(task)), options)
    own = head.predict(task.head.support.features, TAU)
    pictures = shots.subset(torch.arange(7))
    predictor = predictor_of(fit(task), options)
    found = predictor.predict(pictures, TAU)
    assert max_error(found.probabilities, own.probabilities) < 1e-5
    assert max_error(found.logit_std, own.logit_std) < 1e-4
    of_head, of_towers = (
        probability_interval(p, x, prediction, 0.1)
        for p, x, prediction in ((head, task.head.support.features, own), (predictor, pictures, found))
    )
    assert max_error(of_towers, of_head) < 1e-4


def test_towers_give_up_a_shot_as_their_head_does(shots) -> None:
    """Shots are measured as by the head where towers add nothing, and grow by the same factors where they do."""
    task = make_task("start-lora", shots.subset(torch.arange(7)))
    tune = replace(task.options.tune, views=0)
    task = started(replace(task, options=replace(task.options, tune=tune), head=None))
    narrow = replace(task.options, filter=replace(task.options.filter, tower_logit_variance=0.0))
    first = head_task(task)
    head = fit(first)
    without = variance_left_out(decided_task(first, head.state()), fitted=head.state())
    options = PosteriorOptions(predict="linearised")
    still = compare_towers(replace(task, options=narrow), predictor_of(fit(replace(task, options=narrow)), options))
    assert still is not None
    assert still.quantiles == pytest.approx(Novelty.of(without).quantiles, rel=1e-3)
    towers = predictor_of(fit(task), options)
    found = compare_towers(task, towers)
    assert found is not None
    pictures = task.support.inputs
    grown = without / total_variance(predictor_of(head, options), first.support.features)
    assert bool((grown > 1).all())
    assert found.quantiles == pytest.approx(Novelty.of(grown * total_variance(towers, pictures)).quantiles, rel=1e-3)
    assert compare_towers(task, predictor_of(fit(task), OPTIONS)) is None, "draws take a pass for each"


def test_a_picture_is_linearised_once(shots, monkeypatch) -> None:
    """Probabilities at every tau, interval and novelty percentile take one backward pass."""
    task = make_task("start-lora", shots.subset(torch.arange(7)))
    predictor = predictor_of(fit(started(replace(task, head=None))), PosteriorOptions(predict="linearised"))
    images, passes = pixels(shots, predictor.head, 4), []
    own = NetworkPredictor._of_batch
    monkeypatch.setattr(NetworkPredictor, "_of_batch", lambda *args: passes.append(1) or own(*args))
    at_taus = [predictor.predict(images, tau) for tau in (0.1, TAU)]
    assert probability_interval(predictor, images, at_taus[0], 0.1).shape == (4, 2)
    assert total_variance(predictor, images).shape == (4,)
    assert len(passes) == 1
    predictor.predict(pixels(shots, predictor.head, 3), TAU)
    assert len(passes) == 2


def test_draws_have_the_covariance_of_the_belief(shots) -> None:
    """In the order of theta: the spread of the logits, by a first-order expansion, for a narrow belief."""
    with in_dtype(torch.float64):
        task = make_task("full-vdekf", shots.subset(torch.arange(7)))
        method = fit(task)
        assert isinstance(method, KalmanNGD)
    network = method.head
    images = pixels(shots, network, 2).double()
    narrow = {name: {key: 1e-6 * value for key, value in P.items()} for name, P in method.belief.covariance.items()}
    belief = Belief(method.belief.mu, narrow)
    options = PosteriorOptions(predict="draws", draws=400)
    found = NetworkPredictor(network, method.family, belief, options).predict(images, 1.0).logit_std
    parameters = trainable(network)
    expected = torch.empty(2, 3, dtype=torch.float64)
    for n, image in enumerate(images):
        logits = network.classify(image.unsqueeze(0))[0]
        logits = logits - logits.mean()  # what they have in common no softmax sees
        for c in range(3):
            gradient = torch.autograd.grad(logits[c], list(parameters.values()), retain_graph=True, allow_unused=True)
            expected[n, c] = sum(
                (narrow[name]["variance"].view_as(g) * g.square()).sum()
                for name, g in zip(parameters, gradient, strict=True)
                if g is not None
            )
    assert ((found / expected.sqrt()).log().abs() < 0.15).all()


def test_bfloat16_of_a_first_step(shots) -> None:
    """Activations are rounded, weights and P are not; the innovation is about that of float32."""
    part = shots.subset(torch.arange(7))
    ends = {}
    for precision in ("float32", "bfloat16"):
        task = make_task("lora-ou", part)
        tune = replace(task.options.tune, precision=precision)
        records = []
        method = fit(replace(task, options=replace(task.options, tune=tune)), on_step=records.append)
        assert isinstance(method, KalmanNGD)
        assert {value.dtype for P in method.belief.covariance.values() for value in P.values()} == {torch.float32}
        assert {p.dtype for p in trainable(method.head).values()} == {torch.float32}
        ends[precision] = records[0].stats
    for figure in ("nll", "innovation_rms", "nis_per_observation"):
        fine, rough = (getattr(ends[precision], figure) for precision in ("float32", "bfloat16"))
        assert rough == pytest.approx(fine, rel=0.05), figure
    assert ends["float32"] != ends["bfloat16"]
