"""A covariance family for most layers, and Kronecker factors for a head that was fitted before its towers move."""

from dataclasses import dataclass

from kngd_ray.filters._layerwise import Layered, Layerwise
from kngd_ray.filters.jacobian import Layer
from kngd_ray.filters.kronecker import Kronecker

_FACTORS = Kronecker()


@dataclass(frozen=True)
class PerLayer(Layered):
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

    def of(self, name: str) -> Layerwise:
        """The family of the layer of a name."""
        return _FACTORS if name.startswith(self.factored) else self.base

    def grain(self, layer: Layer) -> int:
        """All rows of a layer that keeps factors."""
        return layer.o if layer.name.startswith(self.factored) else self.base.grain(layer)

    def cost(self, layer: Layer) -> int:
        """As the layer's family does."""
        return self.of(layer.name).cost(layer)
