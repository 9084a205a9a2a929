"""How sure a fit is of one picture: interval of its probability, spread of all, likeness to the shots."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from kngd_ray.clip.adapters import Bottleneck, ClassResidual, Linear
from kngd_ray.errors import CheckpointError
from kngd_ray.filters import Diagonal, Inflate, Kronecker
from kngd_ray.training.batches import Support, seeded
from kngd_ray.training.calibration import Calibration, calibrate, predictor_of
from kngd_ray.training.fit import FitTask, fit
from kngd_ray.training.interval import _centre, interval_scale, probability_interval, probability_std
from kngd_ray.training.novelty import (
    Novelty,
    calibrate_and_compare,
    total_variance,
)
from kngd_ray.training.options import FilterOptions, FitOptions
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.settled import Settled, read_settled, save_settled

C, D, SHOTS = 4, 16, 10
CENTRES = normalize(torch.randn(C, D, generator=seeded(1)), dim=1)


def pictures(n: int, seed: int, centres: torch.Tensor = CENTRES) -> Support:
    """Unit vectors around the centres."""
    labels = torch.arange(n) % C
    noise = torch.randn(n, D, generator=seeded(seed))
    return Support(normalize(centres[labels] + 0.12 * noise, dim=1), labels)


def task_of(**options) -> FitTask:
    options = FitOptions(**{"epochs": 2, "batch_size": 8, **options})
    return FitTask(options, 0, pictures(C * SHOTS, 2), normalize(CENTRES + 0.3, dim=1), 20.0)


@pytest.mark.parametrize("adapter", [ClassResidual(), Linear(), Bottleneck(width=6)])
@pytest.mark.parametrize("family", [Diagonal(), Kronecker()])
def test_interval_and_spread_are_those_of_draws(adapter, family) -> None:
    task = task_of(adapter=(adapter,), filter=FilterOptions(covariance=family, p0=0.02))
    posterior = PosteriorOptions(draws=4000)
    predictor = predictor_of(fit(task), posterior)
    x, tau = pictures(8, 3).features, 0.05
    found = predictor.predict(x, tau)
    interval = probability_interval(predictor, x, found, tau)
    best = found.probabilities.argmax(1)
    deviations = predictor.family.sample(predictor.belief.covariance, 4000, seeded(5))
    parameters = dict(predictor.head.named_parameters())
    from torch.func import functional_call, vmap

    from kngd_ray.observations import unflatten

    def at(d: torch.Tensor) -> torch.Tensor:
        theta = unflatten(predictor.belief.mu + tau**0.5 * d.to(predictor.belief.mu), parameters)
        return functional_call(predictor.head, theta, (x,)).softmax(1)

    drawn = vmap(at, chunk_size=500)(deviations).detach()
    own = drawn[:, torch.arange(len(x)), best]
    quantiles = torch.quantile(own, torch.tensor([0.05, 0.95]), dim=0).mT
    assert torch.allclose(interval.float(), quantiles, atol=0.04)
    assert torch.allclose(probability_std(predictor, x, tau), drawn.std(0), atol=0.02)


def test_interval_holds_the_probability_and_widens_with_its_scale() -> None:
    predictor = predictor_of(fit(task_of()), PosteriorOptions(predict="linearised"))
    x = pictures(20, 3).features
    widths = []
    for tau in (0.01, 0.1, 1.0):
        found = predictor.predict(x, tau)
        interval = probability_interval(predictor, x, found, tau)
        best = found.probabilities.max(1).values
        assert bool(((interval[:, 0] <= best) & (best <= interval[:, 1])).all())
        assert bool(((interval >= 0) & (interval <= 1)).all())
        widths.append(float((interval[:, 1] - interval[:, 0]).mean()))
    assert widths == sorted(widths)


def test_probabilities_of_an_interval_average_to_the_predicted_one() -> None:
    rest = torch.tensor([0.9, 0.5, 0.3, 1e-2, 1e-6, 1e-30], dtype=torch.float64).repeat_interleave(4)
    sigma = torch.tensor([0.0, 0.3, 2.0, 5.0], dtype=torch.float64).repeat(6)
    centre = _centre(1 - rest, rest, sigma)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    for m, s, expected in zip(centre, sigma, rest, strict=True):
        average = float((torch.sigmoid(-m - s * z) * density).sum() / density.sum())
        assert average == pytest.approx(float(expected), rel=0.02)
    certain, impossible = (_centre(torch.tensor([p]), torch.tensor([1 - p]), torch.ones(1)) for p in (1.0, 0.0))
    assert float(certain) == -float(impossible) > 80


def test_in_log_odds_the_interval_of_a_confident_prediction_reaches_further_up() -> None:
    """As far up as down, as around the prediction's own log-odds, probabilities would average to less than it."""
    predictor = predictor_of(fit(task_of()), PosteriorOptions(predict="linearised"))
    x = pictures(20, 3).features
    found = predictor.predict(x, 0.01)
    best = found.probabilities.max(1).values.double()
    interval = probability_interval(predictor, x, found, 0.3)
    down, up = best.logit() - interval[:, 0].logit(), interval[:, 1].logit() - best.logit()
    confident = best > 0.6
    assert bool(confident.any())
    assert bool((up > down)[confident].all())


@pytest.mark.parametrize(
    ("method", "predict", "scale"), [("adamw", "draws", 1.0), ("kalman", "mean", 1.0), ("kalman", "draws", None)]
)
def test_no_interval_without_a_posterior_or_a_scale(method, predict, scale) -> None:
    predictor = predictor_of(fit(task_of(method=method)), PosteriorOptions(predict=predict))
    x = pictures(3, 3).features
    assert probability_interval(predictor, x, predictor.predict(x, 0.0), scale) is None
    if predict != "mean":
        assert not probability_std(predictor, x, scale).any()


def test_the_scale_makes_the_median_shot_uncertain_by_two_nats() -> None:
    assert interval_scale(None) is None
    assert interval_scale(Novelty((0.0, 0.0, 1.0))) is None, "sure of everything"
    assert interval_scale(Novelty((0.1, 16.0, 20.0))) == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"filter": FilterOptions(covariance=Kronecker(), p0=0.05, iterations=3)},
        {"filter": FilterOptions(gate=Inflate())},
    ],
)
def test_new_pictures_of_the_classes_rank_as_the_shots_and_others_above_them(options) -> None:
    task = task_of(**options)
    posterior = PosteriorOptions(draws=8)
    calibration, novelty = calibrate_and_compare(task, posterior)
    assert calibration == calibrate(task, posterior)
    assert len(novelty.quantiles) == len(task.support)
    predictor = predictor_of(fit(task), posterior)
    near = novelty.score(total_variance(predictor, pictures(200, 7).features))
    centres = normalize(torch.randn(C, D, generator=seeded(11)), dim=1)
    far = novelty.score(total_variance(predictor, pictures(200, 7, centres).features))
    assert 0.2 < float(near.mean()) < 0.8
    assert float(far.mean()) > float(near.mean()) + 0.15


def test_single_shots_are_compared_by_fits_of_the_others() -> None:
    """Not by the belief that chooses tau for them: it has seen no picture, and is as sure of all."""
    task = replace(task_of(filter=FilterOptions(covariance=Kronecker(), p0=0.05)), support=pictures(C, 2))
    posterior = PosteriorOptions(predict="linearised")
    calibration, novelty = calibrate_and_compare(task, posterior)
    assert calibration == calibrate(task, posterior)
    assert len(set(novelty.quantiles)) == C
    predictor = predictor_of(fit(task), posterior)
    near = novelty.score(total_variance(predictor, pictures(200, 7).features))
    centres = normalize(torch.randn(C, D, generator=seeded(11)), dim=1)
    far = novelty.score(total_variance(predictor, pictures(200, 7, centres).features))
    assert float(far.mean()) > float(near.mean()) + 0.15


def test_nothing_to_compare_with(monkeypatch) -> None:
    task = task_of()
    assert calibrate_and_compare(task, PosteriorOptions(folds=0)) == (Calibration(1.0, 1.0), None)
    assert calibrate_and_compare(task_of(method="adamw"), PosteriorOptions(folds=2))[1] is None
    assert Novelty.of(torch.zeros(4)) is None
    assert Novelty.of(torch.tensor([1.0, torch.nan])) is None
    assert Novelty.of(torch.empty(0)) is None


def test_score_is_the_share_of_surer_shots() -> None:
    novelty = Novelty.of(torch.tensor([3.0, 1.0, 2.0, 4.0]))
    assert novelty.score(torch.tensor([0.5, 2.5, 9.0])).tolist() == [0.0, 0.5, 1.0]
    many = Novelty.of(torch.arange(1.0, 5001.0))
    assert len(many.quantiles) == 512
    assert float(many.score(torch.tensor([2500.0]))) == pytest.approx(0.5, abs=0.01)


def test_settled_round_trip_and_older_files(tmp_path) -> None:
    settled = Settled(Calibration(0.3, 1.1), PosteriorOptions(), None, Novelty((0.25, 1.5)))
    save_settled(tmp_path, settled)
    assert read_settled(tmp_path) == settled
    raw = json.loads((tmp_path / "calibration.json").read_text())
    del raw["novelty"], raw["calibration"]["sharpening"]  # which earlier versions did not know: logits as they are
    (tmp_path / "calibration.json").write_text(json.dumps(raw))
    assert read_settled(tmp_path) == replace(settled, novelty=None)
    for damaged in ({"quantiles": []}, {"quantiles": ["x"]}, {"quantiles": [-1.0]}, {}, 3):
        (tmp_path / "calibration.json").write_text(json.dumps({**raw, "novelty": damaged}))
        with pytest.raises(CheckpointError):
            read_settled(tmp_path)
