"""What fails on one rank only, in the middle, while the others wait for it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
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


class FailsToFactor:
    """A covariance family of which one function meets a matrix that does not factor, once.

    Args:
        family: does the rest.
        function: name of the function that fails.
        calls: how often it goes well before.
    """

    def __init__(self, family: Any, function: str, calls: int = 0) -> None:
        self._family = family
        self._function = function
        self._left = calls

    def __getattr__(self, name: str) -> Any:
        """The family's own, or its failing stand-in."""
        whole = getattr(self._family, name)
        return self._failing(whole) if name == self._function else whole

    def _failing(self, whole: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            if args[0]:  # a rank without parts has nothing to factor
                self._left -= 1
                if self._left == -1:
                    raise torch.linalg.LinAlgError("linalg.cholesky: a distinctive reason.")
            return whole(*args)

        return function
