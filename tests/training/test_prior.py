"""The posterior as a prior: what continues, what starts anew, and that nothing is lost in between."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.cases import make_options, make_support, make_task
from helpers.compare import max_error
from helpers.ranks import run_ranks
from helpers.resuming import IDENTITY, Killed, everything_in, kill_after

from kngd_ray.errors import CheckpointError
from kngd_ray.filters import OrnsteinUhlenbeck, RandomWalk
from kngd_ray.observations import flatten, trainable
from kngd_ray.sharding import Group, SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.calibration import calibrate, predictor_of
from kngd_ray.training.fit import FitTask, begin, fit
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FitOptions, NoiseOptions
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.prior import Prior
from kngd_ray.training.resumable import latest, run_fit

ALONE = SingleProcess()
# Cosines of a class residual are linear in the weights.
LINEAR = replace(
    make_options("dense", "cosine", epochs=1, batch_size=4),
    noise=NoiseOptions(process=RandomWalk(q=0.0), tempering="none"),
)
OPTIONS = {
    "ekf": make_options("ekf", noise="ema-scalar", adapter="bottleneck+linear+class_residual"),
    "dense": make_options("dense", adapter="linear+class_residual"),
    "adamw": make_options(method="adamw"),
}


def prior_from(folder: Path, task: FitTask, group: Group = ALONE) -> Prior:
    """The posterior of a fit as it lies on storage."""
    written = run_fit(task, folder, IDENTITY, group, "cpu", checkpoint_every=0)
    return Prior(written, checkpoint.read_manifest(written))


def continued(task: FitTask, prior: Prior, n: int = 13) -> FitTask:
    """The same fit on other shots, from the prior."""
    return replace(task, support=make_support(n, task.class_embeddings.dtype, seed=40), prior=prior)


def weights(method) -> torch.Tensor:
    return flatten(trainable(method.head))


def test_on_linear_observations_two_fits_are_one_pass_over_all_shots(tmp_path, double):
    first = make_task(LINEAR, shots=11, dtype=torch.float64)
    second = continued(first, prior_from(tmp_path, first))
    found = fit(second)
    both = replace(second, prior=None, support=type(first.support)(
        torch.cat([first.support.features, second.support.features]),
        torch.cat([first.support.labels, second.support.labels]),
    ))  # fmt: skip
    expected = fit(both)
    assert isinstance(found, KalmanNGD)
    assert isinstance(expected, KalmanNGD)
    assert max_error(found.belief.mu, expected.belief.mu) < 1e-9
    for layer, state in expected.belief.covariance.items():
        for key, P in state.items():
            assert max_error(found.belief.covariance[layer][key], P) < 1e-9
    assert max_error(found.belief.mu, fit(replace(second, prior=None)).belief.mu) > 1e-2, "the prior matters"


@pytest.mark.parametrize("name", OPTIONS)
def test_it_begins_where_the_earlier_fit_ended(name, tmp_path):
    task = make_task(OPTIONS[name])
    prior = prior_from(tmp_path, task)
    earlier = prior.load()
    state = begin(continued(task, prior), ALONE).state()
    assert set(state.weights) == set(earlier.weights)
    assert all(torch.equal(p, earlier.weights[key]) for key, p in state.weights.items())
    assert set(state.covariance) == set(earlier.covariance)
    assert all(torch.equal(P, earlier.covariance[key]) for key, P in state.covariance.items())


def test_what_was_estimated_from_the_earlier_data_starts_anew(tmp_path):
    """The level of R, and an optimiser's moments."""
    task = make_task(OPTIONS["ekf"])
    prior = prior_from(tmp_path / "kalman", task)
    fresh = begin(task, ALONE).state().replicated["noise"]
    assert not torch.equal(prior.load().replicated["noise"], fresh)
    assert torch.equal(begin(continued(task, prior), ALONE).state().replicated["noise"], fresh)
    task = make_task(OPTIONS["adamw"])
    prior = prior_from(tmp_path / "adamw", task)
    assert prior.load().replicated
    assert begin(continued(task, prior), ALONE).state().replicated == {}


def test_p0_feeds_the_process_and_not_the_prior(tmp_path):
    """Without observations an Ornstein-Uhlenbeck belief returns to the prior's mean, with variance p0 around it."""
    task = make_task(make_options("ekf", adapter="class_residual"))
    prior = prior_from(tmp_path, task)
    gamma, p0 = 0.6, 0.01
    noise = NoiseOptions(process=OrnsteinUhlenbeck(gamma=gamma))
    options = replace(task.options, noise=noise, filter=replace(task.options.filter, p0=p0))
    method = begin(replace(continued(task, prior), options=options), ALONE)
    assert isinstance(method, KalmanNGD)
    displaced = replace(method.belief, mu=method.belief.mu + 1.0)
    predicted = method.posterior.filter.predict(
        displaced, options.noise.process.transition(0, p0), method.posterior.anchor
    )
    assert max_error(predicted.mu, method.belief.mu + gamma) < 1e-6
    for layer, state in method.belief.covariance.items():
        for key, P in state.items():
            expected = gamma**2 * P + (1 - gamma**2) * p0
            assert max_error(predicted.covariance[layer][key], expected) < 1e-6


def test_folds_of_the_calibration_start_at_the_prior(tmp_path):
    """Without a pass over the shots, each fold is predicted by the prior itself."""
    prior = prior_from(tmp_path, make_task(make_options("ekf", epochs=3)))
    second = continued(make_task(make_options("ekf", epochs=0)), prior)
    options = PosteriorOptions(folds=2, predict="mean")
    found = calibrate(second, options).held_out_nll
    p = predictor_of(fit(second), options).predict(second.support.features, 0.0).probabilities
    expected = -p[torch.arange(len(p)), second.support.labels].log().mean()
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert found != pytest.approx(calibrate(replace(second, prior=None), options).held_out_nll, rel=1e-3)


def test_resumed_it_is_the_run_that_never_stopped(tmp_path):
    """Its own checkpoint wins over the prior, of which mu_0 is still needed."""
    options = replace(OPTIONS["ekf"], noise=NoiseOptions(process=OrnsteinUhlenbeck(gamma=0.7)))
    task = make_task(options)
    second = continued(task, prior_from(tmp_path / "first", task))
    straight = run_fit(second, tmp_path / "straight", IDENTITY, ALONE, "cpu", checkpoint_every=1)
    with pytest.raises(Killed):
        run_fit(second, tmp_path / "cut", IDENTITY, ALONE, "cpu", checkpoint_every=1, on_step=kill_after(3))
    assert latest(tmp_path / "cut").manifest["step"] == 2
    resumed = run_fit(second, tmp_path / "cut", IDENTITY, ALONE, "cpu", checkpoint_every=1)
    a, b = everything_in(straight), everything_in(resumed)
    assert set(a) == set(b)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_checkpoint_knows_the_prior_that_it_came_from(tmp_path):
    task = make_task(OPTIONS["ekf"])
    prior = prior_from(tmp_path / "first", task)
    other = prior_from(tmp_path / "other", replace(task, options=replace(task.options, epochs=1)))
    again = prior_from(tmp_path / "again", task)
    assert again.sha256 == prior.sha256 != other.sha256, "the content counts, not the place"
    run_fit(continued(task, prior), tmp_path / "second", IDENTITY, ALONE, "cpu", checkpoint_every=0)
    run_fit(continued(task, again), tmp_path / "second", IDENTITY, ALONE, "cpu", checkpoint_every=0)
    for changed in (continued(task, other), replace(continued(task, prior), prior=None)):
        with pytest.raises(CheckpointError, match="belongs to another task: its prior is"):
            run_fit(changed, tmp_path / "second", IDENTITY, ALONE, "cpu", checkpoint_every=0)


def test_a_prior_that_is_replaced_while_in_use_is_refused(tmp_path):
    task = make_task(OPTIONS["ekf"])
    prior = prior_from(tmp_path, task)
    second = continued(task, prior)
    manifest = {"seed": 5, **{k: v for k, v in prior.manifest.items() if k in ("step", "steps", "options", "shots")}}
    checkpoint.save(prior.folder, begin(task, ALONE).state(), manifest, ALONE)
    with pytest.raises(CheckpointError, match="was replaced while it was in use"):
        fit(second)
    (prior.folder / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="was damaged"):
        fit(second)


def continue_on_ranks(group: Group, folder: Path, prior: Prior, family: str) -> Path:
    """On the ranks; what they wrote is complete when all have returned."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        task = continued(make_task(RANKED[family], dtype=torch.float64), prior)
        return run_fit(task, folder, IDENTITY, group, "cpu", checkpoint_every=0)
    finally:
        torch.set_default_dtype(default)


RANKED: dict[str, FitOptions] = {
    family: make_options(family, observation="log_likelihood+cosine", adapter="linear+class_residual")
    for family in ("ekf", "dense")
}


@pytest.mark.parametrize("family", RANKED)
def test_any_number_of_ranks_continues_what_one_wrote(family, tmp_path, double):
    prior = prior_from(tmp_path / "first", make_task(RANKED[family], dtype=torch.float64))
    expected = everything_in(continue_on_ranks(ALONE, tmp_path / "one", prior, family))
    found = everything_in(run_ranks(3, continue_on_ranks, tmp_path / "three", prior, family)[0])
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert max_error(found[name], tensor) < 1e-10, name
