"""Gates: what they call an outlier, what they leave of it, and what a filter then does."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import (
    ADAPTERS,
    CLASSES,
    DIM,
    FAMILIES,
    OBSERVATIONS,
    class_embeddings,
    make_head,
    make_options,
    make_support,
    make_task,
    rng,
)
from helpers.compare import max_error
from helpers.ranks import run_ranks
from torch.nn.functional import normalize

from kngd_ray.filters import Belief, Ema, Gate, GateResiduals, Inflate, Layer, NoGate, Rows, Skip, update
from kngd_ray.observations import Categorical, LogLikelihood, Probability
from kngd_ray.sharding import Group, Observed, ShardedFilter, SingleProcess
from kngd_ray.training.batches import Batch, BatchSampler, Support
from kngd_ray.training.fit import StepRecord, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions

M, N = 12, 9
GATES = {"inflate": Inflate(quantile=0.9), "skip": Skip(quantile=0.9)}
C90 = 2.705543454095404  # the 0.9 quantile of chi^2 with one degree of freedom


def batch(seed: int = 0, m: int = M) -> tuple[torch.Tensor, torch.Tensor]:
    """H with a prior of variance 0.5 on its N weights, and whitened innovations drawn from N(0, S)."""
    g = rng(seed)
    H = torch.randn(m, N, generator=g, dtype=torch.float64)
    theta = 0.5**0.5 * torch.randn(N, generator=g, dtype=torch.float64)
    return H, H @ theta + torch.randn(m, generator=g, dtype=torch.float64)


def residuals(nu: torch.Tensor) -> GateResiduals:
    return GateResiduals(nu, torch.ones_like(nu))


def z2(predicted: torch.Tensor, nu: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """By its definition, after R_i has become weight_i^-2."""
    S = predicted + weight.pow(-2).diag()
    return (S.inverse() @ nu).square() / S.inverse().diagonal()


def test_the_threshold_is_the_quantile_of_chi_squared():
    assert Inflate(quantile=0.9).threshold == pytest.approx(C90, rel=1e-12)
    assert Skip().threshold == pytest.approx(6.634896601021213, rel=1e-12)


@pytest.mark.parametrize("gate", [Inflate, Skip])
@pytest.mark.parametrize("quantile", [0.0, 1.0, -0.5, float("nan")])
def test_a_quantile_outside_its_range_is_refused(gate, quantile):
    with pytest.raises(ValueError, match="quantile is"):
        gate(quantile=quantile)


@pytest.mark.parametrize("gate", [NoGate(), *GATES.values()])
def test_a_batch_without_outliers_is_left_as_it_is(gate):
    H, nu = batch()
    assert gate.weights(0.5 * H @ H.mT, residuals(0.01 * nu), 1) is None


def test_one_outlier_is_inflated_by_its_closed_form():
    H, nu = batch()
    nu, predicted = 0.1 * nu, 0.5 * H @ H.mT
    nu[4] += 20.0
    before, s = z2(predicted, nu, torch.ones(M).double()), (predicted + torch.eye(M)).inverse().diagonal()
    weight = GATES["inflate"].weights(predicted, residuals(nu), 1)
    assert weight is not None
    assert (weight < 1).nonzero().flatten().tolist() == [4]
    added = (before[4] / C90 - 1) / s[4]
    assert max_error(weight[4].pow(-2), 1 + added) < 1e-6
    assert max_error(z2(predicted, nu, weight)[4], C90) < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_after_inflation_outliers_are_at_the_quantile_and_none_is_beyond(seed):
    """Also outliers that hide one another: three of the same row, which together pull the belief after them."""
    H, nu = batch(seed)
    H[1:3] = H[0] + 0.1 * H[1:3]
    nu[:3] += 15.0
    nu[7] -= 9.0
    predicted = 0.5 * H @ H.mT
    weight = GATES["inflate"].weights(predicted, residuals(nu), 1)
    assert weight is not None
    z = z2(predicted, nu, weight)
    assert bool((z <= C90 * (1 + 2e-6)).all())
    assert bool((z[weight < 1] >= C90 * (1 - 2e-6)).all())
    skipped = GATES["skip"].weights(predicted, residuals(nu), 1)
    assert torch.equal(skipped, (weight == 1).double())


def test_an_innocent_observation_that_an_outlier_makes_look_bad_is_left_alone():
    H = torch.zeros(2, N, dtype=torch.float64)
    H[:, 0] = 10.0  # the same thing seen twice, once 0 and once 100 deviations off: each belies the other
    nu, predicted = torch.tensor([0.0, 100.0], dtype=torch.float64), 0.5 * H @ H.mT
    assert bool((z2(predicted, nu, torch.ones(2).double()) > 1000).all())
    weight = GATES["skip"].weights(predicted, residuals(nu), 1)
    assert weight is not None
    assert weight.tolist() == [1.0, 0.0]


def test_clean_observations_are_gated_at_the_rate_of_the_quantile():
    gated = []
    for seed in range(300):
        H, nu = batch(seed, 20)
        weight = Skip(quantile=0.95).weights(0.5 * H @ H.mT, residuals(nu), 1)
        gated.append(0.0 if weight is None else float((weight < 1).double().mean()))
    assert sum(gated) / len(gated) == pytest.approx(0.05, rel=0.25)


@pytest.mark.parametrize("name", GATES)
def test_what_is_done_to_one_observation_is_done_to_its_sample(name):
    H, nu = batch()
    predicted = 0.5 * H @ H.mT
    scale = torch.zeros(M, dtype=torch.float64)
    scale[1::3] = 1.0  # the second of the three observations of a sample is all that is judged
    nu = 0.1 * nu
    nu[0] += 1000.0
    assert GATES[name].weights(predicted, GateResiduals(nu, scale), 3) is None
    nu[7] += 20.0
    weight = GATES[name].weights(predicted, GateResiduals(nu, scale), 3)
    alone = GATES[name].weights(predicted[1::3, 1::3], residuals(nu[1::3]), 1)
    assert weight is not None
    assert alone is not None
    assert torch.equal(weight, alone.repeat_interleave(3))
    assert (weight < 1).nonzero().flatten().tolist() == [6, 7, 8]


def step(gate: Gate, family: str, H: torch.Tensor, nu: torch.Tensor):
    """One update of a filter over two layers, in one process."""
    layers = [Layer("a", 4, 1, False), Layer("b", N - 4, 1, False)]
    placed = ShardedFilter(FAMILIES[family], layers, SingleProcess(), gate)
    jacobian = {"a": Rows(H[:, :4]), "b": Rows(H[:, 4:])}
    prior = placed.init(torch.zeros(N, dtype=torch.float64), 0.5)
    return prior, jacobian, placed.update(prior, Observed(jacobian, nu, residuals(nu), [len(nu)], 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_is_leaving_the_rows_out(family):
    H, nu = batch()
    nu[[2, 5]] += 30.0
    prior, jacobian, outcome = step(GATES["skip"], family, H, nu)
    kept = outcome.weight == 1
    assert 0 < int((~kept).sum()) < M
    rest = {name: Rows(piece.rows()[kept]) for name, piece in jacobian.items()}
    expected, _ = update(FAMILIES[family], prior, rest, nu[kept])
    assert_same(FAMILIES[family], outcome.belief, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_inflating_is_observing_with_more_noise(family):
    H, nu = batch()
    nu[[2, 5]] += 30.0
    prior, jacobian, outcome = step(GATES["inflate"], family, H, nu)
    noisier = {name: Rows(piece.rows() * outcome.weight.unsqueeze(1)) for name, piece in jacobian.items()}
    expected, _ = update(FAMILIES[family], prior, noisier, nu * outcome.weight)
    assert_same(FAMILIES[family], outcome.belief, expected)


def assert_same(family, found: Belief, expected: Belief) -> None:
    assert max_error(found.mu, expected.mu) < 1e-12
    assert max_error(family.diagonal(found.covariance), family.diagonal(expected.covariance)) < 1e-12


@pytest.mark.parametrize("model", [LogLikelihood(), Categorical(), Categorical(samples=2)], ids=repr)
def test_models_without_residuals_are_judged_by_the_probability_of_the_label(model):
    """Row and residual are those of ``probability`` with its own noise, whatever the model's rows are."""
    logits = torch.randn(7, 4, generator=rng(0), dtype=torch.float64)
    labels, uniforms = torch.randint(4, (7,), generator=rng(1)), torch.rand(7, 2, generator=rng(2)).double()
    seen = model.observe(logits, labels, 8.0, uniforms)
    expected = Probability().observe(logits, labels, 8.0, uniforms)
    deviation = expected.base_noise.sqrt()
    residual = seen.gate_residuals
    own = residual[..., 1] > 0
    assert own.sum(1).tolist() == [1] * 7
    assert max_error(residual[..., 0][own], (expected.innovation / deviation).flatten()) < 1e-12
    rows = (residual[..., 1:] * seen.cotangent)[own]
    assert max_error(rows, (expected.cotangent[:, 0] / deviation)) < 1e-12


@pytest.mark.parametrize("observation", ["probability", "log_likelihood", "categorical", "log_likelihood+cosine"])
@pytest.mark.parametrize("tempering", ["passes", "none"])
def test_wrong_labels_are_found(observation, tempering):
    """Whatever is observed, and whether or not passes share the evidence, for tempered noise judges nothing."""
    labels = torch.arange(20) % CLASSES
    noise = torch.randn(20, DIM, generator=rng(4), dtype=torch.float64)
    support = Support(normalize(class_embeddings()[labels] + 0.05 * noise, dim=1), labels)
    wrong = torch.arange(20) < 3
    options = FitOptions(
        epochs=10,
        adapter=ADAPTERS["class_residual"],
        observation=OBSERVATIONS[observation],
        noise=NoiseOptions(tempering=tempering),
        filter=FilterOptions(p0=1e-3, gate=Skip()),
    )
    gated, without = (KalmanNGD(make_head(options.adapter, perturb=0.0), options) for _ in range(2))
    stats = gated.step(Batch(support.features, torch.where(wrong, (labels + 1) % CLASSES, labels), [20], 0, 0))
    without.step(Batch(support.features[~wrong], labels[~wrong], [17], 0, 0))
    assert stats.gated == 3 * sum(model.rows(CLASSES) for model in options.observation)
    assert max_error(gated.belief.mu, without.belief.mu) < 1e-10


@pytest.mark.parametrize("gate", [Skip(), Inflate()], ids=repr)
@pytest.mark.parametrize("observation", ["probability", "cosine"])
@pytest.mark.parametrize("form", ["scalar", "diagonal", "full"])
def test_noise_is_learned_from_what_the_gate_let_through(form, observation, gate):
    """Otherwise one wrong label would widen the noise, and the next would pass."""
    labels = torch.arange(20) % CLASSES
    noise = torch.randn(20, DIM, generator=rng(4), dtype=torch.float64)
    x = normalize(class_embeddings()[labels] + 0.05 * noise, dim=1)
    if observation == "cosine":  # of matched pairs, where what does not match is another picture
        x[:3] = -x[:3]
    else:
        labels[:3] = (labels[:3] + 1) % CLASSES
    wrong = torch.arange(20) < 3
    options = FitOptions(
        adapter=ADAPTERS["class_residual"],
        observation=(replace(OBSERVATIONS[observation][0], r0=0.01),),
        noise=NoiseOptions(observation=Ema(beta=0.5, form=form)),
        filter=FilterOptions(p0=1e-3, gate=gate),
    )
    gated, without = (KalmanNGD(make_head(options.adapter, perturb=0.0), options) for _ in range(2))
    begun = gated.noise
    assert gated.step(Batch(x, labels, [20], 0, 0)).gated == 3
    assert without.step(Batch(x[~wrong], labels[~wrong], [17], 0, 0)).gated == 0
    assert max_error(gated.noise, without.noise) < 1e-12
    assert max_error(gated.noise, begun) > 0.1


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_whole_fit_with_a_gate(name, iterations):
    records: list[StepRecord] = []
    gate = type(GATES[name])(quantile=0.5)
    options = make_options(epochs=3, filter=FilterOptions(gate=gate, iterations=iterations))
    fit(make_task(options), on_step=records.append)
    assert len(records) == 9
    assert all(record.refused is None for record in records)
    assert any(record.stats.gated for record in records)


@pytest.mark.parametrize("name", GATES)
def test_linear_observations_are_judged_alike_wherever_they_are_linearised(name):
    """A cosine is linear in the class residuals, so that a second linearisation changes nothing."""
    beliefs = []
    for iterations in (1, 2):
        gating = FilterOptions(p0=0.05, gate=type(GATES[name])(quantile=0.5), iterations=iterations)
        method = KalmanNGD(make_head(ADAPTERS["class_residual"]), make_options(observation="cosine", filter=gating))
        sampler = BatchSampler(make_support(15), 7, 1, seed=0)
        assert sum(method.step(sampler.batch(step)).gated for step in range(sampler.steps)) > 0
        beliefs.append(method.belief)
    assert_same(FAMILIES["ekf"], beliefs[1], beliefs[0])


def on_ranks(group: Group, options: FitOptions) -> torch.Tensor:
    method = KalmanNGD(make_head(options.adapter), options, group=group)
    sampler = BatchSampler(make_support(15), 7, 2, seed=5)
    gated = [method.step(sampler.batch(step, group.rank, group.world_size)).gated for step in range(sampler.steps)]
    return torch.cat([method.belief.mu, torch.tensor(gated, dtype=torch.float64)])


@pytest.mark.parametrize("name", GATES)
def test_ranks_gate_alike(name):
    options = make_options(filter=FilterOptions(p0=0.05, gate=type(GATES[name])(quantile=0.5)))
    alone = on_ranks(SingleProcess(), options)
    assert float(alone[-6:].sum()) > 0
    first, second = run_ranks(2, on_ranks, options)
    assert torch.equal(first, second)
    assert max_error(first, alone) < 1e-10
