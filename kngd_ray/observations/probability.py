"""True-class probability: softmax probability of the label, target 1, with its Bernoulli variance."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kngd_ray._deferred import Tensor, torch
from kngd_ray.observations._model import Noisy, Observation


@dataclass(frozen=True, kw_only=True)
class Probability(Noisy):
    """h = p_y, target 1, R = p_y (1 - p_y) + r, one row per sample.

    Attributes:
        kind: the model's name.
        r0: noise variance on top of the Bernoulli variance.
    """

    likelihood: ClassVar[float | None] = 0.0

    kind: Literal["probability"] = "probability"
    r0: float = 0.1

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """One row per sample with V = p_y (e_y - p)."""
        target = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        p = logits.softmax(1)
        p_true = (p * target).sum(1, keepdim=True)
        return Observation(
            1.0 - p_true,
            (p_true * (target - p)).unsqueeze(1),
            p_true * (1.0 - p_true),
            labels.unsqueeze(1),
        )
