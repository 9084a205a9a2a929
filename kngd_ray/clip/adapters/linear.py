"""A residual matrix on the embedding, started at zero: the model begins as zero-shot."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kngd_ray.clip.adapters._base import Adapter, HeadShape, Tower


@dataclass(frozen=True, kw_only=True)
class Linear:
    """z <- z + W z, W (d, d) starting at 0.

    Attributes:
        kind: the adapter's name.
        tower: which embeddings are adapted; ``both`` has a matrix of its own for each.
    """

    kind: Literal["linear"] = "linear"
    tower: Tower = "image"

    def build(self, shape: HeadShape) -> Adapter:
        """A new adapter that is the identity."""
        return _LinearAdapter(self, shape)


class _LinearAdapter(Adapter):
    def __init__(self, config: Linear, shape: HeadShape) -> None:
        super().__init__()
        towers = ("image", "text") if config.tower == "both" else (config.tower,)
        self.residual = nn.ModuleDict({
            tower: nn.Linear(shape.embed_dim, shape.embed_dim, bias=False) for tower in towers
        })
        for layer in self.residual.values():
            torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]

    def image(self, z: Tensor) -> Tensor:
        return z + self.residual["image"](z) if "image" in self.residual else z

    def text(self, t: Tensor) -> Tensor:
        return t + self.residual["text"](t) if "text" in self.residual else t
