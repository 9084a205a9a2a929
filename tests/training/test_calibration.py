"""tau and T come from held-out training shots: nothing is predicted by a fit that saw it."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.cases import CLASSES, make_options, make_support, make_task, rng
from helpers.compare import max_error
from torch.nn.functional import nll_loss

from kngd_ray.clip import CLIPHead
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import calibration
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import (
    TAU_GRID,
    Calibration,
    _chosen,
    below_zero_shot,
    calibrate,
    calibration_tasks,
    fit_sharpening,
    fit_temperature,
    predictor_of,
    scale,
    sharpened,
)
from kngd_ray.training.evaluation import evaluate
from kngd_ray.training.fit import begin, fit
from kngd_ray.training.folds import fold_of, single, twins_of
from kngd_ray.training.interval import probability_interval, probability_std
from kngd_ray.training.predict import PosteriorOptions, Predictor


@pytest.mark.parametrize("folds", [2, 3, 4, 10])
@pytest.mark.parametrize("shots", [[16] * 4, [1, 1, 1, 1, 1], [1, 2, 7, 3], [5]])
def test_folds_are_stratified(folds, shots):
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    labels = labels[torch.randperm(len(labels), generator=rng(0))]
    fold = fold_of(labels, folds)
    assert bool(((fold >= 0) & (fold < folds)).all())
    for c in range(len(shots)):
        counts = torch.bincount(fold[labels == c], minlength=folds)
        assert int(counts.max() - counts.min()) <= 1


def test_a_fit_below_zero_shot_on_its_held_out_shots_is_told(task):
    head = CLIPHead(task.class_embeddings, task.logit_scale)
    support = task.support
    zero_shot = float((head(support.features).argmax(1) == support.labels).double().mean())
    assert below_zero_shot(task, Calibration(1.0, 1.0, 0.1, zero_shot), 4) is None
    said = below_zero_shot(task, Calibration(1.0, 1.0, 0.1, zero_shot - 0.01), 4)
    assert said is not None
    assert f"CLIP as it is about {100 * zero_shot:.1f} %" in said
    assert below_zero_shot(task, Calibration(1.0, 1.0), 0) is None, "nothing was held out"


def test_single_shot_classes_do_not_all_leave_together():
    counts = torch.bincount(fold_of(torch.arange(8), 4), minlength=4)
    assert counts.tolist() == [2, 2, 2, 2]


def test_copies_share_a_fold_and_others_stay_where_they_were():
    features = torch.randn(7, 3, generator=rng(0))[torch.tensor([0, 1, 2, 1, 3, 4, 0])]
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0])
    twins = twins_of(Support(features, labels))
    assert twins.tolist() == [0, 1, 2, 1, 4, 5, 0]
    different = [0, 1, 2, 4, 5]
    fold = fold_of(labels, 2, twins)
    assert fold[different].tolist() == fold_of(labels[different], 2).tolist()
    assert (fold[6], fold[3]) == (fold[0], fold[1])
    assert twins_of(Support(features[different], labels[different])) is None
    twice = torch.tensor([0, 1]).repeat(2)
    assert not single(twice)
    assert single(twice, twice), "one shot each, whatever is repeated"


@pytest.fixture
def task():
    return make_task(make_options(epochs=3), shots=24)


@pytest.mark.parametrize("method", ["kalman", "adamw"])
def test_no_shot_is_predicted_by_a_fit_that_saw_it(method, monkeypatch):
    task = make_task(make_options(method=method), shots=24)
    trained_on: dict[int, Support] = {}
    kept = []  # so that no two heads have one id

    def watched_fit(fold_task, device):
        fitted = fit(fold_task, device=device)
        kept.append(fitted)
        trained_on[id(fitted.head)] = fold_task.support
        return fitted

    predicted = []
    plain = Predictor.predict

    def watched_predict(self, features, tau):
        seen = {tuple(row) for row in trained_on[id(self.head)].features.tolist()}
        predicted.extend(tuple(row) for row in features.tolist())
        assert not seen & {tuple(row) for row in features.tolist()}
        assert len(seen) + len(features) == 24
        return plain(self, features, tau)

    monkeypatch.setattr(calibration, "fit", watched_fit)
    monkeypatch.setattr(Predictor, "predict", watched_predict)
    found = calibrate(task, PosteriorOptions(folds=4))
    assert len(trained_on) == 4
    assert set(predicted) == {tuple(row) for row in task.support.features.tolist()}
    assert found.tau in (TAU_GRID if method == "kalman" else (0.0,))


def test_tau_is_the_best_of_the_grid_on_the_held_out_shots(task):
    """Each choice of tau evaluated by hand; the one with the least held-out NLL is the answer."""
    options = PosteriorOptions(folds=3)
    found = calibrate(task, options)
    fold = fold_of(task.support.labels, 3)
    nll = {}
    for tau in TAU_GRID:
        held = []
        for f in range(3):
            method = fit(replace(task, support=task.support.subset(fold != f)))
            out = task.support.subset(fold == f)
            p = predictor_of(method, options).predict(out.features, tau).probabilities
            held.append(-p[torch.arange(len(out)), out.labels].log())
        nll[tau] = float(torch.cat(held).mean())
    assert found.tau == min(nll, key=nll.get)
    assert found.held_out_nll == pytest.approx(nll[found.tau], rel=1e-6)


def test_calibration_repeats(task):
    assert calibrate(task, PosteriorOptions()) == calibrate(task, PosteriorOptions())


def test_evaluating_on_other_test_data_leaves_the_calibration_alone(task):
    options = PosteriorOptions()
    chosen = calibrate(task, options)
    predictor = predictor_of(fit(task), options)
    first = evaluate(predictor, {"id": make_support(20, torch.float32, seed=8)}, chosen)
    second = evaluate(predictor, {"id": make_support(20, torch.float32, seed=9)}, chosen)
    assert first.calibration == second.calibration == calibrate(task, options)
    assert first.plain != second.plain


@pytest.mark.parametrize("predict", ["draws", "linearised", "mean"])
def test_a_given_temperature_is_kept(task, predict):
    assert calibrate(task, PosteriorOptions(predict=predict, temperature=0.05)).tau == 0.05


def test_without_a_posterior_there_is_no_temperature():
    """A baseline is given the posterior options of the run that it is beside."""
    task = make_task(make_options(method="adamw"), shots=24)
    assert calibrate(task, PosteriorOptions(temperature=0.05)) == calibrate(task, PosteriorOptions())
    assert calibrate(task, PosteriorOptions(temperature=0.05)).tau == 0.0


@pytest.mark.parametrize(
    ("given", "median", "tau"),
    [(None, None, 1.0), (0.2, None, 0.2), (None, 0.25, 0.25), (0.2, 0.25, 0.2), (0.0, 0.25, 0.0)],
)
def test_without_folds_nothing_is_fitted(task, given, median, tau, monkeypatch):
    monkeypatch.setattr(calibration, "fit", None)
    options = PosteriorOptions(folds=0, temperature=given, tau_median=median)
    assert calibrate(task, options) == Calibration(tau, 1.0)


@pytest.mark.filterwarnings("ignore:std")  # of no samples
@pytest.mark.parametrize("predict", ["draws", "linearised"])
def test_a_fold_may_hold_out_nothing(predict):
    """Two classes can fall into the same folds: another fold then has no shots to predict."""
    task = make_task(make_options())
    task = replace(task, support=Support(task.support.features[:3], torch.tensor([0, 0, 3])))
    assert fold_of(task.support.labels, 3).tolist() == [0, 1, 0]
    found = calibrate(task, PosteriorOptions(folds=3, predict=predict, draws=4))
    assert found.held_out_nll is not None
    assert 0 < found.held_out_nll < float("inf")


@pytest.mark.parametrize("T", [0.4, 1.0, 2.5])
def test_fit_temperature_recovers_a_known_T(T):
    m, g = 40_000, rng(0)
    true = (1.5 * torch.randn(m, CLASSES, generator=g, dtype=torch.float64)).softmax(1)
    labels = torch.multinomial(true, 1, generator=g).squeeze(1)
    distorted = (true.log() * T).softmax(1)
    assert fit_temperature(distorted, labels) == pytest.approx(T, rel=0.03)
    assert max_error(scale(distorted, T), true) < 1e-10


def test_fit_temperature_is_the_minimum():
    g = rng(1)
    p = torch.randn(50, 3, generator=g, dtype=torch.float64).softmax(1)
    labels = torch.randint(3, (50,), generator=g)
    T = fit_temperature(p, labels)

    def cost(t):
        return 50 * float(nll_loss(scale(p, t).log(), labels)) + 0.5 * (math.log(t) / 10) ** 2

    assert cost(T) <= min(cost(T * 0.98), cost(T * 1.02), cost(1.0))


def test_fit_temperature_stays_in_its_bounds():
    p = torch.tensor([[0.9, 0.1]] * 4, dtype=torch.float64)
    assert 18 < fit_temperature(p, torch.tensor([1, 1, 1, 1])) < 21  # always wrong: as flat as it goes


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_decide_the_temperature_of_what_is_always_right(seed):
    """The smaller T, the likelier the labels, until nothing but rounding tells two T apart."""
    sure = torch.linspace(0.99, 0.999997, 32, dtype=torch.float64)
    labels = torch.zeros(32, dtype=torch.int64)
    rounded = sure + (1 - sure) * 1e-4 * torch.randn(32, generator=rng(seed), dtype=torch.float64)
    one, other = (fit_temperature(torch.stack([p, 1 - p], 1), labels) for p in (sure, rounded))
    assert one == pytest.approx(other, rel=1e-3)
    grid = torch.linspace(-3, 3, 6001, dtype=torch.float64)  # of log T, on which the most probable one is looked up
    odds = (sure / (1 - sure)).log()
    cost = torch.nn.functional.softplus(-odds / grid.exp().unsqueeze(1)).sum(1) + 0.5 * (grid / 10) ** 2
    assert one == pytest.approx(float(grid[cost.argmin()].exp()), rel=5e-3)


def drawn(held_out: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Held-out probabilities, and labels drawn by those that logits multiplied by a factor give."""
    logits = 2 * torch.randn(held_out, CLASSES, generator=rng(5))
    return logits.softmax(1), torch.multinomial((factor * logits).softmax(1), 1, generator=rng(6)).squeeze(1)


def test_predictions_are_sharpened_where_held_out_shots_find_them_too_uncertain():
    probabilities, labels = drawn(4000, 2.0)
    assert fit_sharpening(probabilities, labels, 10.0) == pytest.approx(2.0, rel=0.1)
    assert fit_sharpening(probabilities, labels, 0.1) == pytest.approx(2.0, rel=0.15)
    few = [fit_sharpening(probabilities[:12], labels[:12], spread) for spread in (0.1, 10.0)]
    assert 1.0 <= few[0] < 1.1 < few[1], "a handful of shots says little"


def test_sharpening_never_makes_predictions_less_certain():
    assert fit_sharpening(*drawn(4000, 0.5), 10.0) == 1.0
    assert fit_sharpening(*drawn(4000, 2.0), 0.0) == 1.0


def test_tau_comes_before_sharpening():
    sure, labels = drawn(4000, 2.0)
    unsure = sharpened(sure, 0.5)
    found = _chosen({0.0: sure, 1.0: unsure}, labels, PosteriorOptions(sharpening_spread=0.1))
    assert (found.tau, found.sharpening) == (0.0, fit_sharpening(sure, labels, 0.1))
    assert found.held_out_nll == pytest.approx(float(nll_loss(sharpened(sure, found.sharpening).log(), labels)))
    assert found.scaling == pytest.approx(1.0, abs=0.1), "of what sharpening leaves"
    assert _chosen({0.0: sure}, labels, PosteriorOptions()).sharpening == 1.0


@pytest.mark.parametrize("predict", ["draws", "linearised", "mean"])
def test_sharpened_predictions_are_those_of_multiplied_logits(task, predict):
    predictor, x = predictor_of(fit(task), PosteriorOptions(predict=predict)), task.support.features
    plain, sharp = (Calibration(1.0, 1.0, sharpening=factor).predict(predictor, x) for factor in (1.0, 1.7))
    assert torch.equal(plain.probabilities, predictor.predict(x, 1.0).probabilities)
    assert max_error(sharp.probabilities, (1.7 * plain.probabilities.log()).softmax(1)) < 1e-6
    assert torch.equal(sharp.logit_std, plain.logit_std)
    assert torch.equal(sharp.probabilities.argmax(1), plain.probabilities.argmax(1))


def test_intervals_and_deviations_are_of_sharpened_predictions(task):
    predictor, x = predictor_of(fit(task), PosteriorOptions(predict="linearised")), task.support.features
    head = CLIPHead(task.class_embeddings, 1.7 * task.logit_scale, task.options.adapter)
    head.load_state_dict(predictor.head.state_dict())
    multiplied = Predictor(head, predictor.family, predictor.belief, predictor.options)
    sharp = Calibration(0.1, 1.0, sharpening=1.7).predict(predictor, x)
    found = probability_interval(predictor, x, sharp, 0.5, 1.7), probability_std(predictor, x, 0.5, 1.7)
    expected = probability_interval(multiplied, x, sharp, 0.5), probability_std(multiplied, x, 0.5)
    assert max(map(max_error, found, expected)) < 1e-5


def test_an_evaluation_is_of_sharpened_predictions(task):
    predictor, test = predictor_of(fit(task), PosteriorOptions(predict="mean")), task.support
    found = evaluate(predictor, {"id": test}, Calibration(0.0, 1.0, sharpening=1.7))
    assert torch.equal(found.probabilities["id"], sharpened(predictor.predict(test.features, 0.0).probabilities, 1.7))


def test_report_of_an_evaluation():
    task = make_task(make_options())
    predictor = predictor_of(fit(task), PosteriorOptions(predict="mean"))
    tests = {
        "id": make_support(20, torch.float32, seed=8),
        "a": make_support(10, torch.float32, seed=9),
        "b": make_support(30, torch.float32, seed=10),
    }
    report = evaluate(predictor, tests, Calibration(0.0, 2.0)).report()
    assert set(report) == {"id", "ood"}
    assert set(report["ood"]) == {"mean", "a", "b"}
    for figure in ("accuracy", "nll", "ece", "brier"):
        mean = (report["ood"]["a"][figure] + report["ood"]["b"][figure]) / 2
        assert report["ood"]["mean"][figure] == pytest.approx(mean)
    assert report["id"]["temperature_scaled"]["accuracy"] == report["id"]["accuracy"]
    assert report["id"]["temperature_scaled"]["nll"] != report["id"]["nll"]
    assert evaluate(predictor, {"id": tests["id"]}, Calibration(0.0, 2.0)).report()["ood"] == {}


def test_a_prior_holds_tau_where_shots_are_few_and_yields_where_they_are_many():
    options = PosteriorOptions(tau_median=0.1, tau_spread=0.5)
    assert options.log_prior(0.1) == 0.0 == PosteriorOptions().log_prior(1.0)
    assert options.log_prior(0.1 * math.e) == options.log_prior(0.1 / math.e) == pytest.approx(-2.0)
    assert options.log_prior(0.0) == -math.inf

    def chosen(count: int) -> float:
        # at tau = 1 each shot is 0.5 nats likelier than at 0.1
        labels = torch.zeros(count, dtype=torch.long)
        at = {0.1: torch.tensor([0.3, 0.7]), 1.0: torch.tensor([0.3 * math.exp(0.5), 1 - 0.3 * math.exp(0.5)])}
        return _chosen({tau: p.expand(count, 2) for tau, p in at.items()}, labels, options).tau

    assert chosen(4) == 0.1
    assert chosen(40) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau_median": 0.0},
        {"tau_spread": 0.0},
        {"tau_median": -1.0},
        {"sharpening_spread": -0.1},
        {"sharpening_spread": math.inf},
        {"sharpening_spread": math.nan},
    ],
)
def test_a_prior_of_tau_has_a_median_and_a_spread(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PosteriorOptions(**wrong)


def test_single_shots_are_asked_before_the_first_step():
    task = make_task(make_options(), shots=60)
    firsts = torch.tensor([int((task.support.labels == c).nonzero()[0]) for c in range(CLASSES)])
    task = replace(task, support=task.support.subset(firsts))
    ((part, held),) = calibration_tasks(task, 4)
    assert part.options.epochs == 0
    assert held is task.support
    options = PosteriorOptions(predict="linearised")
    found = calibrate(task, options)
    prior = predictor_of(begin(task, SingleProcess()), options)
    nll = {tau: float(nll_loss(prior.predict(held.inputs, tau).probabilities.log(), held.labels)) for tau in TAU_GRID}
    assert found.tau == min(nll, key=nll.__getitem__)
    assert (found.held_out_nll, found.held_out_accuracy) == (None, None), "not of a fit that has learned nothing"


def test_a_variance_that_is_kept_is_of_the_same_features():
    options = PosteriorOptions(predict="linearised")
    task = make_task(make_options())
    method = fit(task)
    used, x = predictor_of(method, options), task.support.features
    for features in (x, x, x[:4], x):
        torch.testing.assert_close(
            used.logit_variance(features), predictor_of(method, options).logit_variance(features), rtol=0, atol=0
        )
