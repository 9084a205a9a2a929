"""Adapters on the frozen towers' embeddings.

A new adapter is one module beside :mod:`~kngd_ray.clip.adapters.linear` and one name in
:data:`AnyAdapter`.
"""

from typing import TYPE_CHECKING

from kngd_ray._deferred import on_demand
from kngd_ray._plugins import open_registry
from kngd_ray.clip.adapters._base import AdapterConfig, HeadShape, Tower, averages
from kngd_ray.clip.adapters.bottleneck import Bottleneck
from kngd_ray.clip.adapters.class_residual import ClassResidual
from kngd_ray.clip.adapters.linear import Linear

if TYPE_CHECKING:
    from kngd_ray.clip.adapters.modules import Adapter, ClassResidualAdapter

# The registry: configuration chooses among these by `kind`, and offers the fields of each as its options.
AnyAdapter = Bottleneck | Linear | ClassResidual
open_registry(AnyAdapter, "kngd_ray.adapters")  # installed packages may add to it

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AnyAdapter",
    "Bottleneck",
    "ClassResidual",
    "ClassResidualAdapter",
    "HeadShape",
    "Linear",
    "Tower",
    "averages",
]

# They need torch, which whoever reads the settings does not.
_HOMES = {"Adapter": "modules", "ClassResidualAdapter": "modules"}

__getattr__ = on_demand(__name__, _HOMES)
