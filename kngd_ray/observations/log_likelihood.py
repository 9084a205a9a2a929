"""Log-likelihood as its own observation: the natural gradient with the empirical Fisher.

With innovation 1 and R = 1 the information form of the update adds ``sum_i grad_i grad_i^T`` to the
precision and moves the mean along ``sum_i grad_i``, grad_i = d log p(y_i | x_i) / d theta: the
linearised-Gaussian empirical-Fisher step of BONG (arXiv 2405.19681).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kngd_ray._deferred import Tensor, torch
from kngd_ray.observations._model import Noisy, Observation, label_odds


@dataclass(frozen=True, kw_only=True)
class LogLikelihood(Noisy):
    """h = log p(y | x), innovation 1, R = r0, one row per sample.

    Attributes:
        kind: the model's name.
        r0: noise variance; 1 counts each sample once, larger values temper the likelihood.
    """

    residual: ClassVar[bool] = False  # its innovation is 1 by definition: it is not estimated, and its NIS says little
    likelihood: ClassVar[float | None] = 1.0

    kind: Literal["log_likelihood"] = "log_likelihood"
    r0: float = 1.0

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(m,) negative log-likelihoods, nats."""
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """One row per sample with V = e_y - p."""
        target = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        # 1, but a non-finite logit must reach the innovation, where the filter refuses the step
        nu = 1.0 + 0.0 * logits.sum(1, keepdim=True)
        p = logits.softmax(1)
        cotangent = (target - p).unsqueeze(1)

        def gate_residuals() -> Tensor:
            # the label's probability, whose row is p times this one, with noise p (1 - p)
            odds = label_odds((p * target).sum(1, keepdim=True))
            return torch.stack([odds.rsqrt(), odds.sqrt()], 2)

        return Observation(nu, cotangent, torch.zeros_like(nu), labels.unsqueeze(1), gate_residuals)
