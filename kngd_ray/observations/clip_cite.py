r"""CLIP-CITE's three terms as three observations of each sample (Liu, Li, Yu, arXiv 2407.04003).

The loss of the paper is ``L = L_DVA + lambda L_SCL + eta L_VLD`` with, over a batch of M image-text pairs of
classes y, unit embeddings z (image) and t (text of the class) and A = s z t^T ::

    L_DVA   cross-entropy of the image against all class texts, by a classifier that starts at their embeddings
    L_SCL   -1/2M sum_i [log softmax_j(A_ij) + log softmax_j(A_ji)] at j = i, other pairs of class y_i left out of
            the sums: two pictures of one class are no negatives of each other
    L_VLD    1/2M sum_i [KL(softmax_j A0_ij || softmax_j A_ij) + the same of A^T], A0 of the original towers

Each is the mean over samples of something like a negative log-likelihood, so each gives one row per sample in the
manner of :mod:`~kngd_ray.observations.log_likelihood`: innovation 1, and R in the ratio of the weights, 1 : 1/lambda :
1/eta. (A row times sqrt(lambda) with noise 1 is a row with noise 1/lambda: that is how it is computed.)

The pairs of a batch are coupled. The row of sample i is the derivative of the batch's whole sum with respect to the
embeddings of pair i alone. The rows add up to the exact gradient of the loss, so that where P is small the step is the
natural gradient of the paper's loss; what is given up is the curvature between different pairs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from kngd_ray._deferred import Tensor, torch
from kngd_ray.observations._model import Noisy, Observation, label_odds


class Pairs(NamedTuple):
    """Unit embeddings of M image-text pairs, those of the original towers last.

    Attributes:
        z: (M, d) images.
        t: (M, d) texts of their classes.
        z0: (M, d) images, by the original tower.
        t0: (M, d) texts, by the original tower.
    """

    z: Tensor
    t: Tensor
    z0: Tensor
    t0: Tensor

    @classmethod
    def of(cls, outputs: Tensor, classes: int) -> "Pairs":
        """The pairs in a network's outputs (M, C + 4 d)."""
        return cls(*outputs[:, classes:].chunk(4, 1))


class Terms(NamedTuple):
    """What a batch says of each term, as sums over its M samples.

    Attributes:
        losses: (3,) L_DVA, L_SCL and L_VLD, means over the samples.
        cotangents: three (M, C + 4 d), minus the derivatives of M times each loss with respect to the outputs.
    """

    losses: Tensor
    cotangents: tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ClipCite(Noisy):
    """Three rows per sample: classifier, contrastive pairs, distillation.

    Attributes:
        kind: the model's name.
        r0: noise variance of the classifier's row; 1 counts each sample once.
        scl: lambda, weight of the contrastive term; its noise variance is r0 / lambda.
        vld: eta, weight of the distillation; its noise variance is r0 / eta.
    """

    residual: ClassVar[bool] = False
    likelihood: ClassVar[float | None] = 1.0
    pairs: ClassVar[bool] = True

    kind: Literal["clip_cite"] = "clip_cite"
    r0: float = 1.0
    scl: float = 0.7
    vld: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scl", "vld"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; a weight must be 0 or more")

    def rows(self, classes: int) -> int:
        """Three."""
        return 3

    def observe(self, logits: Tensor, labels: Tensor, logit_scale: float, uniforms: Tensor) -> Observation:
        """Never: its observations need the pairs of the whole batch.

        Raises:
            ValueError: always.
        """
        raise ValueError("clip_cite observes pairs of images and texts; set tune.parameters to lora, norm or full")

    def observe_pairs(
        self, outputs: Tensor, labels: Tensor, logit_scale: float, own: slice, classes: int
    ) -> Observation:
        """Observations of the own samples of a batch.

        Args:
            outputs: (M, C + 4 d) of the whole batch: logits, z, t, z0, t0.
            labels: (M,) int64 true classes.
            logit_scale: s.
            own: which samples are observed here.
            classes: C.

        Returns:
            Three rows for each of the own samples.
        """
        found = terms(outputs, labels, logit_scale, classes)
        weights = outputs.new_tensor([1.0, self.scl, self.vld]).sqrt()
        cotangent = torch.stack([c[own] for c in found.cotangents], 1) * weights.view(1, 3, 1)
        mine, y = outputs[own], labels[own].unsqueeze(1)
        nu = weights + 0.0 * mine.sum(1, keepdim=True)  # a non-finite output must reach the filter, which refuses it

        def gate_residuals() -> Tensor:
            # of the classifier's row as of a log-likelihood's; a pair has no residual of its own
            odds = label_odds(mine[:, :classes].softmax(1).gather(1, y))
            form = nu.new_zeros(len(nu), 3, 2)
            form[:, :1] = torch.stack([odds.rsqrt(), odds.sqrt()], 2)
            return form

        return Observation(nu, cotangent, torch.zeros_like(nu), y.expand(-1, 3), gate_residuals)


def terms(outputs: Tensor, labels: Tensor, logit_scale: float, classes: int) -> Terms:
    """The three losses of a batch, and their derivatives with respect to the outputs.

    Args:
        outputs: (M, C + 4 d) logits, z, t, z0, t0.
        labels: (M,) int64 true classes.
        logit_scale: s.
        classes: C.

    Returns:
        Losses and cotangents; no gradient flows through them.
    """
    outputs = outputs.detach()
    logits, pairs = outputs[:, :classes], Pairs.of(outputs, classes)
    log_p = logits.log_softmax(1)
    target = torch.nn.functional.one_hot(labels, classes).to(logits.dtype)
    A, A0 = (logit_scale * (z @ t.mT) for z, t in ((pairs.z, pairs.t), (pairs.z0, pairs.t0)))
    eye = torch.eye(len(A), dtype=torch.bool, device=A.device)
    kin = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~eye
    own = eye.to(A.dtype)
    contrast = [own - a.masked_fill(kin, -torch.inf).softmax(1) for a in (A, A.mT)]
    log_likelihood = [a.masked_fill(kin, -torch.inf).log_softmax(1).diagonal() for a in (A, A.mT)]
    original, tuned = ([a.log_softmax(1), a.mT.log_softmax(1)] for a in (A0, A))
    divergence = [(q.exp() * (q - p)).sum(1) for q, p in zip(original, tuned, strict=True)]
    drift = [q.exp() - p.exp() for q, p in zip(original, tuned, strict=True)]
    losses = torch.stack([
        -(log_p * target).sum(1).mean(),
        -(log_likelihood[0] + log_likelihood[1]).mean() / 2,
        (divergence[0] + divergence[1]).mean() / 2,
    ])
    to_logits = torch.cat([target - log_p.exp(), outputs.new_zeros(len(outputs), outputs.shape[1] - classes)], 1)
    return Terms(
        losses,
        (to_logits, _through(contrast, pairs, logit_scale, classes), _through(drift, pairs, logit_scale, classes)),
    )


def _through(sides: list[Tensor], pairs: Pairs, logit_scale: float, classes: int) -> Tensor:
    """Derivative with respect to the outputs from that with respect to A, of both directions halved."""
    G = logit_scale / 2 * (sides[0] + sides[1].mT)
    zeros = G.new_zeros(len(G), classes)
    frozen = torch.zeros_like(pairs.z)
    return torch.cat([zeros, G @ pairs.t, G.mT @ pairs.z, frozen, frozen], 1)
