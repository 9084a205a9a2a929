"""A residual on each class's text embedding: a linear classifier that starts at the zero-shot one."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kngd_ray.clip.adapters._base import Adapter, HeadShape


@dataclass(frozen=True, kw_only=True)
class ClassResidual:
    """cosines <- cosines + z Delta^T, Delta (C, d) starting at 0.

    Not renormalised: with logit scale s, a prior variance p0 of Delta is a prior variance s^2 p0 of
    every logit.

    Attributes:
        kind: the adapter's name.
        bias: whether a constant stands beside the features, Delta (C, d + 1): a prior over functions of [z, 1] can
            measure features from any point, and so need not depend on an offset that all images share.
        centred: whether features are measured from the offset that all images share, as far as the shots tell. A prior
            of one variance a weight cannot set it apart by itself.
    """

    kind: Literal["class_residual"] = "class_residual"
    bias: bool = False
    centred: bool = False

    def build(self, shape: HeadShape) -> Adapter:
        """A new adapter that is the identity."""
        return ClassResidualAdapter(shape, bias=self.bias, centred=self.centred)


class ClassResidualAdapter(Adapter):
    """The adapter itself.

    Args:
        shape: of the head.
        bias: whether the layer sees a constant beside the features.
        centred: whether it sees them less `centre`.

    Attributes:
        delta: the one linear layer, of which the logits are a linear function.
        centre: (d,) what features are measured from, 0 until it is set; None where they are taken as they are.
    """

    centre: Tensor | None

    def __init__(self, shape: HeadShape, *, bias: bool, centred: bool = False) -> None:
        super().__init__()
        self._bias = bias
        self.register_buffer("centre", torch.zeros(shape.embed_dim) if centred else None, persistent=False)
        self.delta = nn.Linear(shape.embed_dim + bias, shape.classes, bias=False)
        torch.nn.init.zeros_(self.delta.weight)

    def inputs(self, z: Tensor) -> Tensor:
        """What the layer sees of unit image embeddings z (m, d): (m, d), or (m, d + 1) with a constant 1."""
        if self.centre is not None:
            z = z - self.centre
        return pad(z, (0, 1), value=1.0) if self._bias else z

    def cosines(self, z: Tensor, cosines: Tensor) -> Tensor:
        """Add the residual."""
        return cosines + self.delta(self.inputs(z))
