"""The full covariance in float64: the oracle of every approximation, and a filter for small heads.

Update (Kalman 1960; Joseph's form is not needed at the condition numbers met here)::

    U = P H^T      S = H U + R      P <- P - U S^-1 U^T
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from kngd_ray.filters._innovation import Innovation


@dataclass(frozen=True, kw_only=True)
class Dense:
    """P as one symmetric (n, n) float64 matrix.

    All of it lives on one rank: its rows need one another at each update. 8 n^2 bytes, so heads of
    up to about 10,000 parameters.
    """

    kind: Literal["dense"] = "dense"

    def cuts(self, n: int) -> Sequence[int]:
        """Indivisible: (0, n)."""
        return (0, n)

    def init(self, n: int, p0: float, like: Tensor) -> Tensor:
        """(n, n) prior p0 I."""
        return p0 * torch.eye(n, dtype=torch.float64, device=like.device)

    def predict(self, P: Tensor, scale: float, q: float) -> Tensor:
        """(n, n) scale * P + q I."""
        predicted = P * scale
        predicted.diagonal().add_(q)
        return predicted

    def project(self, P: Tensor, H: Tensor) -> Tensor:
        """(n, M) P H^T in float64."""
        return P @ H.to(P.dtype).mT

    def update(self, P: Tensor, H: Tensor, U: Tensor, R: Tensor, innovation: Innovation) -> Tensor:
        """(n, n) P - U S^-1 U^T, symmetric to the last bit."""
        X = innovation.whiten(U.to(P.dtype))
        posterior = P - X @ X.mT
        return (posterior + posterior.mT) / 2

    def sample(self, P: Tensor, draws: int, generator: Generator) -> Tensor:
        """(draws, n) z L^T with P = L L^T; variances that rounding left just below 0 count as 0."""
        z = torch.randn(draws, len(P), dtype=P.dtype, generator=generator).to(P.device)
        L, info = torch.linalg.cholesky_ex(P)
        if int(info) != 0:
            variances, axes = torch.linalg.eigh(P)
            L = axes * variances.clamp_min(0).sqrt()
        return z @ L.mT

    def diagonal(self, P: Tensor) -> Tensor:
        """(n,) marginal variances."""
        return P.diagonal()

    def log_det(self, P: Tensor) -> Tensor:
        """Scalar log |P|."""
        return torch.linalg.slogdet(P).logabsdet
