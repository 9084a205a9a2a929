"""The Kalman update with its covariance sharded over ranks: the same filter, placed.

:func:`kngd_ray.filters.update` with the four communications of the picture in
:mod:`~kngd_ray.sharding.ownership` in between. What is replicated (S, its Cholesky factor, the
weights w, the noise state, theta) is bitwise the same on every rank, because every rank computes
it from the same gathered numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kngd_ray.filters import Belief, Family, Innovation, ObservationNoise, Transition, solve_innovation
from kngd_ray.sharding.collectives import Group
from kngd_ray.sharding.ownership import Ownership


@dataclass(frozen=True)
class LocalRows:
    """What one rank observed of its part of the global batch.

    Attributes:
        H: (m, n) Jacobian rows.
        nu: (m,) innovations.
        base_noise: (m,) noise variances known from the likelihood.
        channel: (m,) int64 channel of the noise model.
    """

    H: Tensor
    nu: Tensor
    base_noise: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ShardedUpdate:
    """Outcome of one sharded update.

    Attributes:
        belief: mean (n,) of all weights, covariance of the own slice.
        noise: (channels,) noise state after the update.
        innovation: factored innovation of the global batch.
        nu: (M,) innovations of the global batch in rank order.
    """

    belief: Belief
    noise: Tensor
    innovation: Innovation
    nu: Tensor


class ShardedFilter:
    """A covariance family placed on a group of ranks.

    Args:
        family: the covariance family.
        noise_model: how observation noise is estimated.
        n: number of weights.
        group: the ranks.
    """

    def __init__(self, family: Family, noise_model: ObservationNoise, n: int, group: Group) -> None:
        self.family = family
        self.noise_model = noise_model
        self.group = group
        self.ownership = Ownership.balanced(family.cuts(n), group.world_size)
        self._own = self.ownership.slice(group.rank)

    def init(self, mu: Tensor, p0: float) -> Belief:
        """The prior N(mu, p0 I), of which this rank holds its slice of P."""
        return Belief(mu, self.family.init(self._own.stop - self._own.start, p0, mu))

    def predict(self, belief: Belief, transition: Transition) -> Belief:
        """Time update of the covariance slice under a process model with F = 1."""
        return Belief(belief.mu, self.family.predict(belief.covariance, transition.scale, transition.q))

    def update(self, belief: Belief, noise: Tensor, rows: LocalRows, row_sizes: Sequence[int]) -> ShardedUpdate:
        """Condition on the observations of all ranks.

        Args:
            belief: predicted belief.
            noise: (channels,) noise state.
            rows: what this rank observed; may be empty.
            row_sizes: number of observations on each rank, M in all.

        Returns:
            The posterior, the new noise state and the innovation.

        Raises:
            FilterError: non-finite innovations or an indefinite S, on every rank alike; the
                arguments are left as they were.
        """
        group, family = self.group, self.family
        # One gather for three small vectors; float64 holds channel numbers and float32 exactly.
        packed = torch.stack([rows.nu.double(), rows.base_noise.double(), rows.channel.double()], 1)
        nu, base, channel = group.gather_rows(packed, row_sizes).unbind(1)
        channel = channel.long()

        H = group.exchange_columns(rows.H, row_sizes, self.ownership.sizes)
        U = family.project(belief.covariance, H)
        gram = group.sum(H.to(U.dtype) @ U)
        nu, base = nu.to(gram.dtype), base.to(gram.dtype)
        R = base + noise.to(gram.dtype)[channel]
        predicted = gram.diagonal().clone()
        S = gram
        S.diagonal().add_(R)
        innovation = solve_innovation(S, nu)

        step = (U @ innovation.weights).to(belief.mu.dtype)
        mu = group.gather_rows(belief.mu[self._own] + step, self.ownership.sizes)
        covariance = family.update(belief.covariance, H, U, R, innovation)
        new_noise = self.noise_model.update(noise.to(gram.dtype), nu, predicted, base, channel)
        return ShardedUpdate(Belief(mu, covariance), new_noise.to(noise.dtype), innovation, nu)
