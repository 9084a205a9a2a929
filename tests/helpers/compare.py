"""One measure of disagreement for every equality test."""

import torch
from torch import Tensor


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
