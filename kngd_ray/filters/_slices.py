"""The sums of a diagonal family over a weight of few rows, one row of it at a time."""

from dataclasses import dataclass
from functools import cached_property

from kngd_ray._deferred import Tensor, torch
from kngd_ray.filters.jacobian import Factors


@dataclass(frozen=True)
class Slices:
    """A Jacobian by the rows c of the weight: the samples' x, which they share, and the g of each.

    ::

        S_aj,bl            = sum_c g_caj (x_a^T P_c x_b) g_cbl
        diag(H^T S^-1 H)_c = diag(X^T W_c X)      W_c,ab = sum_jl g_caj (S^-1)_aj,bl g_cbl

    Attributes:
        g: (o, k, s) derivatives.
        x: (s, i) inputs.
    """

    g: Tensor
    x: Tensor

    @classmethod
    def of(cls, H: Factors, dtype: "torch.dtype") -> "Slices":
        """From factors of one token, in a dtype."""
        return cls(H.g[:, :, 0].permute(2, 1, 0).to(dtype), H.x[:, 0].to(dtype))

    def gram(self, variance: Tensor) -> Tensor:
        """(M, M) H P H^T."""
        (o, k, s), i = self.g.shape, self.x.shape[1]
        xPx = (self.x * variance.view(o, 1, i)).view(o * s, i) @ self.x.mT
        return (self._pairs * xPx.view(o, 1, 1, s, s)).sum(0).permute(2, 0, 3, 1).reshape(s * k, s * k)

    def information(self, inverse: Tensor) -> Tensor:
        """(size,) diag(H^T S^-1 H)."""
        (o, k, s), i = self.g.shape, self.x.shape[1]
        W = (self._pairs * inverse.view(s, k, s, k).permute(1, 3, 0, 2)).sum((1, 2))
        return ((W.view(o * s, s) @ self.x).view(o, s, i) * self.x).sum(1).view(-1)

    @cached_property
    def _pairs(self) -> Tensor:
        """(o, k, k, s, s) g_caj g_cbl."""
        return self.g[:, :, None, :, None] * self.g[:, None, :, None, :]
