r"""Who owns which part of the covariance.

The n weights are one vector, parameters in registration order. Rank r holds all of theta and the
covariance of its own contiguous slice, cut where the covariance family allows::

               layer1.weight        layer2.weight      delta
    theta   |-------------------|------------------|---------|   on every rank
    P       |#############|::::::::::::::|%%%%%%%%%%%%%%%%%%%|
             rank 0        rank 1         rank 2
    bounds  0             b1             b2                  n

    step    factors         g (m, o), x (m, i) of each layer, of the local m samples
            exchange        all_to_all        every rank now has, of all M, the factors of its own rows of each layer
                                              (or the rows themselves, where those are fewer bytes)
            S               = sum_r H_r P_r H_r^T + I         one all_reduce of (M, M)
            theta_r         += P_r H_r^T S^-1 nu              one all_gather of the slices
            P_r             from its own factors and S        nothing moves

The same picture holds for samples: the global batch is cut into contiguous runs, so that rows
gathered in rank order are in the order of the global batch, whatever the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kngd_ray.filters import Family, Layer, Part


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
    """Contiguous slices of the layers' weights over ranks.

    Attributes:
        layers: all layers, in the order of theta.
        bounds: world_size + 1 increasing positions from 0 to n; rank r owns [bounds[r], bounds[r+1]).
    """

    layers: tuple[Layer, ...]
    bounds: tuple[int, ...]

    @classmethod
    def balanced(cls, family: Family, layers: Sequence[Layer], world_size: int) -> "Ownership":
        """Slices whose covariances cost as equally as the family's units permit; a rank may own nothing.

        Args:
            family: says what a layer costs and into which units it may be cut.
            layers: all layers, in the order of theta.
            world_size: number of ranks.

        Returns:
            The ownership whose bounds are the allowed cuts nearest to equal shares.
        """
        n = sum(layer.size for layer in layers)
        total = sum(family.cost(layer) for layer in layers)
        bounds = [0]
        for rank in range(1, world_size):
            share = total * rank / world_size
            cut = (0 if share < total / 2 else n) if family.joint else _nearest_cut(family, layers, share)
            bounds.append(max(cut, bounds[-1]))
        return cls(tuple(layers), (*bounds, n))

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

    @cached_property
    def parts(self) -> list[list[Part]]:
        """For each rank, the parts of layers that it owns, in the order of theta."""
        return [self._parts(*self.bounds[rank : rank + 2]) for rank in range(self.world_size)]

    def _parts(self, low: int, high: int) -> list[Part]:
        owned, offset = [], 0
        for layer in self.layers:
            start, stop = max(low - offset, 0), min(high - offset, layer.size)
            if start < stop:
                owned.append(Part(layer, start // layer.i, stop // layer.i))
            offset += layer.size
        return owned


def _nearest_cut(family: Family, layers: Sequence[Layer], share: float) -> int:
    """The allowed position whose cost on its left is nearest to the share."""
    position, cost = 0, 0.0
    for layer in layers:
        whole = family.cost(layer)
        if cost + whole >= share:
            grain = family.grain(layer)
            wanted = (share - cost) / whole * layer.o
            left = int(wanted // grain) * grain
            right = min(left + grain, layer.o)
            return position + (right if right - wanted < wanted - left else left) * layer.i  # ties go left
        position, cost = position + layer.size, cost + whole
    return position
