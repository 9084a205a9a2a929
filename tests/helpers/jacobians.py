"""Jacobians of layers of all forms: random numbers, no network behind them."""

import torch
from helpers.cases import rng
from torch import Tensor

from kngd_ray.filters import Factors, Jacobian, Layer, Part, Rows

DOUBLE = torch.float64

# Layers of a head, weights of linear layers and others, so that factors and rows meet in one update.
LAYERS = (
    Layer("down.weight", 4, 3, factored=True),
    Layer("down.bias", 4, 1, factored=False),
    Layer("text.weight", 2, 5, factored=True),
    Layer("scale", 3, 1, factored=False),
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=DOUBLE).to(dtype)


def random_factors(
    o: int, i: int, s: int = 3, k: int = 1, T: int = 1, shared: bool = False, seed: int = 0, dtype: torch.dtype = DOUBLE
) -> Factors:
    """Of s samples; of a shared input all samples see the same x."""
    x = randn(T, i, seed=seed + 1000, dtype=dtype) if shared else randn(s, T, i, seed=seed + 1000, dtype=dtype)
    return Factors(randn(s, k, T, o, seed=seed, dtype=dtype), x)


def mixed_jacobian(s: int = 3, k: int = 1, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Jacobian:
    """H of LAYERS: one token, rows, two tokens, rows."""
    down, bias, text, scale = LAYERS
    return {
        down.name: random_factors(down.o, down.i, s, k, seed=seed, dtype=dtype),
        bias.name: Rows(randn(s * k, bias.size, seed=seed + 1, dtype=dtype)),
        text.name: random_factors(text.o, text.i, s, k, T=2, seed=seed + 2, dtype=dtype),
        scale.name: Rows(randn(s * k, scale.size, seed=seed + 3, dtype=dtype)),
    }


def whole(*layers: Layer) -> list[Part]:
    return [Part(layer, 0, layer.o) for layer in layers]


def stacked_rows(H: Jacobian) -> Tensor:
    """(M, n) H as one matrix."""
    return torch.cat([piece.rows().double() for piece in H.values()], 1)


def posterior(P: Tensor, H: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """P H^T S^-1 nu and the posterior covariance, by the textbook."""
    S = H @ P @ H.mT + torch.eye(len(H), dtype=P.dtype)
    gain = torch.linalg.solve(S, H @ P).mT
    return gain @ nu, P - gain @ H @ P
