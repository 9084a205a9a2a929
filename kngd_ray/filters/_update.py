"""One Kalman update in one process: the composition that the sharded filter must equal."""

from dataclasses import dataclass

from torch import Tensor

from kngd_ray.filters._family import Family
from kngd_ray.filters._innovation import Innovation, solve_innovation


@dataclass(frozen=True)
class Belief:
    """N(mu, P) over n weights.

    Attributes:
        mu: (n,) mean.
        covariance: P in the state form of its family; the first dimension runs over the weights.
    """

    mu: Tensor
    covariance: Tensor


def update(family: Family, belief: Belief, H: Tensor, nu: Tensor, R: Tensor) -> tuple[Belief, Innovation]:
    """Condition a belief on one batch of observations ``nu = y - h(mu)``.

    Args:
        family: covariance family of the belief.
        belief: the predicted belief N(mu-, P-).
        H: (M, n) Jacobian of h at mu-.
        nu: (M,) innovations.
        R: (M,) observation noise variances.

    Returns:
        The posterior belief, and the innovation with its evidence and NIS.
    """
    U = family.project(belief.covariance, H)
    S = H.to(U.dtype) @ U
    S.diagonal().add_(R)
    innovation = solve_innovation(S, nu)
    mu = belief.mu + (U @ innovation.weights).to(belief.mu.dtype)
    return Belief(mu, family.update(belief.covariance, H, U, R, innovation)), innovation
