"""One Kalman update in one process: the reference that the sharded filter is tested against."""

from collections.abc import Callable
from dataclasses import dataclass

from kngd_ray._deferred import Tensor, torch
from kngd_ray.filters._family import Covariance, Family
from kngd_ray.filters._innovation import Innovation, solve_innovation
from kngd_ray.filters.jacobian import Jacobian

_ROWS = 64  # at once: all pairs of them are computed, and only the diagonal is wanted


@dataclass(frozen=True)
class Belief:
    """N(mu, P) over n weights.

    Attributes:
        mu: (n,) mean.
        covariance: P in the form of its family.
    """

    mu: Tensor
    covariance: Covariance


def update(family: Family, belief: Belief, H: Jacobian, nu: Tensor) -> tuple[Belief, Innovation]:
    """Condition a belief on one batch of whitened observations ``nu = y - h(mu)``, R = I.

    Args:
        family: covariance family of the belief.
        belief: the predicted belief N(mu-, P-).
        H: Jacobian of h at mu-, the layers in the order of mu.
        nu: (M,) innovations.

    Returns:
        The posterior belief, and the innovation with its evidence and NIS.
    """
    P = belief.covariance
    gram, work = family.gram(P, H, nu)
    innovation = solve_innovation(innovation_covariance(family.spread(gram, len(nu))), nu)
    step = family.gain(P, H, gram, work, innovation.weights)
    mu = belief.mu + torch.cat(list(step.values())).to(belief.mu.dtype)
    return Belief(mu, family.update(P, H, gram, work, innovation)), innovation


def innovation_covariance(predicted: Tensor, noise: float = 1.0) -> Tensor:
    """S = H P H^T + noise I.

    Args:
        predicted: (M, M) H P H^T.
        noise: variance of the whitened observations.

    Returns:
        (M, M) S.
    """
    S = predicted.clone()
    S.diagonal().add_(noise)
    return S


def variances(
    family: Family,
    P: Covariance,
    H: Jacobian,
    like: Tensor,
    total: Callable[[Tensor], Tensor] = lambda share: share,
) -> Tensor:
    """diag(H P H^T), the variance that a belief gives each row, a few samples at a time.

    Args:
        family: covariance family of the belief.
        P: its covariance, or the parts that a rank holds.
        H: Jacobian, of the same parts.
        like: (s, k) of the dtype and device of the result: s samples, k rows of each.
        total: sums what the parts of all ranks give.

    Returns:
        (s, k) variances.
    """
    s, k = like.shape
    chunk = max(1, _ROWS // k)
    found = []
    for start in range(0, s, chunk):
        stop = min(start + chunk, s)
        rows = (stop - start) * k
        share, _ = family.gram(P, {name: piece.take(start, stop, k) for name, piece in H.items()}, like.new_zeros(rows))
        found.append(family.spread(total(share), rows).diagonal().view(-1, k))
    return torch.cat(found).to(like.dtype) if found else like
