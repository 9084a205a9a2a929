r"""Who owns which slice of the covariance.

The n weights are one vector, parameters in registration order. Rank r holds all of theta and the
covariance of its own contiguous slice, cut where the covariance family allows::

               layer1.weight        layer2.weight      delta
    theta   |-------------------|------------------|---------|   on every rank
    P       |#############|::::::::::::::|%%%%%%%%%%%%%%%%%%%|
             rank 0        rank 1         rank 2
    bounds  0             b1             b2                  n

    step    local rows  H_local (m_r, n)     cut by columns at the bounds
            exchange    all_to_all           every rank now has H_r (M, n_r), its columns for all M rows
            S           = sum_r H_r P_r H_r^T + R      one all_reduce of (M, M)
            theta_r     += P_r H_r^T S^-1 nu           one all_gather of the slices

The same picture holds for samples: the global batch is cut into contiguous runs, so that rows
gathered in rank order are in the order of the global batch, whatever the number of ranks.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def split_evenly(total: int, world_size: int) -> list[int]:
    """Sizes of `world_size` contiguous runs of `total` items, the longer ones first.

    Args:
        total: number of items.
        world_size: number of runs.

    Returns:
        Sizes that sum to total and differ by at most 1; zeros when there are too few items.
    """
    quotient, remainder = divmod(total, world_size)
    return [quotient + (rank < remainder) for rank in range(world_size)]


@dataclass(frozen=True)
class Ownership:
    """Contiguous slices of n weights over ranks.

    Attributes:
        bounds: world_size + 1 increasing positions from 0 to n; rank r owns [bounds[r], bounds[r+1]).
    """

    bounds: tuple[int, ...]

    @classmethod
    def balanced(cls, cuts: Sequence[int], world_size: int) -> "Ownership":
        """Slices as equal as the allowed cuts permit; a rank may own nothing.

        Args:
            cuts: where the covariance family may be cut, increasing from 0 to n.
            world_size: number of ranks.

        Returns:
            The ownership whose bounds are the allowed cuts nearest to equal shares.
        """
        n = cuts[-1]
        bounds = [0]
        for rank in range(1, world_size):
            ideal = n * rank / world_size
            at = min(bisect_left(cuts, ideal), len(cuts) - 1)
            before = cuts[max(at - 1, 0)]
            nearest = before if ideal - before < cuts[at] - ideal else cuts[at]
            bounds.append(max(nearest, bounds[-1]))
        return cls((*bounds, n))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.bounds) - 1

    @property
    def sizes(self) -> list[int]:
        """Number of weights that each rank owns."""
        return [self.bounds[r + 1] - self.bounds[r] for r in range(self.world_size)]

    def slice(self, rank: int) -> slice:
        """The weights of a rank, as a slice of the flat vector."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def pieces(self, rank: int, parameters: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Which part of which named parameter a rank owns.

        Args:
            rank: the rank.
            parameters: number of weights of each parameter, in flat order.

        Returns:
            (start, stop) within each parameter that the rank owns a part of, in flat order.
        """
        low, high = self.bounds[rank], self.bounds[rank + 1]
        owned, offset = {}, 0
        for name, size in parameters.items():
            start, stop = max(low - offset, 0), min(high - offset, size)
            if start < stop:
                owned[name] = (start, stop)
            offset += size
        return owned
