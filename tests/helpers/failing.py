"""A fit that fails on one rank only, in the middle, while the others wait for it."""

import os
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from kngd_ray.errors import StorageError
from kngd_ray.training.batches import Support


@dataclass(frozen=True)
class FailsOnOneRank(Support):
    """Shots of which one rank gets only so many batches.

    Attributes:
        rank: the rank that fails.
        reason: ``ValueError`` and ``StorageError`` are raised; ``death`` ends the process at once.
        batches: how many it gets.
        given: what it was given.
    """

    rank: int = 1
    reason: str = "ValueError"
    batches: int = 3
    given: list[int] = field(default_factory=list)

    def to(self, device: object) -> "FailsOnOneRank":
        """Itself, so that it stays of its kind."""
        return self

    def subset(self, keep: Tensor) -> Support:
        """A batch, or the failure."""
        self.given.append(len(keep))
        if dist.get_rank() == self.rank and len(self.given) > self.batches:
            if self.reason == "death":
                os._exit(7)
            raise {"ValueError": ValueError, "StorageError": StorageError}[self.reason]("a distinctive reason.")
        return super().subset(keep)
