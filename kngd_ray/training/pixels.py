"""Pictures to predict for: whatever gives its pixels a batch at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kngd_ray.data import ImageSet
from kngd_ray.training.decoding import stream
from kngd_ray.training.pictures import Transform


class Pixels(Protocol):
    """Pictures, none of which needs to be in memory."""

    def pixels(self, transform: Transform) -> Iterator[Tensor]:
        """What an image tower takes of all of them in order, a batch (b, 3, H, W) at a time."""
        ...


@dataclass(frozen=True)
class TestPictures:
    """Labelled pictures of a data set.

    Attributes:
        images: the data set.
        rows: (N,) which of its pictures, ascending, as they are read; a ValueError refuses others, whose labels would
            be those of other pictures.
    """

    __test__ = False  # the name means something else to pytest

    images: ImageSet
    rows: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if (np.diff(self.rows) <= 0).any():
            raise ValueError("rows of test pictures must ascend, since they are read in the data set's order")

    @cached_property
    def labels(self) -> Tensor:
        """(N,) int64 classes."""
        return torch.from_numpy(self.images.labels[self.rows].copy())

    @property
    def inputs(self) -> "TestPictures":
        """Themselves: a network's predictor reads the pixels."""
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, keep: Tensor) -> "TestPictures":
        """The pictures that a boolean or ascending index tensor selects."""
        return TestPictures(self.images, self.rows[keep.numpy()])

    def to(self, device: torch.device | str) -> "TestPictures":
        """Themselves: they are read from their files."""
        return self

    def digest(self) -> bytes:
        """Their content keys, joined."""
        return self.images.keys[self.rows].tobytes()

    def pixels(self, transform: Transform) -> Iterator[Tensor]:
        """What an image tower takes of all of them in order, a batch (b, 3, H, W) at a time."""
        for _, pixels in stream(self.images, self.rows, transform):
            yield pixels
