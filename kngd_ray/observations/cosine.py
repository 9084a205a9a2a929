"""Matched-pair cosine: an image and its class text should point the same way (KF-CLIP, arXiv 2511.01694)."""

from dataclasses import dataclass
from typing import Literal

from kngd_ray._deferred import Tensor, torch
from kngd_ray.observations._model import Noisy, Observation


@dataclass(frozen=True, kw_only=True)
class Cosine(Noisy):
    """h = cos(image, text of its class) = l_y / s, target 1, one row per sample.

    With logit scale s a sample pulls its own logit by ``(1 - cos) / (s R)``. A given R is a weak pull on one CLIP and a
    strong one on another; ``R = r0 / s`` is the same pull ``(1 - cos) / r0`` on each.

    Attributes:
        kind: the model's name.
        r0: noise variance.
        per: ``cosine`` takes it as R; ``logit`` takes R = r0 / s.
    """

    kind: Literal["cosine"] = "cosine"
    r0: float = 0.1
    per: Literal["cosine", "logit"] = "cosine"

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """One row per sample with V = e_y / s, or that times the root of s."""
        unit = 1.0 if self.per == "cosine" else logit_scale**0.5
        target = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        nu = unit - (logits * target).sum(1, keepdim=True) * (unit / logit_scale)
        V = target * (unit / logit_scale)
        return Observation(nu, V.unsqueeze(1), torch.zeros_like(nu), labels.unsqueeze(1))
