"""The baselines against torch's optimisers driven by hand."""

from math import cos, pi

import pytest
import torch
from helpers.cases import ADAPTERS, make_head, make_options, make_support
from helpers.compare import max_error

from kngd_ray.errors import FilterError
from kngd_ray.observations import flatten, trainable
from kngd_ray.training.batches import Batch, BatchSampler
from kngd_ray.training.gradient import GradientDescent
from kngd_ray.training.options import FitOptions, OptimizerOptions


def make_descent(method: str, schedule: str = "constant", perturb: float = 0.2) -> GradientDescent:
    options = make_options(method=method, optimizer=OptimizerOptions(lr=0.02, weight_decay=0.1, schedule=schedule))
    return GradientDescent(make_head(options.adapter, perturb=perturb), options, steps=6)


@pytest.mark.parametrize("method", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_equals_the_optimiser_by_hand(method, schedule):
    descent, twin = make_descent(method, schedule), make_head(ADAPTERS["class_residual"])
    if method == "adamw":
        optimiser = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1)
    else:
        optimiser = torch.optim.SGD(twin.parameters(), lr=0.02, weight_decay=0.1, momentum=0.9)
    sampler = BatchSampler(make_support(15), 7, 2, seed=0)
    for step in range(sampler.steps):
        batch = sampler.batch(step)
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * (0.5 * (1 + cos(pi * step / 6)) if schedule == "cosine" else 1)
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(twin(batch.inputs), batch.labels)
        loss.backward()
        optimiser.step()
        stats = descent.step(batch)
        assert max_error(stats.nll, float(loss.detach())) < 1e-10
        assert stats.nis is None
        assert max_error(flatten(trainable(descent.head)), flatten(trainable(twin))) < 1e-10


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_a_refused_step_changes_nothing(method):
    descent, support = make_descent(method), make_support(7)
    descent.step(Batch(support.features, support.labels, [7], 0, 0))
    weights = flatten(trainable(descent.head))
    moments = {key: value.clone() for key, value in descent.state().replicated.items()}
    with pytest.raises(FilterError, match="loss is NaN"):
        descent.step(Batch(support.features * float("nan"), support.labels, [7], 0, 1))
    assert torch.equal(flatten(trainable(descent.head)), weights)
    after = descent.state().replicated
    assert all(torch.equal(after[key], value) for key, value in moments.items())


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_a_step_that_single_precision_cannot_hold_is_refused(method):
    options = make_options(method=method, optimizer=OptimizerOptions(lr=1e60))
    descent = GradientDescent(make_head(options.adapter, torch.float32), options, steps=6)
    support = make_support(7, torch.float32)
    with pytest.raises(FilterError, match=r"larger than numbers can be \(3\.4e\+38\): lower optimizer\.lr"):
        descent.step(Batch(support.features, support.labels, [7], 0, 0))


@pytest.mark.parametrize("method", ["adamw", "sgd"])
def test_a_state_is_a_snapshot_that_another_method_continues_from(method):
    """Taking a state and going on must not move what was taken."""
    first, second = make_descent(method, "cosine"), make_descent(method, "cosine", perturb=0.0)
    sampler = BatchSampler(make_support(15), 7, 2, seed=0)
    for step in range(3):
        first.step(sampler.batch(step))
    state = first.state()
    second.load(state)
    for step in range(3, 6):
        first.step(sampler.batch(step))
    for step in range(3, 6):
        second.step(sampler.batch(step))
    assert torch.equal(flatten(trainable(first.head)), flatten(trainable(second.head)))
    third = make_descent(method, "cosine", perturb=0.0)
    third.load(state)  # neither of the two has written into it
    for step in range(3, 6):
        third.step(sampler.batch(step))
    assert torch.equal(flatten(trainable(first.head)), flatten(trainable(third.head)))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"momentum": 1.0}, "momentum is 1.0"),
    ],
)
def test_optimiser_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        OptimizerOptions(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"adapter": ()}, "adapter is empty"),
        ({"observation": ()}, "observation is empty"),
    ],
)
def test_fit_options_out_of_range_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        FitOptions(**options)
