"""One measure of disagreement for every equality test, and the covariance that a belief stands for."""

import torch
from torch import Tensor

from kngd_ray.filters import Rows
from kngd_ray.training.kalman import KalmanNGD


def max_error(found: Tensor | float, expected: Tensor | float) -> float:
    """Largest absolute difference, relative to the largest expected magnitude."""
    found, expected = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape, f"shapes differ: {tuple(found.shape)} and {tuple(expected.shape)}"
    assert bool(torch.isfinite(expected).all()), "the reference is not finite"
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().max()) or 1.0
    error = float((found - expected).abs().max()) / scale
    return error if error == error else float("inf")


def covariance_of(method: KalmanNGD) -> Tensor:
    """P (n, n) on every rank, from the parts of all: H P H^T at H = I.

    Families may hold one P as different numbers (factors up to a rotation or a scale): this is what they stand for.
    """
    ownership, mu = method.posterior.filter.ownership, method.belief.mu
    eye = torch.eye(len(mu), dtype=mu.dtype)
    columns = dict(
        zip((x.name for x in ownership.layers), eye.split([x.size for x in ownership.layers], 1), strict=True)
    )
    own = {part.layer.name: Rows(columns[part.layer.name][:, part.flat]) for part in ownership.parts[method.group.rank]}
    gram, _ = method.family.gram(method.belief.covariance, own, eye[0])
    return method.family.spread(method.group.sum(gram), len(mu))
