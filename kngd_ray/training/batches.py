"""Which samples a step sees: a function of seed and step alone, the same for any number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kngd_ray.sharding import split_evenly


@dataclass(frozen=True)
class Support:
    """The training shots as frozen features.

    Attributes:
        features: (N, d) unit image embeddings.
        labels: (N,) int64 classes.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, keep: Tensor) -> "Support":
        """The shots that a boolean or index tensor selects."""
        return Support(self.features[keep], self.labels[keep])

    def to(self, device: torch.device | str) -> "Support":
        """The same shots on another device."""
        return Support(self.features.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Batch:
    """One rank's run of a global batch.

    Attributes:
        features: (m, d) local features.
        labels: (m,) local labels.
        sizes: samples of the global batch on each rank.
        rank: whose run this is.
        step: number of the step, from 0.
        scored: whether its labels are to be predicted before they are learned from; see ``BatchSampler``.
    """

    features: Tensor
    labels: Tensor
    sizes: Sequence[int]
    rank: int
    step: int
    scored: bool = False

    @property
    def total(self) -> int:
        """Samples in the global batch."""
        return sum(self.sizes)

    @property
    def own(self) -> slice:
        """Where the local run lies in the global batch."""
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])


class BatchSampler:
    """Epochs of shuffled batches, addressable by step so that a resumed run needs no sampler state.

    Args:
        support: the training shots.
        batch_size: global batch size; the last batch of an epoch may be smaller.
        epochs: passes over the shots.
        seed: of the shuffles; each epoch has its own.
        prequential: take each batch of the first epoch `epochs` times running before the next one: the same steps in
            another order, in which every batch but the first is met by a fit that has learned all those before it.
    """

    def __init__(self, support: Support, batch_size: int, epochs: int, seed: int, *, prequential: bool = False) -> None:
        self._support = support
        self._batch_size = batch_size
        self._seed = seed
        self.steps_per_epoch = -(-len(support) // batch_size)
        self.steps = self.steps_per_epoch * epochs
        self._repeats = epochs if prequential else 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of step `step` (from 0) that rank `rank` of `world_size` sees."""
        epoch, position = (0, step // self._repeats) if self._repeats else divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                torch.randperm(len(self._support), generator=seeded(self._seed, epoch)),
            )
        chosen = self._order[position * self._batch_size : (position + 1) * self._batch_size]
        sizes = split_evenly(len(chosen), world_size)
        local = chosen.split(sizes)[rank].to(self._support.labels.device)
        part = self._support.subset(local)
        return Batch(part.features, part.labels, sizes, rank, step, bool(self._repeats) and step % self._repeats == 0)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the numbers alone.

    Args:
        *numbers: non-negative, each below 2^32: seed, epoch or step, purpose.

    Returns:
        The generator.
    """
    mixed = 0
    for number in numbers:
        # splitmix64's multiplier keeps neighbouring (seed, step) pairs far apart
        mixed = ((mixed ^ (number + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**63
    return torch.Generator().manual_seed(mixed)
