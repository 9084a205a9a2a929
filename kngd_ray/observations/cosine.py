"""Matched-pair cosine: an image and its class text should point the same way (KF-CLIP, arXiv 2511.01694)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kngd_ray.observations._model import Noisy, Observation


@dataclass(frozen=True, kw_only=True)
class Cosine(Noisy):
    """h = cos(image, text of its class) = l_y / s, target 1, one row per sample.

    Attributes:
        kind: the model's name.
        r0: noise variance of a cosine.
    """

    kind: Literal["cosine"] = "cosine"
    r0: float = 0.1

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """One row per sample with V = e_y / s."""
        target = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        nu = 1.0 - (logits * target).sum(1, keepdim=True) / logit_scale
        return Observation(nu, (target / logit_scale).unsqueeze(1), torch.zeros_like(nu), labels.unsqueeze(1))
