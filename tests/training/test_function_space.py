"""The default: a prior over functions, a step that ends at the mode, predictions that see no common offset."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.cones import CLASSES, DIM, SCALE, in_a_cone, in_both, made, task_of
from torch.nn.functional import cross_entropy, normalize

from kngd_ray.config import load_config, override
from kngd_ray.errors import FilterError, UsageError
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.at_mode import ModePosterior
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import calibrate, decided_task, predictor_of
from kngd_ray.training.fit import FitTask, StepRecord, begin, fit
from kngd_ray.training.interval import probability_interval, probability_std
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.novelty import Novelty, calibrate_and_compare, total_variance, variance_left_out
from kngd_ray.training.predict import PosteriorOptions, Predictor, moderated

LINEARISED = PosteriorOptions(predict="linearised")
HARD = 3.0
FIXED = ("filter.logit_variance=300", "filter.logit_spread=0", "filter.tolerance=1e-9")


def fitted(task: FitTask) -> tuple[KalmanNGD, Predictor]:
    method = fit(task)
    assert isinstance(method, KalmanNGD)
    predictor = predictor_of(method, LINEARISED)
    assert isinstance(predictor, Predictor)
    return method, predictor


@pytest.mark.parametrize("shots", [1, 2, 8])
@pytest.mark.parametrize(("tau", "tolerance"), [(0.0, 1e-5), (1e-3, 1e-5), (1.0, 1e-3)])
def test_the_same_data_in_two_geometries_gives_the_same_fit(shots, tau, tolerance):
    """At tau = 1 nearly so: a dimension in which no shot varies pulls the product a little towards the prior."""
    own, cone = in_both(shots, *FIXED)
    others = made(5, seed=1)[0].features
    found = [fitted(task)[1].predict(x, tau).probabilities for task, x in ((own, others), (cone, in_a_cone(others)))]
    assert max_error(*found) < tolerance


def test_so_it_does_where_the_shots_choose_variance_and_tau():
    own, cone = in_both(4)
    posterior = load_config().posterior
    chosen = [calibrate_and_compare(task, posterior) for task in (own, cone)]
    assert chosen[0][0].tau == chosen[1][0].tau
    assert chosen[0][0].scaling == pytest.approx(chosen[1][0].scaling, rel=1e-3)
    assert [type(novelty) for _, novelty in chosen] == [Novelty, Novelty]
    others = made(5, seed=1)[0].features
    methods = [fitted(task) for task in (own, cone)]
    assert methods[0][0].head.gamma == pytest.approx(methods[1][0].head.gamma, rel=1e-6)
    found = [
        novelty.score(total_variance(predictor, x))
        for (_, novelty), (_, predictor), x in zip(chosen, methods, (others, in_a_cone(others)), strict=True)
    ]
    assert max_error(*found) < 0.05


def test_a_rotation_of_all_features_changes_nothing():
    support, texts = made(4)
    g = torch.Generator().manual_seed(4)
    Q = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=g))[0]
    turned = task_of(Support(support.features @ Q, support.labels), texts @ Q, SCALE, *FIXED)
    others = made(5, seed=1)[0].features
    one = fitted(task_of(support, texts, SCALE, *FIXED))[1].predict(others, 1e-3)
    other = fitted(turned)[1].predict(others @ Q, 1e-3)
    assert max_error(one.probabilities, other.probabilities) < 1e-7
    assert max_error(one.logit_std, other.logit_std) < 1e-7


def test_the_default_is_the_mode_that_an_optimiser_finds():
    """Of the same posterior, in the regime that ships: scale 100, a cone, a wide prior."""
    _, task = in_both(6, "filter.logit_spread=0", dtype=torch.float32)
    method, predictor = fitted(task)
    prior = begin(task, SingleProcess())
    assert isinstance(prior, KalmanNGD)
    (P,) = prior.belief.covariance.values()
    x = prior.head.residual.inputs(task.support.features).double()
    with torch.no_grad():
        start = prior.head(task.support.features).double()
    A, b = P["A"].double(), float(P["B"][0, 0])
    K = 100.0**2 * b * (x @ A @ x.mT)
    values, axes = torch.linalg.eigh(K)
    root = axes * values.clamp_min(0).sqrt()
    U = torch.zeros(CLASSES, len(x), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [U], max_iter=5000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(start + root @ U.mT, task.support.labels, reduction="sum") + 0.5 * U.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        found = predictor.head(task.support.features).double()
    assert float((found - (start + root @ U.detach().mT)).abs().max()) < 1e-3
    assert isinstance(method.posterior, ModePosterior)


def test_the_prior_of_a_logit_has_the_variance_that_is_asked_for():
    for task in in_both(8, *FIXED):
        method = begin(task, SingleProcess())
        assert isinstance(method, KalmanNGD)
        predictor = predictor_of(method, LINEARISED)
        x = task.support.features
        # of logits less their mean over classes, around the mean of the shots
        spread, B = predictor.product(x)
        (P,) = method.belief.covariance.values()
        inputs = method.head.residual.inputs(x)
        centred = inputs - inputs.mean(0)
        around = task.logit_scale**2 * ((centred @ P["A"]) * centred).sum(1).mean() * B.diagonal().mean()
        assert float(around) == pytest.approx(300.0, rel=1e-6)
        assert bool((spread > 0).all())


@pytest.mark.parametrize("adapter", ["bottleneck", "linear"])
@pytest.mark.parametrize("covariance", some_slow(["diagonal", "kronecker", "dense"], "kronecker"))
def test_so_it_has_for_other_adapters_and_families(adapter, covariance):
    overrides = [
        f"adapter={adapter}",
        "preset=kalman_diagonal",
        f"filter.covariance={covariance}",
        "filter.logit_variance=0.01",
        "filter.mean=zero_shot",
    ]
    support, texts = made(2)
    task = task_of(support, texts, SCALE, *overrides)
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    predictor = predictor_of(method, PosteriorOptions(draws=400))
    drawn = []
    for theta in method.belief.mu + predictor._draw():
        method.posterior.write(theta)
        with torch.no_grad():
            logits = method.head(support.features)
        drawn.append(logits - logits.mean(0))
    assert float(torch.stack(drawn).var(0).mean()) == pytest.approx(0.01, rel=0.5)


def test_moderation_sees_no_common_offset_and_keeps_the_class():
    g = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(40, CLASSES, dtype=torch.float64, generator=g)
    variance = 30 * torch.rand(40, CLASSES, dtype=torch.float64, generator=g)
    p = moderated(logits, variance).softmax(1)
    assert max_error(moderated(logits + 27.0, variance).softmax(1), p) < 1e-12
    assert torch.equal(p.argmax(1), logits.argmax(1))


def test_moderation_is_close_to_the_integral_over_joint_logits():
    """Against many draws of logits with covariance v B, B not far from what the default's posterior has."""
    g = torch.Generator().manual_seed(1)
    B = torch.eye(CLASSES, dtype=torch.float64) + 0.3
    logits = 4 * torch.randn(30, CLASSES, dtype=torch.float64, generator=g)
    for v in (1.0, 10.0):
        noise = torch.randn(20_000, CLASSES, dtype=torch.float64, generator=g) @ torch.linalg.cholesky(v * B).mT
        integral = torch.stack([(row + noise).softmax(1).mean(0) for row in logits])
        centre = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
        variance = (v * centre @ B @ centre).diagonal().expand(30, CLASSES)
        p = moderated(logits, variance).softmax(1)
        assert float((p - integral).abs().mean()) < 0.02
        assert float((p - integral).abs().max()) < 0.15


def test_variances_in_closed_form_are_those_of_rows(monkeypatch):
    support, texts = made(3)
    method, predictor = fitted(task_of(support, texts, SCALE, *FIXED))
    x = made(2, seed=5)[0].features
    prediction = predictor.predict(x, 0.01)

    def everything() -> list[torch.Tensor]:
        again = predictor_of(method, LINEARISED)
        cotangent = torch.randn(len(x), 3, CLASSES, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
        return [
            again.logit_variance(x),
            again.variance_along(x, cotangent),
            probability_std(again, x, 0.01).square(),  # a root of what rounding leaves of 0 has half of its digits
            probability_interval(again, x, prediction, 0.01),
        ]

    closed = everything()
    monkeypatch.setattr(Predictor, "product", lambda self, features: None)
    for fast, slow in zip(closed, everything(), strict=True):
        assert max_error(fast, slow) < 1e-8


@pytest.mark.parametrize("shots", [1, 4])
def test_it_is_above_zero_shot_and_below_nothing_in_both_geometries(shots):
    others, texts = made(40, seed=9, spread=HARD)
    zero = float(((others.features @ texts.mT).argmax(1) == others.labels).double().mean())
    for task, x in zip(in_both(shots, spread=HARD), (others.features, in_a_cone(others.features)), strict=True):
        _, predictor = fitted(task)
        right = (predictor.predict(x, 0.0).probabilities.argmax(1) == others.labels).double().mean()
        assert float(right) > zero


@pytest.mark.parametrize("shots", [1, 2])
def test_many_classes_are_no_matter(shots):
    """Three hundred classes: more weights than a row of H could be formed for."""
    g = torch.Generator().manual_seed(0)
    C, d = 300, 64
    apart = 0.5 * normalize(torch.randn(C, d, generator=g), dim=1)
    texts = normalize(normalize(torch.randn(1, d, generator=g), dim=1) + apart, dim=1)
    labels = torch.arange(C).repeat_interleave(shots + 3)
    cone = normalize(torch.randn(1, d, generator=g), dim=1)
    centres = texts - texts.mean(0)
    noise = 0.35 * normalize(torch.randn(len(labels), d, generator=g), dim=1)
    x = normalize(cone + 0.8 * centres[labels] + noise, dim=1)
    learned = torch.arange(len(labels)) % (shots + 3) < shots
    task = task_of(Support(x[learned], labels[learned]), texts, 100.0)
    _, predictor = fitted(task)
    calibration = calibrate(task, load_config().posterior)
    p = predictor.predict(x[~learned], calibration.tau).probabilities
    zero = ((x[~learned] @ texts.mT).argmax(1) == labels[~learned]).double().mean()
    assert float((p.argmax(1) == labels[~learned]).double().mean()) > float(zero)
    assert bool(torch.isfinite(p).all())


def test_a_fit_resumes_and_continues_with_its_prior():
    """Gamma and the prior's scale are the shots': a fit that goes on from its state has them too."""
    support, texts = made(4)
    task = task_of(support, texts, SCALE, "epochs=3", *FIXED)
    straight = fit(task)
    states = {}
    fit(task, on_checkpoint=lambda done, method: states.update({done: method.state()}), checkpoint_every=1)
    resumed = fit(task, resume=(2, states[2]))
    assert torch.equal(resumed.belief.mu, straight.belief.mu)
    assert resumed.head.gamma == straight.head.gamma != 1.0
    assert resumed.p0 == straight.p0


def test_features_that_are_not_finite_refuse_the_step():
    support, texts = made(2)
    support.features[3, 2] = float("nan")
    with pytest.raises(FilterError, match="NaN or infinite"):
        fit(task_of(support, texts, SCALE, *FIXED))


def test_the_loss_of_the_shots_never_rises_over_linearisations():
    support, texts = made(8)
    losses = []
    for iterations in (2, 3, 4, 6, 10, 40):
        method, predictor = fitted(task_of(support, texts, SCALE, *FIXED, f"filter.iterations={iterations}"))
        prior = begin(task_of(support, texts, SCALE, *FIXED), SingleProcess())
        with torch.no_grad():
            loss = float(cross_entropy(predictor.head(support.features), support.labels, reduction="sum"))
        (P,) = prior.belief.covariance.values()
        D = (method.belief.mu - prior.belief.mu).view(CLASSES, -1)
        distance = float((torch.linalg.solve(P["B"], D) * torch.linalg.solve(P["A"], D.mT).mT).sum())
        losses.append(loss + distance / 2)
    assert all(later <= before + 1e-6 for before, later in pairwise(losses))


@pytest.mark.parametrize(("iterations", "unsettled"), [(2, 1), (40, None)])
def test_a_step_that_stops_short_of_its_mode_says_so(iterations, unsettled):
    records: list[StepRecord] = []
    support, texts = made(8)
    fit(
        task_of(support, texts, SCALE, *FIXED, "filter.tolerance=1e-2", f"filter.iterations={iterations}"),
        on_step=records.append,
    )
    assert [record.stats.unsettled for record in records if record.stats is not None] == [unsettled]


@pytest.mark.parametrize(
    "overrides",
    [
        ["observation=log_likelihood,cosine"],
        ["adapter=bottleneck"],
        ["adapter=linear"],
        ["filter.gate=skip"],
        ["filter.covariance=diagonal"],
    ],
)
def test_other_settings_over_the_default_keep_its_prior(overrides):
    """They take batches of 32, linearise rows, and have the lower end of the variance's prior: nothing chooses it."""
    support, texts = made(4)
    task = task_of(support, texts, SCALE, "filter.iterations=4", *overrides)
    assert not task.options.at_mode
    assert task.sampler.steps == 2
    method = fit(task)
    others = made(20, seed=9)[0]
    with torch.no_grad():
        p = method.head(others.features)
    zero = (others.features @ texts.mT).argmax(1) == others.labels
    assert float((p.argmax(1) == others.labels).double().mean()) > 0.9 * float(zero.double().mean())


def test_a_prior_has_the_variance_that_is_given_last():
    """Of weights, as before there was one of logits, or of logits over a preset that has one of weights."""
    support, texts = made(3)
    for weights in (["filter.p0=0.02"], [{"filter": {"p0": 0.02}}], [{"filter.p0": 0.02}]):
        file, overrides = ([], weights) if isinstance(weights[0], str) else (weights[0], [])
        config = load_config(file or None, ["method=kalman", *overrides])
        assert (config.filter.p0, config.filter.logit_variance, config.filter.logit_spread) == (0.02, None, 0.0)
        method = begin(FitTask(config.fit_options, 0, support, texts, SCALE), SingleProcess())
        (P,) = method.belief.covariance.values()
        assert float(P["B"][0, 0]) == pytest.approx(0.02)
    config = load_config(None, ["method=kalman", "filter.p0=0.02"])
    assert override(config, {"filter.logit_variance": 50.0}).filter.p0 is None


def test_a_variance_given_twice_is_refused():
    with pytest.raises(UsageError, match="given twice; leave out p0"):
        load_config(overrides=["method=kalman", "filter.p0=0.1", "filter.logit_variance=30"])
    with pytest.raises(UsageError, match="logit_spread needs logit_variance"):
        load_config(overrides=["method=kalman", "filter.logit_variance=null"])


@pytest.mark.parametrize("shots", some_slow([1, 2, 5], 1, 2))
@pytest.mark.parametrize("inside", [False, True])
def test_a_posterior_gives_up_a_shot_as_a_fit_without_it_would(shots, inside):
    """What prior and posterior have of a shot is taken out: the metric within classes, the offset, its curvature."""
    task = in_both(shots, *FIXED)[inside]
    found = variance_left_out(task, fitted=fit(task).state())
    kept, expected = torch.arange(len(task.support)), []
    for n in kept[::4]:
        alone = fit(replace(task, support=task.support.subset(kept != n)))
        expected.append(total_variance(predictor_of(alone, LINEARISED), task.support.features[n : n + 1]))
    expected = torch.cat(expected)
    seen = total_variance(predictor_of(fit(task), LINEARISED), task.support.features)[::4]
    error = (found[::4] / expected).log()
    assert float(error.square().mean().sqrt()) < 0.12
    assert float(error.abs().mean()) < 0.2 * float((expected / seen).log().mean())
    assert Novelty.of(found) == calibrate_and_compare(task, load_config().posterior, fitted=fit(task).state())[1]


def test_without_a_bias_a_posterior_gives_up_its_shots_too():
    """The prior is singular there, and says nothing of how the offset would move."""
    task = in_both(2, "filter.covariance.bias=0", *FIXED)[1]
    found = variance_left_out(task, fitted=fit(task).state())
    seen = total_variance(predictor_of(fit(task), LINEARISED), task.support.features)
    assert bool(found.isfinite().all())
    assert bool((found > seen).all())
    assert float((found / seen).max()) < 20


def test_what_shots_decided_is_kept_with_the_fit():
    """And need not be decided again, where the fit goes on or is calibrated."""
    task = in_both(3)[1]
    state = fit(task).state()
    chosen = decided_task(task, state).options.filter.logit_variance
    assert chosen == decided_task(task).options.filter.logit_variance
    assert decided_task(task, replace(state, replicated={})).options.filter.logit_variance == chosen
    assert float(state.replicated["prior/logit_variance"]) == chosen
    again = begin(task, SingleProcess())
    again.load(state)
    assert float(again.state().replicated["prior/logit_variance"]) == chosen
    posterior = load_config().posterior
    assert calibrate_and_compare(task, posterior, fitted=state) == calibrate_and_compare(task, posterior)
