"""Observation noise against a loop over observations, and the options' ranges."""

import pytest
import torch
from helpers.cases import rng
from helpers.compare import max_error

from kngd_ray.filters import Ema, Fixed, RandomWalk


def one_batch(seed: int, channels: int, m: int = 9):
    g = rng(seed)
    nu = torch.randn(m, generator=g, dtype=torch.float64)
    predicted, base = (
        torch.rand(m, generator=g, dtype=torch.float64),
        0.2 * torch.rand(m, generator=g).double(),
    )
    return nu, predicted, base, torch.randint(channels, (m,), generator=g)


def looped(r, beta, nu, predicted, base, channel):
    """The recursion of the docstring, one channel after another, in plain floats."""
    updated = []
    for c, value in enumerate(r.tolist()):
        seen = [i for i in range(len(nu)) if int(channel[i]) == c]
        if not seen:
            updated.append(value)
            continue
        energy = sum(float(nu[i]) ** 2 + float(predicted[i]) - float(base[i]) for i in seen) / len(seen)
        updated.append(max(beta * value + (1 - beta) * energy, 1e-8))
    return torch.tensor(updated, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_ema_equals_a_plain_loop(beta, channels):
    noise = Ema(beta=beta, form="diagonal" if channels > 1 else "scalar")
    r = expected = 0.1 + torch.rand(channels, generator=rng(0), dtype=torch.float64)
    for step in range(6):
        batch = one_batch(step, channels)
        r, expected = noise.update(r, *batch), looped(expected, beta, *batch)
        assert max_error(r, expected) < 1e-12


def test_a_channel_without_observations_keeps_its_value():
    r = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    nu, predicted, base, _ = one_batch(0, 3)
    updated = Ema(form="diagonal").update(r, nu, predicted, base, torch.full((9,), 1))
    assert torch.equal(updated[[0, 2]], r[[0, 2]])
    assert updated[1] != r[1]
    assert torch.equal(r, torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64))


def test_variance_never_reaches_zero():
    """The likelihood's own variance can exceed what was seen; the estimate then stops at a floor."""
    tiny, base = torch.zeros(4), torch.full((4,), 0.25)
    r = torch.tensor([0.1])
    for _ in range(100):
        r = Ema(beta=0.1).update(r, tiny, tiny, base, torch.zeros(4, dtype=torch.long))
    assert 0 < float(r) <= 1e-7


def test_fixed_stays():
    r = torch.tensor([0.5, 2.0])
    assert torch.equal(Fixed().update(r, *one_batch(0, 2)), r)


def test_channels():
    assert Fixed().channels(7) == 1
    assert Ema(form="scalar").channels(7) == 1
    assert Ema(form="diagonal").channels(7) == 7


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_memory_outside_its_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta is"):
        Ema(beta=beta)


@pytest.mark.parametrize("q", [-1e-9, float("nan")])
def test_negative_process_noise_is_refused(q):
    with pytest.raises(ValueError, match="q is"):
        RandomWalk(q=q)


def test_random_walk_is_the_same_at_every_step():
    assert RandomWalk(q=0.2).transition(0, 1.0) == RandomWalk(q=0.2).transition(99, 5.0) == (1.0, 1.0, 0.2)
