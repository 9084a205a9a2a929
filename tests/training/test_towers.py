"""Whole towers trained: the streamed filter against the one that holds all of H, and ranks against one process."""

from dataclasses import replace

import pytest
import torch
from helpers.cases import some_slow
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.towers import GRADIENT, KALMAN, flat, make_batch, make_network, run_kalman, run_towers

from kngd_ray.errors import FilterError
from kngd_ray.filters import OrnsteinUhlenbeck
from kngd_ray.sharding import SingleProcess
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.losses import ClipCiteLoss


@pytest.fixture(scope="module")
def alone() -> dict:
    return run_towers(SingleProcess())


@pytest.fixture(scope="module", params=some_slow([2, 3, 4], 2), ids="W={}".format)
def ranks(request) -> list[dict]:
    return run_ranks(request.param, run_towers)


@pytest.mark.parametrize("case", KALMAN)
def test_streamed_is_the_same_filter(alone, case):
    whole = run_kalman(SingleProcess(), case, streamed=False)
    for key, expected in whole.items():
        if key != "pieces":
            assert max_error(alone[case][key].double(), expected.double()) < 1e-9, key


@pytest.mark.parametrize("case", [*KALMAN, *GRADIENT])
def test_ranks_end_where_one_process_does(ranks, alone, case):
    for rank in ranks:
        for key, found in rank[case].items():
            if key in ("bytes", "pieces"):
                continue
            expected = alone[case][key]
            if key.startswith("P/"):
                start, stop = rank[case]["pieces"][key.split("/")[1]]
                expected = expected if found.shape == expected.shape else expected[start:stop]
            assert max_error(found, expected) < 1e-9, key


@pytest.mark.parametrize("case", KALMAN)
def test_the_covariance_is_divided_among_ranks(ranks, alone, case):
    shares = torch.stack([rank[case]["bytes"][-1] for rank in ranks])
    assert shares.sum() == alone[case]["bytes"][-1]
    if "kronecker" not in case:  # whose layers cannot be cut
        assert shares.max() <= 1.1 * alone[case]["bytes"][-1] / len(ranks)


@pytest.mark.parametrize("case", KALMAN)
def test_the_network_is_the_mean(case):
    network = make_network(KALMAN[case])
    before = flat(network).clone()
    method = KalmanNGD(network, KALMAN[case], streamed=True)
    assert torch.equal(method.belief.mu, before)
    method.step(make_batch(network, 0, SingleProcess()))
    assert torch.equal(method.belief.mu, flat(network))
    assert not torch.equal(before, flat(network))


@pytest.mark.parametrize("case", KALMAN)
def test_a_refused_step_leaves_all_as_it_was(case):
    network = make_network(KALMAN[case])
    method = KalmanNGD(network, KALMAN[case], streamed=True)
    method.step(make_batch(network, 0, SingleProcess()))
    mu = method.belief.mu.clone()
    P = {(n, k): v.clone() for n, state in method.belief.covariance.items() for k, v in state.items()}
    bad = make_batch(network, 1, SingleProcess())
    bad.inputs["image"][0] = torch.nan
    with pytest.raises(FilterError, match="NaN"):
        method.step(bad)
    assert torch.equal(method.belief.mu, mu)
    assert torch.equal(flat(network), mu)
    for (name, key), kept in P.items():
        assert torch.equal(method.belief.covariance[name][key], kept)


def test_a_small_prior_makes_the_step_that_of_the_loss(alone):
    """Where P is small the mean moves along the gradient of CLIP-CITE's loss, term weights as noise ratios."""

    options = KALMAN["cite-vdekf"]
    network = make_network(options)
    before = flat(network).clone()
    batch = make_batch(network, 0, SingleProcess())
    outputs = network(batch.inputs)
    gradient = ClipCiteLoss().gradient(outputs, batch, SingleProcess(), network.logit_scale, network.classes)
    parameters = [p for p in network.parameters() if p.requires_grad]
    found = torch.autograd.grad(outputs, parameters, gradient, materialize_grads=True)
    expected = -torch.cat([g.flatten() for g in found]) * batch.total
    method = KalmanNGD(network, options, streamed=True)
    for state in method.belief.covariance.values():
        state["variance"].fill_(1e-12)
    method.step(batch)
    moved = (flat(network) - before) / 1e-12 * options.epochs  # R is tempered by the passes
    assert float((moved - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("case", GRADIENT)
def test_adamw_refuses_what_is_not_finite(case):
    network = make_network(GRADIENT[case])
    method = GradientDescent(network, GRADIENT[case], 3)
    batch = make_batch(network, 0, SingleProcess())
    batch.inputs["image"][0] = torch.nan
    before = flat(network).clone()
    with pytest.raises(FilterError, match="NaN"):
        method.step(batch)
    assert torch.equal(flat(network), before)


@pytest.mark.parametrize("case", ["full-ekf", "lora-ou"])
def test_towers_have_a_prior_and_process_noise_of_their_own(case):
    options = KALMAN[case]
    blind = tuple(replace(model, r0=1e12) for model in options.observation)  # what is seen says nothing
    noise = replace(options.noise, process=OrnsteinUhlenbeck(gamma=0.9))
    options = replace(options, observation=blind, noise=noise, filter=replace(options.filter, p0=0.5, towers=0.04))
    network = make_network(options)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    method = KalmanNGD(network, options, streamed=True)
    for _ in range(2):  # an Ornstein-Uhlenbeck process stays at its prior
        for name, state in method.belief.covariance.items():
            relative = case.startswith("full") and name.startswith("clip.")
            expected = 0.04 * max(float(before[name].square().mean()), 1e-6) if relative else 0.5
            assert torch.allclose(state["variance"], torch.full_like(state["variance"], expected), rtol=1e-5), name
        method.step(make_batch(network, 0, SingleProcess()))
