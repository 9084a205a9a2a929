"""A residual on each class's text embedding: a linear classifier that starts at the zero-shot one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kngd_ray.clip.adapters._base import HeadShape

if TYPE_CHECKING:
    from kngd_ray.clip.adapters.modules import Adapter


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

    averages: ClassVar[bool] = True

    kind: Literal["class_residual"] = "class_residual"
    bias: bool = False
    centred: bool = False

    def build(self, shape: HeadShape) -> "Adapter":
        """A new adapter that is the identity."""
        from kngd_ray.clip.adapters.modules import ClassResidualAdapter

        return ClassResidualAdapter(shape, bias=self.bias, centred=self.centred)
