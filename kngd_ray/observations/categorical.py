r"""Softmax over the class prompts: the generalised Gauss-Newton matrix, exactly or with sampled labels.

The GGN of a categorical likelihood is ``J^T (diag(p) - p p^T) J`` and its gradient ``J^T (e_y - p)``.
Both are those of C pseudo-observations with unit noise: with the rows ::

    V_c = sqrt(p_c) (e_c - p)              nu_c = (e_y - p)_c / sqrt(p_c)

``V^T V = diag(p) - p p^T`` and ``V^T nu = e_y - p`` (nu is the vector of Pearson residuals). So the
Kalman gain with R = I is exactly the GGN natural-gradient step.

With ``samples = k`` the true class keeps its row and k labels drawn from the model stand for the
others (stratified, so the matrix is unbiased and the gradient exact)::

    V_y = sqrt(p_y) (e_y - p),  nu_y = 1 / sqrt(p_y)
    V_j = sqrt((1 - p_y) / k) (e_{c_j} - p),  nu_j = 0,    c_j ~ p restricted to c != y

k + 1 rows per sample instead of C.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kngd_ray._deferred import Tensor, torch
from kngd_ray.observations._model import Noisy, Observation, label_odds

_MIN_P = 1e-12


@dataclass(frozen=True, kw_only=True)
class Categorical(Noisy):
    """Rows of the softmax GGN with noise r0 (1 is the likelihood itself).

    Attributes:
        kind: the model's name.
        r0: noise variance; 1 counts each sample once, larger values temper the likelihood.
        samples: labels drawn per sample; 0 takes all C classes exactly.
    """

    # its noise is that of the likelihood: it is not estimated, and its NIS says little
    residual: ClassVar[bool] = False
    likelihood: ClassVar[float | None] = 1.0

    kind: Literal["categorical"] = "categorical"
    r0: float = 1.0
    samples: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 0:
            raise ValueError(f"samples is {self.samples}; give 0 for the exact form, or how many labels to draw")

    def rows(self, classes: int) -> int:
        """All classes, or the true one and those sampled."""
        return self.samples + 1 if self.samples else classes

    def draws(self, classes: int) -> int:
        """One per sampled label."""
        return self.samples

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(m,) negative log-likelihoods, nats."""
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """C rows per sample, or 1 + samples."""
        target = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        p = logits.softmax(1).clamp_min(_MIN_P)
        p_true = (p * target).sum(1, keepdim=True)

        def gate_residuals() -> Tensor:
            # the label's probability, whose row is p_y^1/2 times that of the true class, with noise
            # p_y (1 - p_y): in units of it, (1 + odds)^1/2 times
            odds = label_odds(p_true)
            label = torch.stack([odds.rsqrt(), (1.0 + odds).sqrt()], 2)
            if self.samples == 0:
                return label * target.unsqueeze(2)
            return torch.cat([label, label.new_zeros(len(label), self.samples, 2)], 1)

        eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
        if self.samples == 0:
            root = p.sqrt()
            nu = (target - p) / root
            cotangent = root.unsqueeze(2) * (eye.unsqueeze(0) - p.unsqueeze(1))
            channel = torch.arange(logits.shape[1], device=logits.device).expand_as(nu)
            return Observation(nu, cotangent, torch.zeros_like(nu), channel, gate_residuals)
        others = (p * (1 - target)).cumsum(1)
        total = others[:, -1:]
        # A product rounded up to the total would fall off the end, and onto the true class if that is the last.
        below = (uniforms.to(p.dtype) * total).minimum(total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(others, below, right=True).clamp_max(logits.shape[1] - 1)
        weight = ((1 - p_true).clamp_min(0) / self.samples).sqrt().unsqueeze(2)
        rows_true = (p_true.sqrt() * (target - p)).unsqueeze(1)
        rows_drawn = weight * (eye[drawn] - p.unsqueeze(1))
        nu = torch.cat([p_true.rsqrt(), torch.zeros_like(uniforms, dtype=p.dtype)], 1)
        return Observation(
            nu,
            torch.cat([rows_true, rows_drawn], 1),
            torch.zeros_like(nu),
            torch.cat([labels.unsqueeze(1), drawn], 1),
            gate_residuals,
        )
