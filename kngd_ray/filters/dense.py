"""The full covariance in float64: the oracle of every approximation, and a filter for small heads.

Update (Kalman 1960; Joseph's form is not needed at the condition numbers met here)::

    U = P H^T      S = H U + I      P <- P - U S^-1 U^T
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from kngd_ray._deferred import Generator, Tensor, torch
from kngd_ray.filters._family import Covariance, Work
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters.functional_mode import cholesky, eager
from kngd_ray.filters.jacobian import Jacobian, Layer, Part

ROUNDING = 64  # units of rounding that an update in floats is taken to lose
_ALL = "all"  # all layers together are kept as one layer's state


@dataclass(frozen=True, kw_only=True)
class Dense:
    """P as one symmetric (n, n) float64 matrix over the layers in their order.

    All of it lives on one rank: its rows need one another at each update. 8 n^2 bytes, so heads of
    up to about 10,000 parameters.
    """

    joint: ClassVar[bool] = True
    signs: ClassVar[int] = 0

    kind: Literal["dense"] = "dense"

    def grain(self, layer: Layer) -> int:
        """Indivisible."""
        return layer.o

    def cost(self, layer: Layer) -> int:
        """In proportion to the layer's rows of P."""
        return layer.size

    def init(self, parts: Sequence[Part], p0: float, like: Tensor) -> Covariance:
        """(n, n) prior p0 I, on the rank that has the layers."""
        if not parts:
            return {}
        n = sum(part.size for part in parts)
        return {_ALL: {"covariance": p0 * torch.eye(n, dtype=torch.float64, device=like.device)}}

    def predict(self, P: Covariance, scale: float, q: float, total: Callable[[Tensor], Tensor]) -> Covariance:
        """(n, n) scale * P + q I."""
        if not P:
            return P
        predicted = _matrix(P) * scale
        predicted.diagonal().add_(q)
        return {_ALL: {"covariance": predicted}}

    def gram(self, P: Covariance, H: Jacobian, nu: Tensor) -> tuple[Tensor, Work]:
        """(M, M) H P H^T in float64, and U = P H^T (n, M)."""
        if not P:
            return torch.zeros(len(nu), len(nu), dtype=torch.float64, device=nu.device), {}
        rows = torch.cat([piece.rows().double() for piece in H.values()], 1)
        U = _matrix(P) @ rows.mT
        return rows @ U, {"U": U}

    def spread(self, gram: Tensor, M: int) -> Tensor:
        """The sum itself."""
        return gram

    def gain(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, weights: Tensor) -> dict[str, Tensor]:
        """U w, cut into layers."""
        if not P:
            return {}
        sizes = [piece.rows().shape[1] for piece in H.values()]
        return dict(zip(H, (work["U"] @ weights.double()).split(sizes), strict=True))

    def update(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, innovation: Innovation) -> Covariance:
        """(n, n) P - U S^-1 U^T, symmetric to the last bit."""
        if not P:
            return P
        X = innovation.whiten(work["U"])
        posterior = _matrix(P) - X @ X.mT
        return {_ALL: {"covariance": symmetric(posterior)}}

    def sample(self, P: Covariance, draws: int, generator: Generator) -> Tensor:
        """(draws, n) z L^T with P = L L^T."""
        matrix = _matrix(P)
        z = torch.randn(draws, len(matrix), dtype=matrix.dtype, generator=generator).to(matrix.device)
        return z @ root(matrix).mT

    def diagonal(self, P: Covariance) -> Tensor:
        """(n,) marginal variances."""
        return _matrix(P).diagonal()

    def log_det(self, P: Covariance) -> Tensor:
        """Scalar log |P|."""
        return torch.linalg.slogdet(_matrix(P)).logabsdet


def root(P: Tensor) -> Tensor:
    """A square root of a covariance; variances that rounding left just below 0 count as 0.

    Args:
        P: (..., n, n) symmetric.

    Returns:
        (..., n, n) L with L L^T = P; in functional mode, of P with units of rounding on its diagonal.
    """
    if not eager():  # what is singular in one trial of many would cost all of them an eigendecomposition
        number = torch.finfo(P.dtype)
        lost = (ROUNDING * number.eps * P.diagonal(dim1=-2, dim2=-1).amax(-1)).clamp_min(number.tiny)
        P = P + lost[..., None, None] * torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    L = cholesky(P)
    if L is not None:
        return L
    variances, axes = torch.linalg.eigh(P)
    return axes * variances.clamp_min(0).sqrt().unsqueeze(-2)


def symmetric(P: Tensor, times: Tensor | float = 1.0) -> Tensor:
    """The symmetric part of matrices, or a multiple of it.

    Not even X^T X is symmetric to the last bit on every processor, and no later update would remove an antisymmetric
    part.

    Args:
        P: (..., n, n).
        times: the factor, a scalar.

    Returns:
        (..., n, n) symmetric to the last bit.
    """
    # transposed in one go: the sum runs over memory in order, and over the copy, as large new tensors cost page faults
    return P.mT.clone(memory_format=torch.contiguous_format).add_(P).mul_(0.5 * times)


def rounded_up(posterior: Tensor, prior: Tensor) -> Tensor:
    """Give back to the variances what rounding may have taken from them, so that a covariance stays definite.

    The entries of ``prior - X X^T`` carry rounding errors in proportion to the standard deviations of the prior. These
    may exceed the variance that is left along a direction which confident observations pin down.

    Args:
        posterior: (..., n, n) covariance, changed in place.
        prior: (..., n, n) the covariance from which it was computed.

    Returns:
        The posterior, with some units of rounding of what each variance lost added to it.
    """
    variances = posterior.diagonal(dim1=-2, dim2=-1)
    variances.add_(prior.diagonal(dim1=-2, dim2=-1) - variances, alpha=ROUNDING * torch.finfo(prior.dtype).eps)
    return posterior


def _matrix(P: Covariance) -> Tensor:
    return P[_ALL]["covariance"]
