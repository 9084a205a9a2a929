"""CLIP-Adapter: a two-layer bottleneck mixed with the embedding (Gao et al., arXiv 2110.04544)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kngd_ray.clip.adapters._base import HeadShape, Tower

if TYPE_CHECKING:
    from kngd_ray.clip.adapters.modules import Adapter


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """z <- ratio * ReLU(W2 ReLU(W1 z)) + (1 - ratio) * z, W1 (width, d), W2 (d, width), no biases.

    Attributes:
        kind: the adapter's name.
        tower: which embeddings are adapted; ``both`` has weights of its own for each.
        width: hidden units.
        ratio: residual ratio, how much of the adapted embedding enters; 0 is zero-shot.
    """

    averages: ClassVar[bool] = False

    kind: Literal["bottleneck"] = "bottleneck"
    tower: Tower = "image"
    width: int = 64
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; a bottleneck needs at least 1 hidden unit")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; the residual ratio must lie in (0, 1]")

    def build(self, shape: HeadShape) -> "Adapter":
        """A new adapter with PyTorch's default linear initialisation."""
        from kngd_ray.clip.adapters.modules import BottleneckAdapter

        return BottleneckAdapter(self, shape)
