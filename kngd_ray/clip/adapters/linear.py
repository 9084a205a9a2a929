"""A residual matrix on the embedding, started at zero: the model begins as zero-shot."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kngd_ray.clip.adapters._base import HeadShape, Tower

if TYPE_CHECKING:
    from kngd_ray.clip.adapters.modules import Adapter


@dataclass(frozen=True, kw_only=True)
class Linear:
    """z <- z + W z, W (d, d) starting at 0.

    Attributes:
        kind: the adapter's name.
        tower: which embeddings are adapted; ``both`` has a matrix of its own for each.
    """

    averages: ClassVar[bool] = True

    kind: Literal["linear"] = "linear"
    tower: Tower = "image"

    def build(self, shape: HeadShape) -> "Adapter":
        """A new adapter that is the identity."""
        from kngd_ray.clip.adapters.modules import LinearAdapter

        return LinearAdapter(self, shape)
