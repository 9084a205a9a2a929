"""What the gradient methods minimise: a loss, as its gradient with respect to a network's outputs.

A new loss is one class here or a module beside it, and one name in :data:`Loss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kngd_ray._deferred import Tensor, functional, torch
from kngd_ray.observations.clip_cite import terms

if TYPE_CHECKING:
    from kngd_ray.sharding import Group
    from kngd_ray.training.batches import Batch


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Mean cross-entropy of the class logits.

    Attributes:
        kind: the loss's name.
    """

    pairs: ClassVar[bool] = False
    kind: Literal["cross_entropy"] = "cross_entropy"

    def gradient(self, outputs: Tensor, batch: Batch, group: Group, logit_scale: float, classes: int) -> Tensor:
        """Derivative of the loss of the global batch with respect to the local outputs.

        Args:
            outputs: (m, D) local outputs, the logits first.
            batch: the local part of the batch.
            group: the ranks.
            logit_scale: s, the factor from cosines to logits.
            classes: C.

        Returns:
            (m, D) gradient.
        """
        found = torch.zeros_like(outputs)
        logits = outputs[:, :classes].detach()
        found[:, :classes] = (
            logits.softmax(1) - functional.one_hot(batch.labels, classes).to(logits.dtype)
        ) / batch.total
        return found


@dataclass(frozen=True, kw_only=True)
class ClipCiteLoss:
    """L_DVA + scl L_SCL + vld L_VLD of CLIP-CITE (arXiv 2407.04003); see :mod:`kngd_ray.observations.clip_cite`.

    The pairs of all ranks are each other's negatives.

    Attributes:
        kind: the loss's name.
        scl: lambda, weight of the contrastive term.
        vld: eta, weight of the distillation from the original model.
    """

    pairs: ClassVar[bool] = True
    kind: Literal["clip_cite"] = "clip_cite"
    scl: float = 0.7
    vld: float = 0.1

    def __post_init__(self) -> None:
        for name in ("scl", "vld"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be 0 or more")

    def gradient(self, outputs: Tensor, batch: Batch, group: Group, logit_scale: float, classes: int) -> Tensor:
        """As of :class:`CrossEntropy`, of outputs (m, C + 4 d)."""
        everyone = group.gather_rows(outputs.detach(), batch.sizes)
        labels = group.gather_rows(batch.labels, batch.sizes)
        dva, scl, vld = terms(everyone, labels, logit_scale, classes).cotangents
        return -(dva + self.scl * scl + self.vld * vld)[batch.own] / batch.total


Loss = CrossEntropy | ClipCiteLoss
