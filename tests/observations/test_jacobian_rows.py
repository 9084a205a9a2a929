"""Jacobian rows and the step built on them, against autograd and the closed form, in float64."""

import pytest
import torch
from helpers.cases import ADAPTERS, CLASSES, make_head, make_support, rng
from helpers.compare import covariance_of, max_error
from torch.autograd.functional import jacobian
from torch.func import functional_call

from kngd_ray.clip import CLIPHead
from kngd_ray.filters import Dense
from kngd_ray.observations import Categorical, flatten, jacobian_rows, trainable, unflatten
from kngd_ray.training.batches import Batch
from kngd_ray.training.kalman import KalmanNGD
from kngd_ray.training.options import FilterOptions, FitOptions, NoiseOptions

EXACT = 1e-10


def logit_jacobian(head: CLIPHead, features: torch.Tensor) -> torch.Tensor:
    """(m, C, n) derivative of the logits in the flat vector of trainable weights."""
    parameters = trainable(head)

    def logits(theta: torch.Tensor) -> torch.Tensor:
        return functional_call(head, unflatten(theta, parameters), (features,))

    return jacobian(logits, flatten(parameters))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("m", [0, 1, 5])
def test_rows_are_the_derivatives_of_the_observations(adapter, m):
    head, features = make_head(ADAPTERS[adapter]), make_support(5).features[:m]
    cotangent = torch.randn(m, 3, CLASSES, generator=rng(7), dtype=torch.float64)
    rows = torch.cat(list(jacobian_rows(head, features, cotangent).values()), 1)
    n = sum(p.numel() for p in head.parameters())
    assert rows.shape == (3 * m, n)
    expected = (cotangent @ logit_jacobian(head, features)).reshape(3 * m, n) if m else rows
    assert max_error(rows, expected) < EXACT
    assert not rows.requires_grad
    assert all(p.grad is None for p in head.parameters())


def test_frozen_parameters_have_no_columns_and_unused_ones_have_zeros():
    head = make_head(ADAPTERS["bottleneck+linear+class_residual"])
    head.spare = torch.nn.Linear(2, 2, bias=False).double()
    frozen = head.adapters[0].mlp["image"][0].weight.requires_grad_(False)
    names = trainable(head)
    assert len(names) == sum(1 for _ in head.parameters()) - 1
    features = make_support(3).features
    cotangent = torch.eye(CLASSES, dtype=torch.float64).expand(3, CLASSES, CLASSES)
    by_name = jacobian_rows(head, features, cotangent)
    assert list(by_name) == list(names)
    rows = torch.cat(list(by_name.values()), 1)
    assert rows.shape[1] == sum(p.numel() for p in head.parameters()) - frozen.numel()
    assert max_error(rows, logit_jacobian(head, features).reshape(3 * CLASSES, -1)) < EXACT
    assert not by_name["spare.weight"].any()


def test_flatten_and_unflatten_are_inverse():
    parameters = trainable(make_head(ADAPTERS["bottleneck-both"]))
    vector = flatten(parameters)
    again = unflatten(vector, parameters)
    assert list(again) == list(parameters)
    assert all(torch.equal(again[name], p) for name, p in parameters.items())


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("r0", [1.0, 4.0])
def test_exact_categorical_step_is_the_natural_gradient_of_the_ggn(adapter, r0):
    """(P0^-1 + J^T L J / r)^-1 J^T (e_y - p) / r, L = diag(p) - p p^T, written down without a filter."""
    p0, support = 0.05, make_support(6)
    options = FitOptions(
        adapter=ADAPTERS[adapter],
        observation=(Categorical(r0=r0),),
        filter=FilterOptions(covariance=Dense(), p0=p0),
        noise=NoiseOptions(tempering="none"),
    )
    head = make_head(options.adapter)
    before, J = flatten(trainable(head)), logit_jacobian(head, support.features)
    p = head(support.features).detach().softmax(1)
    residual = torch.nn.functional.one_hot(support.labels, CLASSES) - p
    ggn = torch.einsum("ica,icd,idb->ab", J, p.diag_embed() - p[:, :, None] * p[:, None, :], J)
    covariance = (torch.eye(len(before)).double() / p0 + ggn / r0).inverse()
    step = covariance @ torch.einsum("ica,ic->a", J, residual) / r0

    method = KalmanNGD(head, options)
    stats = method.step(Batch(support.features, support.labels, [6], 0, 0))

    assert max_error(method.belief.mu - before, step) < EXACT
    assert max_error(covariance_of(method), covariance) < EXACT
    assert torch.equal(flatten(trainable(head)), method.belief.mu)
    assert stats.nll == pytest.approx(float(-p.log()[range(6), support.labels].mean()), rel=1e-12)
    assert stats.accuracy == pytest.approx(float((p.argmax(1) == support.labels).double().mean()))
