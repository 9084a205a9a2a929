"""Families whose layers are independent a priori and stay so: one layer at a time."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from kngd_ray._deferred import Generator, Tensor, torch
from kngd_ray.filters._family import Covariance, Work
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters.functional_mode import eager
from kngd_ray.filters.jacobian import Factors, Jacobian, Layer, Part, Rows

LayerState = Mapping[str, Tensor]


class Layered(ABC):
    """A family whose layers are independent given S, each with a covariance of its own kind."""

    joint: ClassVar[bool] = False

    @property
    @abstractmethod
    def kind(self) -> str:
        """The family's name in configuration files."""

    @property
    def signs(self) -> int:
        """Rows of random signs that an update draws by the seed of its innovation."""
        return 0

    @property
    def reach(self) -> float:
        """How many times as many numbers as rows factors may have and still be of more use."""
        return 1.0

    @abstractmethod
    def grain(self, layer: Layer) -> int:
        """Rows of the layer that must stay together."""

    @abstractmethod
    def cost(self, layer: Layer) -> int:
        """Numbers that the covariance of the layer takes."""

    @abstractmethod
    def of(self, name: str) -> "Layerwise":
        """The family of the layer of a name."""

    def init(self, parts: Sequence[Part], p0: float, like: Tensor) -> Covariance:
        """Prior covariance of each part."""
        return {part.layer.name: self.of(part.layer.name).init_layer(part, p0, like) for part in parts}

    def predict(self, P: Covariance, scale: float, q: float, total: Callable[[Tensor], Tensor]) -> Covariance:
        """Time update of each part."""
        if eager() and scale == 1.0 and q == 0.0:
            return P
        return {name: self.of(name).predict_layer(state, scale, q) for name, state in P.items()}

    def gram(self, P: Covariance, H: Jacobian, nu: Tensor) -> tuple[Tensor, Work]:
        """Sum of the layers' H P H^T."""
        done = {name: self.of(name).gram_layer(state, H[name]) for name, state in P.items()}
        shares = [share for share, _ in done.values()]
        if not shares:
            return nu.new_zeros(len(nu), len(nu), dtype=torch.promote_types(nu.dtype, torch.float32)), {}
        gram = shares[0]
        for share in shares[1:]:
            gram = gram + share
        return gram, {name: work for name, (_, work) in done.items()}

    def spread(self, gram: Tensor, M: int) -> Tensor:
        """The sum itself."""
        return gram

    def gain(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, weights: Tensor) -> dict[str, Tensor]:
        """Each layer's part."""
        return {name: self.of(name).gain_layer(state, H[name], work[name], weights) for name, state in P.items()}

    def update(self, P: Covariance, H: Jacobian, gram: Tensor, work: Work, innovation: Innovation) -> Covariance:
        """Each layer's posterior."""
        return {name: self.of(name).update_layer(state, H[name], work[name], innovation) for name, state in P.items()}

    def sample(self, P: Covariance, draws: int, generator: Generator) -> Tensor:
        """The layers' deviations side by side."""
        return torch.cat([self.of(name).sample_layer(state, draws, generator) for name, state in P.items()], 1)

    def diagonal(self, P: Covariance) -> Tensor:
        """The layers' variances one after another."""
        return torch.cat([self.of(name).diagonal_layer(state) for name, state in P.items()])

    def log_det(self, P: Covariance) -> Tensor:
        """Sum over layers."""
        return torch.stack([self.of(name).log_det_layer(state) for name, state in P.items()]).sum()


class Layerwise(Layered):
    """Composes the functions of :class:`~kngd_ray.filters.Family` from those of one layer's part."""

    def of(self, name: str) -> "Layerwise":
        """This one, whatever the layer."""
        return self

    @abstractmethod
    def init_layer(self, part: Part, p0: float, like: Tensor) -> LayerState:
        """Prior covariance p0 I."""

    @abstractmethod
    def predict_layer(self, P: LayerState, scale: float, q: float) -> LayerState:
        """Scale * P + q I."""

    @abstractmethod
    def gram_layer(self, P: LayerState, H: Factors | Rows) -> tuple[Tensor, Any]:
        """The layer's share of H P H^T (M, M), and what its update wants to use again."""

    def work_layer(self, P: LayerState, H: Factors | Rows) -> Any:
        """What :meth:`gram_layer` keeps, where it has to be computed again."""
        return self.gram_layer(P, H)[1]

    @abstractmethod
    def gain_layer(self, P: LayerState, H: Factors | Rows, work: Any, weights: Tensor) -> Tensor:
        """The layer's part of P H^T w, flat."""

    @abstractmethod
    def update_layer(self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation) -> LayerState:
        """Posterior covariance."""

    def condition_layer(
        self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation
    ) -> tuple[Tensor, LayerState]:
        """Gain and update at once, for families that share work between them."""
        return self.gain_layer(P, H, work, innovation.weights), self.update_layer(P, H, work, innovation)

    @abstractmethod
    def sample_layer(self, P: LayerState, draws: int, generator: Generator) -> Tensor:
        """(draws, size) deviations."""

    @abstractmethod
    def diagonal_layer(self, P: LayerState) -> Tensor:
        """(size,) marginal variances."""

    @abstractmethod
    def log_det_layer(self, P: LayerState) -> Tensor:
        """Logarithm of the determinant."""
