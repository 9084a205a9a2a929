"""A covariance family for most layers, and Kronecker factors for a few: a head that was fitted before its towers move.

Layers that are independent given S need not have the same family. A layer's state tells which family wrote it, and the
same family reads it.
"""

from dataclasses import dataclass
from typing import Any

from kngd_ray._deferred import Generator, Tensor
from kngd_ray.filters._innovation import Innovation
from kngd_ray.filters._layerwise import LayerState, Layerwise
from kngd_ray.filters.diagonal import Diagonal
from kngd_ray.filters.jacobian import Factors, Layer, Part, Rows
from kngd_ray.filters.kronecker import Kronecker

_FACTORS, _DIAGONAL = Kronecker(), Diagonal()


@dataclass(frozen=True)
class PerLayer(Layerwise):
    """One family for all layers except a few, which keep Kronecker factors.

    Attributes:
        base: the family of the other layers.
        factored: beginnings of the names of layers that keep Kronecker factors, whole on one rank.
    """

    base: Layerwise
    factored: tuple[str, ...]

    @property
    def kind(self) -> str:
        """As the base family has it."""
        return self.base.kind

    @property
    def reach(self) -> float:
        """As the base family has it."""
        return self.base.reach

    def _named(self, layer: Layer) -> Layerwise:
        return _FACTORS if layer.name.startswith(self.factored) else self.base

    def _of(self, P: LayerState) -> Layerwise:
        if isinstance(self.base, Kronecker):
            return self.base
        if "B" in P:
            return _FACTORS
        return _DIAGONAL if "variance" in P and not isinstance(self.base, Diagonal) else self.base

    def grain(self, layer: Layer) -> int:
        """All rows of a layer that keeps factors."""
        return layer.o if self._named(layer) is _FACTORS else self.base.grain(layer)

    def cost(self, layer: Layer) -> int:
        """As the layer's family does."""
        return self._named(layer).cost(layer)

    def init_layer(self, part: Part, p0: float, like: Tensor) -> LayerState:
        """As the layer's family does."""
        return self._named(part.layer).init_layer(part, p0, like)

    def predict_layer(self, P: LayerState, scale: float, q: float) -> LayerState:
        """As the state's family does."""
        return self._of(P).predict_layer(P, scale, q)

    def gram_layer(self, P: LayerState, H: Factors | Rows) -> tuple[Tensor, Any]:
        """As the state's family does."""
        return self._of(P).gram_layer(P, H)

    def work_layer(self, P: LayerState, H: Factors | Rows) -> Any:
        """As the state's family does."""
        return self._of(P).work_layer(P, H)

    def gain_layer(self, P: LayerState, H: Factors | Rows, work: Any, weights: Tensor) -> Tensor:
        """As the state's family does."""
        return self._of(P).gain_layer(P, H, work, weights)

    def update_layer(self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation) -> LayerState:
        """As the state's family does."""
        return self._of(P).update_layer(P, H, work, innovation)

    def condition_layer(
        self, P: LayerState, H: Factors | Rows, work: Any, innovation: Innovation
    ) -> tuple[Tensor, LayerState]:
        """As the state's family does."""
        return self._of(P).condition_layer(P, H, work, innovation)

    def sample_layer(self, P: LayerState, draws: int, generator: Generator) -> Tensor:
        """As the state's family does."""
        return self._of(P).sample_layer(P, draws, generator)

    def diagonal_layer(self, P: LayerState) -> Tensor:
        """As the state's family does."""
        return self._of(P).diagonal_layer(P)

    def log_det_layer(self, P: LayerState) -> Tensor:
        """As the state's family does."""
        return self._of(P).log_det_layer(P)
