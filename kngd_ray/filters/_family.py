"""What a covariance family is: pure functions on the part of the covariance that one rank holds.

A family never knows about ranks. It works on the parts of the layers that it is given, and :meth:`Family.grain` says
into which units a layer may be cut so that parts do not need one another. Observations arrive whitened, so that R = I.
One update is then ::

    gram, work = family.gram(P, H, nu)          summed over the parts of all ranks
    S = family.spread(gram, M) + I              (M, M)  innovation covariance H P H^T + I
    step = family.gain(P, H, gram, work, S^-1 nu)       the slice of P H^T S^-1 nu
    P = family.update(P, H, gram, work, innovation)     posterior covariance

:func:`kngd_ray.filters.update` composes them in one process, :class:`kngd_ray.sharding.ShardedFilter`
over ranks. A family whose layers are independent given S is a subclass of
:class:`~kngd_ray.filters._layerwise.Layerwise` and speaks of one layer at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from kngd_ray._deferred import Generator, Tensor
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters.jacobian import Jacobian, Layer, Part

# P by layer, as the named tensors of its family. Where a layer may be cut, dimension 0 of each tensor runs over
# the weights of the part, so that parts are joined and cut along it.
Covariance = Mapping[str, Mapping[str, Tensor]]

# What a family computed for the Gram matrix and wants to use again in the same update.
Work = Mapping[str, Any]


@runtime_checkable
class Family(Protocol):
    """A covariance family; its options are the fields of the frozen dataclass that implements it.

    Functions return new tensors and never write into their arguments, so a refused step leaves the
    belief as it was.
    """

    @property
    def kind(self) -> str:
        """The family's name in configuration files."""
        ...

    @property
    def joint(self) -> bool:
        """Whether all layers are one unit that cannot be cut."""
        ...

    @property
    def signs(self) -> int:
        """Rows of random signs that an update draws by the seed of its innovation; 0 where it draws none."""
        ...

    def grain(self, layer: Layer) -> int:
        """Rows of the layer that must stay together; layer.o if it cannot be cut."""
        ...

    def cost(self, layer: Layer) -> int:
        """Numbers in the covariance of the layer; layers are spread over ranks by them."""
        ...

    def init(self, parts: Sequence[Part], p0: float, like: Tensor) -> Covariance:
        """Prior covariance p0 I of the parts, on the device of `like`."""
        ...

    def predict(self, P: Covariance, scale: float, q: float, total: Callable[[Tensor], Tensor]) -> Covariance:
        """Time update: scale * P + q I; `total` sums a tensor over the parts of all ranks."""
        ...

    def gram(self, P: Covariance, H: Jacobian, nu: Tensor) -> tuple[Tensor, Work]:
        """What :meth:`spread` needs summed, for the observations of nu (M,) and on its device; and work to keep."""
        ...

    def spread(self, gram: Tensor, M: int) -> Tensor:
        """H P H^T (M, M) from the sum of what :meth:`gram` gave."""
        ...

    def gain(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, weights: Tensor) -> dict[str, Tensor]:
        """The parts of P H^T w, each flat, for w = S^-1 nu (M,)."""
        ...

    def update(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, innovation: Innovation) -> Covariance:
        """Posterior covariance of the parts."""
        ...

    def sample(self, P: Covariance, draws: int, generator: Generator) -> Tensor:
        """Zero-mean deviations from N(0, P), P the covariance of all layers: (draws, n)."""
        ...

    def diagonal(self, P: Covariance) -> Tensor:
        """Marginal variances, from the P of all layers: (n,)."""
        ...

    def log_det(self, P: Covariance) -> Tensor:
        """Logarithm of the determinant, for the P of all layers: scalar."""
        ...
