r"""What a softmax posterior would be without one of its samples, in closed form: nothing is fitted again.

A product B' (x) A' at the mode has ``A'^-1 = b A^-1 + sum_n s^2 / (r o) tr(H_n B') x_n x_n^T``, see
:mod:`~kngd_ray.filters.softmax`. Without sample n its own term goes, and where the prior's A was measured on the
samples, so does what n told of it: a change of A^-1 by a few vectors. The variance along x_n is then Woodbury's ::

    A'_-n^-1 = A'^-1 + E D E^T          x^T A'_-n x = x^T A' x - x^T A' E (I + D E^T A' E)^-1 D E^T A' x

What B' and the other samples' curvatures would change by is left out; against fits that lack the sample the variances
agree within a few percent.
"""

from dataclasses import dataclass

from kngd_ray._deferred import Tensor, torch
from kngd_ray.filters.softmax import Classified

_AT_ONCE = 1024  # samples


@dataclass(frozen=True)
class PriorWithout:
    """How the precision A^-1 of a prior that was measured on samples changes without each: + sum_k w_k e_k e_k^T.

    Attributes:
        vectors: (N, k, i) e.
        weights: (N, k) w.
    """

    vectors: Tensor
    weights: Tensor

    @classmethod
    def unchanged(cls, x: Tensor) -> "PriorWithout":
        """Of a prior that no sample has told of, for inputs (N, i)."""
        return cls(x.new_zeros(len(x), 0, x.shape[1]), x.new_zeros(len(x), 0))


def spread_left_out(
    prior: tuple[Tensor, Tensor], posterior: tuple[Tensor, Tensor], at_mode: Classified, without: PriorWithout
) -> Tensor:
    """Variance along each sample's own input, of a posterior that lacks the sample.

    Args:
        prior: B (o, o) and A (i, i).
        posterior: B' and A'.
        at_mode: the samples, their logits those at the mode.
        without: how the prior changes.

    Returns:
        (N,) s^2 x_n^T A'_-n x_n in float64: its logits have this times B' as their joint covariance.
    """
    (B0, _), (B, A) = ((P.double() for P in pair) for pair in (prior, posterior))
    b = torch.linalg.solve(B0, B).trace() / len(B)
    weight = at_mode.scale**2 / (at_mode.noise * len(B))
    found = []
    for x, logits, vectors, weights in zip(
        *(part.split(_AT_ONCE) for part in (at_mode.x, at_mode.logits, without.vectors, without.weights)), strict=True
    ):
        p = logits.double().softmax(1)
        own = weight * (p @ B.diagonal() - ((p @ B) * p).sum(1))
        E = torch.cat([x.double().unsqueeze(1), vectors.double()], 1)
        D = torch.cat([-own.unsqueeze(1), b * weights.double()], 1)
        K = E @ A @ E.mT
        seen = K[:, :, :1]  # E^T A' x
        identity = torch.eye(E.shape[1], dtype=K.dtype, device=K.device)
        inner = torch.linalg.solve(identity + D.unsqueeze(2) * K, D.unsqueeze(2) * seen)
        found.append(K[:, 0, 0] - (seen * inner).sum((1, 2)))
    return at_mode.scale**2 * torch.cat(found).clamp_min(0)
