"""A residual on each class's text embedding: a linear classifier that starts at the zero-shot one."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kngd_ray.clip.adapters._base import Adapter, HeadShape


@dataclass(frozen=True, kw_only=True)
class ClassResidual:
    """cosines <- cosines + z Delta^T, Delta (C, d) starting at 0.

    Not renormalised: with logit scale s, a prior variance p0 of Delta is a prior variance s^2 p0 of
    every logit.

    Attributes:
        kind: the adapter's name.
    """

    kind: Literal["class_residual"] = "class_residual"

    def build(self, shape: HeadShape) -> Adapter:
        """A new adapter that is the identity."""
        return _ClassResidualAdapter(shape)


class _ClassResidualAdapter(Adapter):
    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.delta = nn.Linear(shape.embed_dim, shape.classes, bias=False)
        torch.nn.init.zeros_(self.delta.weight)

    def cosines(self, z: Tensor, cosines: Tensor) -> Tensor:
        return cosines + self.delta(z)
