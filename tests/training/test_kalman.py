"""KalmanNGD as an optimiser: what a step writes, reports and refuses, on one process."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import (
    ADAPTERS,
    CLASSES,
    FAMILIES,
    NOISES,
    OBSERVATIONS,
    PROCESSES,
    TEMPERING,
    in_turn,
    make_head,
    make_options,
    make_support,
    make_task,
)
from helpers.compare import covariance_of, max_error
from helpers.cones import as_shipped
from scipy.optimize import least_squares
from torch.func import functional_call

from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, Diagonal, OrnsteinUhlenbeck, Part, RandomWalk, Rows, Seen, Skip, update
from kngd_ray.observations import Cosine, Linearizer, flatten, jacobian_rows, stack, trainable, unflatten
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.at_mode import ModePosterior
from kngd_ray.training.batches import Batch, BatchSampler, Support, seeded
from kngd_ray.training.fit import FitTask, begin
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions


def whole(support: Support, step: int = 0) -> Batch:
    """All shots as one batch."""
    return Batch(support.features, support.labels, [len(support)], 0, step)


def tensors(method: KalmanNGD) -> list[torch.Tensor]:
    """All that a step may change."""
    state = method.state()
    return [*state.weights.values(), *state.replicated.values(), *state.covariance.values(), method.belief.mu]


@pytest.mark.parametrize(("family", "noise"), in_turn(FAMILIES, NOISES))
def test_a_step_is_the_composition_of_its_published_parts(family, noise, subtests):
    for observation in OBSERVATIONS:
        if (noise, observation) != ("categorical", "cosine"):  # a cosine has no likelihood to take its noise from
            with subtests.test(observation=observation):
                check_composition(family, observation, noise)


def check_composition(family, observation, noise):
    """Observe, stack, predict, whiten by one Cholesky factor, condition, estimate the noise: by hand, from rows."""
    turn = list(NOISES).index(noise) + list(OBSERVATIONS).index(observation)
    process, tempering = list(PROCESSES)[turn % 3], TEMPERING[turn % 2]
    options = make_options(family, observation, "linear+class_residual", noise, process, tempering=tempering)
    passes = options.epochs if tempering == "passes" else 1
    twin = make_head(options.adapter)
    method, oracle = (KalmanNGD(make_head(options.adapter), options, seed=4) for _ in range(2))
    covariance, estimate, models = options.filter.covariance, options.noise.observation, options.observation
    channels, rows_of = estimate.channels(CLASSES), [model.rows(CLASSES) for model in models]
    r = estimate.init(
        torch.tensor([model.r0 for model in models], dtype=torch.float64),
        torch.tensor([float("nan") if model.likelihood is None else model.likelihood for model in models]).double(),
        rows_of,
        CLASSES,
    )
    mu = anchor = flatten(trainable(twin))
    layers = Linearizer(twin, make_support(1).features).layers
    belief = Belief(mu, covariance.init([Part(layer, 0, layer.o) for layer in layers], options.filter.p0, mu))
    sampler = BatchSampler(make_support(15), 7, 1, seed=0)
    for step in range(sampler.steps):
        batch = sampler.batch(step)
        moves = options.noise.process.transition(step, options.filter.p0)
        mu = moves.decay * belief.mu + (1 - moves.decay) * anchor
        prior = Belief(mu, covariance.predict(belief.covariance, moves.scale, moves.q, lambda total: total))
        torch.nn.utils.vector_to_parameters(mu, twin.parameters())
        logits = twin(batch.inputs).detach()
        seen = []
        for number, model in enumerate(models):
            shape = (batch.total, model.draws(CLASSES))
            uniforms = torch.rand(shape, generator=seeded(4, step, 1, number), dtype=torch.float64)
            seen.append(model.observe(logits, batch.labels, twin.logit_scale, uniforms))
        observed = stack(seen, channels)
        s, k = observed.innovation.shape
        nu = observed.innovation.flatten()
        R = passes * estimate.covariance(r, observed.base_noise, observed.channel)
        L = torch.linalg.cholesky(torch.block_diag(*(R if R.dim() == 3 else R.diag_embed())))
        plain = jacobian_rows(twin, batch.inputs, observed.cotangent)
        H = {name: Rows(torch.linalg.solve(L, rows)) for name, rows in plain.items()}
        HPH = covariance.spread(covariance.gram(prior.covariance, H, nu)[0], s * k)
        belief, _ = update(covariance, prior, H, torch.linalg.solve(L, nu))
        blocks = (L @ HPH @ L.mT).view(s, k, s, k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        residual = [model.residual for model, many in zip(models, rows_of, strict=True) for _ in range(many)]
        counts = torch.tensor(residual).double().expand(s, k)
        r = estimate.update(r, Seen(observed.innovation, blocks, observed.base_noise, observed.channel, counts))

        stats = method.step(batch)
        assert max_error(method.belief.mu, belief.mu) < 1e-10
        oracle.posterior.belief = belief
        assert max_error(covariance_of(method), covariance_of(oracle)) < 1e-10
        assert max_error(method.noise, r) < 1e-10
        # what is reported holds the observations' own noise, however it is tempered
        S = L @ (HPH + torch.eye(s * k).double() / passes) @ L.mT
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(nu), S).log_prob(nu)
        nis = float(nu @ torch.linalg.solve(S, nu))
        assert max_error(stats.log_evidence, evidence) < 1e-9
        assert max_error(stats.nis, nis) < 1e-9
        assert stats.nis_per_observation == pytest.approx(nis / (s * k))
        assert stats.innovation_rms == pytest.approx(float(nu.square().mean().sqrt()))
        assert stats.gated == 0


@pytest.mark.parametrize(("family", "adapter"), in_turn(FAMILIES, ADAPTERS))
def test_the_filter_learns(family, adapter):
    """After a few passes the likelihood of the shots is higher, and every variance positive."""
    options = FitOptions(
        adapter=ADAPTERS[adapter],
        observation=OBSERVATIONS["log_likelihood"],
        filter=FilterOptions(covariance=FAMILIES[family], p0=0.02),
        noise=NoiseOptions(tempering="none"),
    )
    support = make_support(40, torch.float32)
    method = KalmanNGD(make_head(options.adapter, torch.float32), options)
    sampler = BatchSampler(support, 8, 5, seed=0)

    def nll():
        return float(torch.nn.functional.cross_entropy(method.head(support.features), support.labels).detach())

    before = nll()
    for step in range(sampler.steps):
        method.step(sampler.batch(step))
    assert nll() < 0.9 * before
    variances = method.family.diagonal(method.belief.covariance)
    assert bool((variances > 0).all())
    assert float(variances.mean()) < 0.02


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("process", ["random_walk", "ornstein_uhlenbeck"])
def test_a_refused_step_changes_nothing(family, poison, process):
    options = make_options(family, "all", noise="ema-diagonal", process=process)
    method = KalmanNGD(make_head(options.adapter), options)
    support = make_support(7)
    method.step(whole(support))
    belief, before = method.belief, [t.clone() for t in tensors(method)]
    features = support.features.clone()
    features[3, 2] = poison
    with pytest.raises(FilterError, match="NaN or infinite"):
        method.step(whole(Support(features, support.labels), step=1))
    assert method.belief is belief
    assert all(torch.equal(a, b) for a, b in zip(tensors(method), before, strict=True))
    assert torch.equal(flatten(trainable(method.head)), belief.mu)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refused", [2, 3])
def test_a_refused_relinearisation_restores_head_belief_and_noise(family, refused, monkeypatch):
    """The first linearisation of the step was fine, and moved the head; a later one is not."""
    process = "ornstein_uhlenbeck"
    options = make_options(family, "cosine", "linear-both", "ema-scalar", process, iterations=3)
    method = KalmanNGD(make_head(options.adapter), options)
    support = make_support(7)
    method.step(whole(support))
    belief, before = method.belief, [t.clone() for t in tensors(method)]
    calls, observe = [], Cosine.observe

    def fails(self, logits, *rest):
        calls.append(1)
        assert not torch.equal(flatten(trainable(method.head)), belief.mu)  # predicted, or moved
        return observe(self, logits * float("nan") if len(calls) == refused else logits, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Cosine, "observe", fails)
        with pytest.raises(FilterError, match="NaN or infinite"):
            method.step(whole(support, step=1))
    assert len(calls) == refused
    assert method.belief is belief
    assert all(torch.equal(a, b) for a, b in zip(tensors(method), before, strict=True))
    assert torch.equal(flatten(trainable(method.head)), belief.mu)
    method.step(whole(support, step=1))


def test_an_overflowing_update_is_refused():
    options = FitOptions(
        observation=OBSERVATIONS["cosine"],
        filter=FilterOptions(p0=3e38),
        noise=NoiseOptions(process=RandomWalk(q=3e38)),
    )
    method = KalmanNGD(make_head(options.adapter, torch.float32), options)
    before = flatten(trainable(method.head))
    with pytest.raises(FilterError):
        method.step(whole(make_support(7, torch.float32)))
    assert torch.equal(flatten(trainable(method.head)), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("process", PROCESSES)
def test_a_state_is_a_snapshot_that_another_method_continues_from(family, process):
    options = make_options(family, "categorical-sampled", noise="ema-full", process=process)
    sampler = BatchSampler(make_support(15), 7, 2, seed=0)
    first, second = (KalmanNGD(make_head(options.adapter), options) for _ in range(2))
    for step in range(3):
        first.step(sampler.batch(step))
    state = first.state()
    second.load(state)
    for step in range(3, 6):
        first.step(sampler.batch(step))
    for step in range(3, 6):
        second.step(sampler.batch(step))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def linear_gaussian(tempering: str, epochs: int) -> KalmanNGD:
    """The cosine of a class residual is linear in its weights; full batches of the dense filter are then exact."""
    options = FitOptions(
        epochs=epochs,
        adapter=ADAPTERS["class_residual"],
        observation=(Cosine(r0=0.05),),
        filter=FilterOptions(covariance=FAMILIES["dense"], p0=0.3),
        noise=NoiseOptions(tempering=tempering),
    )
    method = KalmanNGD(make_head(options.adapter), options)
    support = make_support(15)
    for step in range(epochs):
        method.step(whole(support, step))
    return method


@pytest.mark.parametrize("epochs", [2, 5])
def test_tempered_passes_together_are_one_pass(epochs):
    once, tempered = linear_gaussian("none", 1), linear_gaussian("passes", epochs)
    assert max_error(tempered.belief.mu, once.belief.mu) < 1e-9
    assert max_error(covariance_of(tempered), covariance_of(once)) < 1e-9


def test_untempered_passes_count_every_shot_again():
    """E passes are then E copies of the shots: an information E times that of one."""
    epochs = 3
    once, again = (covariance_of(linear_gaussian("none", n)).inverse() for n in (1, epochs))
    prior = torch.eye(len(once)).double() / 0.3
    assert max_error(again - prior, epochs * (once - prior)) < 1e-9
    assert max_error(linear_gaussian("none", 1).belief.mu, linear_gaussian("none", epochs).belief.mu) > 1e-2


@pytest.mark.parametrize("adapter", ["linear-image", "linear-both", "bottleneck-image"])
def test_the_iterated_filter_converges_to_the_posterior_mode(adapter):
    """Of the nonlinear least squares of whitened residuals and prior, found by an optimiser that knows no filter."""
    p0, r0, support = 0.05, 0.5, make_support(12)
    options = FitOptions(
        epochs=1,
        adapter=ADAPTERS[adapter],
        observation=(Cosine(r0=r0),),
        filter=FilterOptions(covariance=FAMILIES["dense"], p0=p0, iterations=60, tolerance=1e-12),
    )
    head = make_head(options.adapter)
    parameters, mu = trainable(head), flatten(trainable(head))

    def residuals(theta):
        values = unflatten(torch.as_tensor(theta), parameters)
        cosines = functional_call(head, values, (support.features,)) / head.logit_scale
        matched = cosines.gather(1, support.labels[:, None]).squeeze(1)
        return torch.cat([(1 - matched) / r0**0.5, (torch.as_tensor(theta) - mu) / p0**0.5]).detach().numpy()

    mode = torch.as_tensor(least_squares(residuals, mu.numpy(), xtol=1e-15, ftol=1e-15, gtol=1e-12).x)
    distances = {}
    for iterations in (1, 2, 60):
        filtered = replace(options, filter=replace(options.filter, iterations=iterations))
        method = KalmanNGD(make_head(options.adapter), filtered)
        method.step(whole(support))
        distances[iterations] = float((method.belief.mu - mode).norm() / (mode - mu).norm())
    assert distances[60] < 1e-6
    assert distances[60] < 0.1 * distances[2] < 0.1 * distances[1]


def toy(**changes) -> FitTask:
    return make_task(
        FitOptions(
            adapter=ADAPTERS["linear-both"],
            observation=(Cosine(r0=0.5),),
            filter=FilterOptions(covariance=FAMILIES["dense"], p0=0.05, iterations=60, tolerance=1e-12, **changes),
            noise=NoiseOptions(process=RandomWalk(q=0.0), tempering="none"),
        ),
        dtype=torch.float64,
    )


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "task",
    [
        # steps that are halved where they raise the objective, and the rest without one
        as_shipped(1, "preset=kalman_diagonal", "filter.iterations=60"),
        as_shipped(1, "observation=log_likelihood,cosine"),
        as_shipped(1, "preset=loko", "noise.observation=fixed"),
        toy(),
        toy(serial=3),
        toy(gate=Skip(quantile=1 - 1e-12)),
    ],
    ids=["kalman_diagonal", "kronecker", "loko", "toy", "serial", "gated"],
)
def test_the_covariance_is_that_of_the_last_linearisation(task):
    """Where the mean ended, and not where it began."""
    method = begin(task, SingleProcess())
    assert isinstance(method, KalmanNGD)
    assert not isinstance(method.posterior, ModePosterior)
    prior, batch = method.belief, task.sampler.batch(0)
    before = method.observer.observe(batch, method.noise).observed
    assert method.step(batch).gated == 0
    after = method.observer.observe(batch, method.noise).observed
    found = method.family.diagonal(method.belief.covariance)
    expected, other = (
        method.family.diagonal(update(method.family, prior, o.jacobian, o.nu)[0].covariance) for o in (after, before)
    )
    assert max_error(found, expected) < 1e-8
    assert max_error(other, expected) > 1e-4


def test_iterations_change_nothing_where_observations_are_linear():
    beliefs = []
    for iterations in (1, 4):
        options = make_options("dense", "cosine", "class_residual", iterations=iterations)
        method = KalmanNGD(make_head(options.adapter), options)
        method.step(whole(make_support(9)))
        beliefs.append(method)
    assert max_error(beliefs[0].belief.mu, beliefs[1].belief.mu) < 1e-11
    assert max_error(covariance_of(beliefs[0]), covariance_of(beliefs[1])) < 1e-11


@pytest.mark.parametrize("rule", ["ekf", "vdekf"])
def test_random_signs_are_drawn_anew_at_every_step(rule):
    """One draw says little of a weight; over many steps on the same rows the errors of fresh ones average out."""
    options = FitOptions(
        adapter=ADAPTERS["class_residual"],
        observation=OBSERVATIONS["cosine"],
        filter=FilterOptions(covariance=Diagonal(rule=rule, samples=1), p0=1e-4),
        noise=NoiseOptions(process=RandomWalk(q=0.0), tempering="none"),
    )
    support, steps = make_support(9), 300

    def learned(*at: int, seed: int = 0) -> torch.Tensor:
        """(n,) information gained by steps of these numbers, on the rows of a cosine, which stay as they are."""
        method = KalmanNGD(make_head(options.adapter), options, seed=seed)
        (before,) = method.belief.covariance.values()
        for step in at:
            method.step(whole(support, step))
        (after,) = method.belief.covariance.values()
        return 1 / after["variance"] - 1 / before["variance"]

    assert torch.equal(learned(0), learned(0))
    assert max_error(learned(1), learned(0)) > 0.1
    assert max_error(learned(0, seed=1), learned(0)) > 0.1
    one, many = learned(0), learned(*range(steps)) / steps
    options = replace(options, filter=replace(options.filter, covariance=Diagonal(rule="vdekf")))
    exact = learned(0)
    assert max_error(one, exact) > 0.5
    assert max_error(many, exact) < 0.25


@pytest.mark.parametrize("family", FAMILIES)
def test_without_evidence_an_ornstein_uhlenbeck_belief_returns_to_where_it_began(family):
    """One informative step, then steps whose noise is so large that they say nothing."""
    gamma, p0 = 0.8, 0.05
    options = FitOptions(
        adapter=ADAPTERS["linear+class_residual"],
        observation=(Cosine(r0=1e-3),),
        filter=FilterOptions(covariance=FAMILIES[family], p0=p0),
        noise=NoiseOptions(process=OrnsteinUhlenbeck(gamma=gamma)),
    )
    method, support = KalmanNGD(make_head(options.adapter), options), make_support(12)
    start = flatten(trainable(method.head))
    method.step(whole(support))
    moved = method.belief.mu - start
    variances = method.family.diagonal(method.belief.covariance)
    method.posterior.noise = torch.full_like(method.noise, 1e12)
    for step in range(1, 31):
        method.step(whole(support, step))
        assert max_error(method.belief.mu - start, gamma**step * moved) < 1e-6
    assert float(moved.abs().max()) > 0.05
    assert float((method.belief.mu - start).norm()) < 0.01 * float(moved.norm())
    assert torch.equal(flatten(trainable(method.head)), method.belief.mu)
    assert float(variances.min()) < 0.9 * p0
    assert max_error(method.family.diagonal(method.belief.covariance), torch.full_like(start, p0)) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_says_what_it_cost(family):
    options = make_options(family, adapter="bottleneck+linear+class_residual")
    method = KalmanNGD(make_head(options.adapter), options)
    stats = method.step(whole(make_support(7)))
    held = [tensor for state in method.belief.covariance.values() for tensor in state.values()]
    assert stats.covariance_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held) > 0
    assert stats.bytes_moved == 0  # alone, nothing comes from others


@pytest.mark.parametrize("gate", ["inflate", "skip"])
def test_a_mislabelled_shot_is_gated_and_counted(gate):
    """A confident filter that meets one shot with a wrong label counts it, and is moved by it less."""
    support, moved = make_support(12), {}
    labels = support.labels.clone()
    labels[4] = (labels[4] + 1) % CLASSES
    for kind in ("off", gate):
        options = make_options("dense", gate=kind, tempering="none")
        options = replace(options, observation=(Cosine(r0=0.01),))
        method = KalmanNGD(make_head(options.adapter, perturb=0.0), options)
        for step in range(6):
            method.step(whole(support, step))
        before = method.belief.mu
        stats = method.step(whole(Support(support.features, labels), step=6))
        moved[kind] = float((method.belief.mu - before).norm())
        assert (stats.gated == 0) == (kind == "off")
    assert moved[gate] < 0.7 * moved["off"]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_a_nan_is_refused_whatever_has_to_be_factored(family, noise):
    options = make_options(family, "probability", noise=noise, iterations=2)
    method = KalmanNGD(make_head(options.adapter), options)
    sampler = BatchSampler(make_support(15), 7, 1, seed=0)
    method.step(sampler.batch(0))
    before = [tensor.clone() for tensor in tensors(method)]
    batch = sampler.batch(1)
    batch.inputs[2] = torch.nan
    with pytest.raises(FilterError, match="the step was refused and the belief kept"):
        method.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(method), strict=True))
