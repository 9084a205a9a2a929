"""What a covariance family is: pure functions on one contiguous slice of the covariance.

A family never knows about ranks. It works on the rows of the covariance that belong to a
contiguous slice of ``n_r`` parameters and says, by :meth:`Family.cuts`, where the whole may be
cut so that the slices do not need one another. One update is then three calls::

    U = family.project(P, H)                   (n_r, M)   the slice of P H^T
    S = sum over slices of H U + R             (M, M)     innovation covariance
    P = family.update(P, H, U, R, innovation)             posterior covariance

and the mean of the slice moves by ``U w``. :func:`kngd_ray.filters.update` composes them in one
process, :class:`kngd_ray.sharding.ShardedFilter` over ranks.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Generator, Tensor

from kngd_ray.filters._innovation import Innovation


@runtime_checkable
class Family(Protocol):
    """A covariance family; its options are the fields of the frozen dataclass that implements it.

    The state is a tensor whose first dimension runs over the parameters of the slice: (n_r,) for a
    diagonal, (n_r, n) for a dense covariance. Functions return new tensors and never write into
    their arguments, so a refused step leaves the belief as it was.
    """

    @property
    def kind(self) -> str:
        """The family's name in configuration files."""
        ...

    def cuts(self, n: int) -> Sequence[int]:
        """Where n parameters may be cut: increasing positions from 0 to n."""
        ...

    def init(self, n: int, p0: float, like: Tensor) -> Tensor:
        """Prior covariance p0 I of a slice of n parameters, on the device of `like`."""
        ...

    def predict(self, P: Tensor, scale: float, q: float) -> Tensor:
        """Time update: scale * P + q I."""
        ...

    def project(self, P: Tensor, H: Tensor) -> Tensor:
        """Cross-covariance P H^T: (n_r, M) from the (M, n_r) columns of H of this slice."""
        ...

    def update(self, P: Tensor, H: Tensor, U: Tensor, R: Tensor, innovation: Innovation) -> Tensor:
        """Posterior covariance of the slice from H (M, n_r), U (n_r, M) and the noise variances R (M,)."""
        ...

    def sample(self, P: Tensor, draws: int, generator: Generator) -> Tensor:
        """Zero-mean deviations from N(0, P): (draws, n_r)."""
        ...

    def diagonal(self, P: Tensor) -> Tensor:
        """Marginal variances of the slice: (n_r,)."""
        ...

    def log_det(self, P: Tensor) -> Tensor:
        """Logarithm of the determinant of the slice's covariance: scalar."""
        ...
