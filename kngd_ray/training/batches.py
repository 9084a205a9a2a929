"""Which samples a step sees: a function of seed and step alone, the same for any number of ranks."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kngd_ray.sharding import split_evenly


class Shots(Protocol):
    """Labelled samples, of which a fit's batches are made and which predictions are made for.

    Attributes:
        labels: (N,) int64 classes.
    """

    @property
    def labels(self) -> Tensor:
        """(N,) int64 classes."""
        ...

    @property
    def inputs(self) -> Any:
        """The inputs of a predictor."""
        ...

    def __len__(self) -> int: ...

    def subset(self, keep: Tensor) -> Self:
        """The shots that a boolean or index tensor selects."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on another device, as far as they are in memory."""
        ...

    def digest(self) -> bytes:
        """A few bytes that identify these samples."""
        ...


@dataclass(frozen=True)
class Support:
    """Shots as frozen features.

    Attributes:
        features: (N, d) unit image embeddings.
        labels: (N,) int64 classes.
        crops: (N, V, d) unit embeddings of crops of each picture, V at least 1; None without. They are views of the
            picture that are learned from beside it; what is held out or predicted is the picture as it is.
    """

    features: Tensor
    labels: Tensor
    crops: Tensor | None = None

    @property
    def views(self) -> int:
        """Of a picture: itself and its crops."""
        return 1 if self.crops is None else 1 + self.crops.shape[1]

    @property
    def inputs(self) -> Tensor:
        """(N, d) the features."""
        return self.features

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> bytes:
        """Hash of features, labels and crops."""
        sha = hashlib.sha256()
        for tensor in (self.features, self.labels, *(() if self.crops is None else (self.crops,))):
            sha.update(tensor.cpu().contiguous().numpy().tobytes())
        return sha.digest()

    def subset(self, keep: Tensor) -> "Support":
        """The shots that a boolean or index tensor selects."""
        return Support(self.features[keep], self.labels[keep], None if self.crops is None else self.crops[keep])

    def to(self, device: torch.device | str) -> "Support":
        """The same shots on another device."""
        crops = None if self.crops is None else self.crops.to(device)
        return Support(self.features.to(device), self.labels.to(device), crops)

    def whole(self) -> "Support":
        """The whole pictures, without crops."""
        return self if self.crops is None else replace(self, crops=None)

    def view(self, number: int) -> "Support":
        """One view of each picture: 0 is the picture as it is, the others are crops."""
        if self.crops is None or not number:
            return self.whole()
        return Support(self.crops[:, number - 1], self.labels)

    def all_views(self) -> "Support":
        """All views of each picture as samples, a picture's views one after another."""
        if self.crops is None:
            return self
        views = torch.cat([self.features.unsqueeze(1), self.crops.to(self.features)], 1)
        return Support(views.flatten(0, 1), self.labels.repeat_interleave(self.views))


@dataclass(frozen=True)
class Batch:
    """One rank's run of a global batch.

    Attributes:
        inputs: (m, d) local features; of pictures what a network takes, each with m samples in dimension 0.
        labels: (m,) local labels.
        sizes: samples of the global batch on each rank.
        rank: whose run this is.
        step: number of the step, from 0.
        scored: whether its labels are to be predicted before they are learned from; see ``BatchSampler``.
        shots: (m,) numbers of the local samples among the shots; None where they are not shots.
    """

    inputs: Any
    labels: Tensor
    sizes: Sequence[int]
    rank: int
    step: int
    scored: bool = False
    shots: Tensor | None = None

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
        batch_size: global batch size, 0 for all shots; the last batch of an epoch, and before each of `ends`, may be
            smaller.
        epochs: passes over the shots.
        seed: of the shuffles; each epoch has its own.
        prequential: take each batch of the first epoch `epochs` times running before the next one: the same steps in
            another order, in which every batch except the first is met by a fit that has learned from all batches
            before it.
        in_order: take the shots in the order in which they are, without shuffling them.
        ends: numbers of shots, rising, after which no batch goes on.
        all_views: give all views of each picture at once, as samples; otherwise a different one in each epoch, first
            the picture as it is.
    """

    def __init__(
        self,
        support: Shots,
        batch_size: int,
        epochs: int,
        seed: int,
        *,
        prequential: bool = False,
        in_order: bool = False,
        ends: Sequence[int] = (),
        all_views: bool = False,
    ) -> None:
        self.support = support
        self.seed = seed
        batch_size = batch_size or max(len(support), 1)
        self.batch_size = batch_size
        self._bounds = [0]
        for end in (*ends, len(support)):
            starts = range(self._bounds[-1], end, batch_size)
            self._bounds += [min(start + batch_size, end) for start in starts]
        self.steps_per_epoch = len(self._bounds) - 1
        self.steps = self.steps_per_epoch * epochs
        self._repeats = epochs if prequential else 0
        self._in_order = in_order
        self._all_views = all_views
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The part of step `step` (from 0) that rank `rank` of `world_size` sees, of shots in memory."""
        assert isinstance(self.support, Support)
        chosen = self.chosen(step, rank, world_size)
        part = self.support.subset(chosen.local.to(self.support.labels.device))
        views = part.views
        if self._all_views and views > 1:
            part = part.all_views()
            batch = chosen.batch(part.features, part.labels)
            return replace(batch, sizes=[views * size for size in chosen.sizes], shots=None)
        part = part.view(chosen.turn % views)
        return chosen.batch(part.features, part.labels)

    @property
    def cut_short(self) -> list[int]:
        """How many shots come before each batch that is not the last and yet smaller than others, and with it."""
        return [end for start, end in pairwise(self._bounds[:-1]) if end - start < self.batch_size]

    def before(self, step: int) -> int:
        """How many shots come before those of a step, in their order of batches that are taken once or in turns."""
        return self._bounds[step // self._repeats if self._repeats else step]

    def chosen(self, step: int, rank: int = 0, world_size: int = 1) -> "Chosen":
        """Which shots those are."""
        epoch, position = (0, step // self._repeats) if self._repeats else divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            count = len(self.support)
            shuffled = None if self._in_order else torch.randperm(count, generator=seeded(self.seed, epoch))
            self._epoch, self._order = epoch, torch.arange(count) if shuffled is None else shuffled
        picked = self._order[self._bounds[position] : self._bounds[position + 1]]
        sizes = split_evenly(len(picked), world_size)
        turn = step % self._repeats if self._repeats else epoch
        return Chosen(picked.split(sizes)[rank], sizes, rank, step, turn, bool(self._repeats) and turn == 0)


@dataclass(frozen=True)
class Chosen:
    """The shots of one rank's run of a global batch, before they are loaded.

    Attributes:
        local: (m,) indices of the shots, on the CPU.
        sizes: samples of the global batch on each rank.
        rank: whose run this is.
        step: number of the step, from 0.
        turn: how often these shots have been learned from before.
        scored: as of a ``Batch``.
    """

    local: Tensor
    sizes: Sequence[int]
    rank: int
    step: int
    turn: int
    scored: bool

    def batch(self, inputs: Tensor | Mapping[str, Tensor], labels: Tensor) -> Batch:
        """The batch, of the shots' inputs and labels."""
        return Batch(inputs, labels, self.sizes, self.rank, self.step, self.scored, self.local)


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
