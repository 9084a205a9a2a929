"""One variance per weight, with two ways to come back to a diagonal after an update.

Both move the mean with the full gain, ``mu + P H^T S^-1 nu`` with ``S = H P H^T + R``; they differ
in which diagonal stands for the posterior (Chang et al., arXiv 2305.19535):

``ekf`` (FD-EKF)
    the diagonal of the exact posterior covariance, the minimiser of KL(posterior || diagonal)::

        P <- P - colsum((L^-1 H P)^2),   S = L L^T

``vdekf`` (VD-EKF)
    the diagonal of the exact posterior precision, the minimiser of KL(diagonal || posterior)::

        1/P <- 1/P + diag(H^T R^-1 H)

    additive over the observations and positive by construction; it is never larger than ``ekf``'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from kngd_ray.filters._innovation import Innovation


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """P as n variances, in the weights' dtype but never below float32.

    Attributes:
        kind: the family's name.
        rule: which diagonal approximates the posterior; see the module.
    """

    kind: Literal["diagonal"] = "diagonal"
    rule: Literal["ekf", "vdekf"] = "ekf"

    def cuts(self, n: int) -> Sequence[int]:
        """Anywhere: variances do not need one another."""
        return range(n + 1)

    def init(self, n: int, p0: float, like: Tensor) -> Tensor:
        """(n,) prior variances p0."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.full((n,), p0, dtype=dtype, device=like.device)

    def predict(self, P: Tensor, scale: float, q: float) -> Tensor:
        """(n,) scale * P + q."""
        return P * scale + q

    def project(self, P: Tensor, H: Tensor) -> Tensor:
        """(n, M) P H^T."""
        return P.unsqueeze(1) * H.mT.to(P.dtype)

    def update(self, P: Tensor, H: Tensor, U: Tensor, R: Tensor, innovation: Innovation) -> Tensor:
        """(n,) posterior variances, kept positive against rounding in ``ekf``."""
        if self.rule == "vdekf":
            return 1.0 / (1.0 / P + H.to(P.dtype).square().mT @ (1.0 / R.to(P.dtype)))
        shrinkage = innovation.whiten(U).square().sum(1)
        # Exact arithmetic keeps P - shrinkage > 0; in float32 a weight seen by many confident
        # observations can round to zero and would never move again.
        return torch.maximum(P - shrinkage, P * torch.finfo(P.dtype).eps)

    def sample(self, P: Tensor, draws: int, generator: Generator) -> Tensor:
        """(draws, n) z sqrt(P)."""
        z = torch.randn(draws, len(P), dtype=P.dtype, generator=generator).to(P.device)
        return z * P.sqrt()

    def diagonal(self, P: Tensor) -> Tensor:
        """(n,) P itself."""
        return P

    def log_det(self, P: Tensor) -> Tensor:
        """Scalar sum of log variances."""
        return P.log().sum()
