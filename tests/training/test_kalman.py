"""KalmanNGD as an optimiser: what a step writes, reports and refuses, on one process."""

import pytest
import torch
from helpers.cases import ADAPTERS, FAMILIES, NOISES, OBSERVATIONS, make_head, make_options, make_support
from helpers.compare import max_error

from kngd_ray.errors import FilterError
from kngd_ray.filters import Belief, RandomWalk, update
from kngd_ray.observations import flatten, jacobian_rows, stack, trainable
from kngd_ray.training.batches import Batch, BatchSampler, seeded
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("noise", NOISES)
def test_a_step_is_the_composition_of_its_published_parts(family, observation, noise):
    """Observe, stack, predict, condition, estimate the noise: by hand, without ShardedFilter."""
    options = make_options(family, observation, "linear+class_residual", noise)
    head, twin = make_head(options.adapter), make_head(options.adapter)
    method = KalmanNGD(head, options, seed=4)
    covariance, estimate = options.filter.covariance, options.noise.observation
    channels = estimate.channels(4)
    r = torch.cat([torch.full((channels,), model.r0, dtype=torch.float64) for model in options.observation])
    mu = flatten(trainable(twin))
    belief = Belief(mu, covariance.init(len(mu), options.filter.p0, mu))
    sampler = BatchSampler(make_support(15), 7, 1, seed=0)
    for step in range(sampler.steps):
        batch = sampler.batch(step)
        logits = twin(batch.features).detach()
        seen = []
        for number, model in enumerate(options.observation):
            uniforms = torch.rand(
                (batch.total, model.draws(4)), generator=seeded(4, step, 1, number), dtype=torch.float64
            )
            seen.append(model.observe(logits, batch.labels, twin.logit_scale, uniforms))
        rows = stack(seen, channels)
        H = jacobian_rows(twin, batch.features, rows.cotangent)
        nu, base, channel = rows.innovation.flatten(), rows.base_noise.flatten(), rows.channel.flatten()
        prior = Belief(belief.mu, covariance.predict(belief.covariance, 1.0, 1e-3))
        HPH = (H * covariance.project(prior.covariance, H).mT).sum(1)
        belief, innovation = update(covariance, prior, H, nu, base + r[channel])
        residual = [model.residual for model in options.observation for _ in range(channels)]
        r = torch.where(torch.tensor(residual), estimate.update(r, nu, HPH, base, channel), r)
        torch.nn.utils.vector_to_parameters(belief.mu, twin.parameters())

        stats = method.step(batch)
        assert max_error(method.belief.mu, belief.mu) < 1e-10
        assert max_error(method.belief.covariance, belief.covariance) < 1e-10
        assert max_error(method.noise, r) < 1e-10
        assert max_error(stats.log_evidence, innovation.log_evidence) < 1e-10
        assert max_error(stats.nis, innovation.nis) < 1e-10
        assert stats.nis_per_observation == pytest.approx(innovation.nis / len(nu))
        assert stats.innovation_rms == pytest.approx(float(nu.square().mean().sqrt()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_filter_learns(family, adapter):
    """After a few passes the likelihood of the shots is higher, and every variance positive."""
    options = FitOptions(
        adapter=ADAPTERS[adapter],
        observation=OBSERVATIONS["log_likelihood"],
        filter=FilterOptions(covariance=FAMILIES[family], p0=0.02),
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
    assert bool((variances <= 0.02 * (1 + 1e-6)).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_refused_step_changes_nothing(family, poison):
    options = make_options(family, "all", noise="ema-diagonal")
    method = KalmanNGD(make_head(options.adapter), options)
    support = make_support(7)
    method.step(Batch(support.features, support.labels, [7], 0, 0))
    belief, noise, weights = method.belief, method.noise.clone(), flatten(trainable(method.head))
    mu, P = belief.mu.clone(), belief.covariance.clone()
    features = support.features.clone()
    features[3, 2] = poison
    with pytest.raises(FilterError, match="NaN or infinite"):
        method.step(Batch(features, support.labels, [7], 0, 1))
    assert method.belief is belief
    assert torch.equal(belief.mu, mu)
    assert torch.equal(belief.covariance, P)
    assert torch.equal(method.noise, noise)
    assert torch.equal(flatten(trainable(method.head)), weights)


def test_an_overflowing_update_is_refused():
    options = FitOptions(
        observation=OBSERVATIONS["cosine"],
        filter=FilterOptions(p0=3e38),
        noise=NoiseOptions(process=RandomWalk(q=3e38)),
    )
    method = KalmanNGD(make_head(options.adapter, torch.float32), options)
    support = make_support(7, torch.float32)
    before = flatten(trainable(method.head))
    with pytest.raises(FilterError):
        method.step(Batch(support.features, support.labels, [7], 0, 0))
    assert torch.equal(flatten(trainable(method.head)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_a_snapshot_that_another_method_continues_from(family):
    options = make_options(family, "categorical-sampled", noise="ema-diagonal")
    sampler = BatchSampler(make_support(15), 7, 2, seed=0)
    first, second = (KalmanNGD(make_head(options.adapter, perturb=p), options) for p in (0.2, 0.0))
    for step in range(3):
        first.step(sampler.batch(step))
    state = first.state()
    second.load(state)
    for step in range(3, 6):
        first.step(sampler.batch(step))
    for step in range(3, 6):
        second.step(sampler.batch(step))
    assert torch.equal(first.belief.mu, second.belief.mu)
    assert torch.equal(first.belief.covariance, second.belief.covariance)
    assert torch.equal(first.noise, second.noise)
