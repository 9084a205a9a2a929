"""Shots as pictures in a file, read at random and augmented.

A sample's crop is a function of the fit's seed, the turn and the number of the picture. It depends neither on the
ranks, nor on the threads, nor on the step at which a run was resumed.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from kngd_ray.data import PictureFile, decode
from kngd_ray.training.batches import seeded

Transform = Callable[[Image.Image], Tensor]
"""An RGB picture to what the image tower takes (3, H, W), always the same."""
Augment = Callable[[Image.Image, torch.Generator], Tensor]
"""The same, drawn from a generator."""
Numbers = tuple[int, ...]
"""What a sample's generator is seeded with; see ``augmentation``."""
Sample = tuple[int, Numbers]
"""Number of a picture among the shots, and of its generator."""

_CROPS = 3  # sets these streams apart from shuffles and sampled labels
Prepare = Callable[[bytes, str, Numbers], Tensor]
"""See :func:`preparation`."""
_BLANK = b"P6 64 64 255 " + bytes(3 * 64 * 64)


def augmentation(seed: int, turn: int, index: int) -> Numbers:
    """What the generator of one sample is seeded with.

    Args:
        seed: of the fit.
        turn: how often the picture was learned from before: the epoch, or the repeat of a batch that is taken several
            times running.
        index: number of the picture among the shots.

    Returns:
        Numbers for ``seeded``.
    """
    return seed, turn, index, _CROPS


@dataclass(frozen=True)
class Pictures:
    """The training shots as pictures; small enough to send to a worker, which reads what it needs.

    Attributes:
        path: the file that ``PictureFile.write`` wrote, where all ranks see it.
        positions: (N,) int64 numbers of the shots in the file, on the CPU.
        labels: (N,) int64 classes.
    """

    path: Path
    positions: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.positions) != len(self.labels):
            raise ValueError(f"{len(self.positions)} positions for {len(self.labels)} labels: give each picture both")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> "Pictures":
        """Themselves: a network's predictor reads the pixels."""
        return self

    def digest(self) -> bytes:
        """Hash of the pictures' content and labels."""
        keys = self.file.keys[self.positions.numpy()]
        return hashlib.sha256(keys.tobytes() + self.labels.cpu().numpy().tobytes()).digest()

    def pixels(self, transform: Transform, batch_size: int = 64) -> Iterator[Tensor]:
        """What the image tower takes of all shots in order, a batch (b, 3, H, W) at a time."""
        for which in torch.arange(len(self)).split(batch_size):
            yield self.load(which, transform)

    def subset(self, keep: Tensor) -> "Pictures":
        """The shots that a boolean or index tensor selects, renumbered."""
        return replace(self, positions=self.positions[keep.cpu()], labels=self.labels[keep])

    def to(self, device: torch.device | str) -> "Pictures":
        """The same shots with their labels on another device; pictures are decoded on the CPU."""
        return replace(self, labels=self.labels.to(device))

    @property
    def file(self) -> PictureFile:
        """The open file, shared by all that read it in this process."""
        # A file that was written anew under the same name is another file.
        try:
            found = os.stat(self.path)
        except OSError:
            return PictureFile.open(self.path)  # says what is wrong
        return _opened(self.path, found.st_ino, found.st_mtime_ns, found.st_size)

    def load(
        self,
        which: Tensor,
        transform: Transform,
        *,
        augment: Augment | None = None,
        seeds: Sequence[Numbers] | None = None,
    ) -> Tensor:
        """Decode shots in this thread.

        Args:
            which: (m,) numbers of the shots.
            transform: what the image tower takes, where nothing is augmented.
            augment: instead of `transform`; None leaves the pictures as they are.
            seeds: for each shot what its generator is seeded with; needed to augment.

        Returns:
            Pixels (m, 3, H, W), on the CPU. A DataError tells of a picture that changed or cannot be decoded.

        Raises:
            ValueError: `augment` without `seeds`.
        """
        if augment is not None and seeds is None:
            raise ValueError("augment needs seeds: give what the generator of each picture is seeded with")
        numbers: Sequence[Numbers] = [()] * len(which) if seeds is None else seeds
        prepare, file = preparation(transform, augment), self.file
        samples = zip(self.positions[which.cpu()].tolist(), numbers, strict=True)
        return stacked([prepare(file.read(p), file.place(p), n) for p, n in samples], prepare)


@lru_cache(maxsize=4)
def _opened(path: Path, *_version: int) -> PictureFile:
    return PictureFile.open(path)


def preparation(transform: Transform, augment: Augment | None) -> Prepare:
    """What turns a picture's bytes into what the image tower takes.

    Args:
        transform: where nothing is augmented.
        augment: instead of `transform`; None leaves pictures as they are.

    Returns:
        A function of bytes, their place for messages, and what a generator is seeded with, to (3, H, W).
    """

    def prepare(data: bytes, place: str, numbers: Numbers) -> Tensor:
        picture = decode(data, place)
        try:
            if augment is None:
                return transform(picture)
            return augment(picture, seeded(*numbers))
        except Exception as error:
            error.add_note(f"while preparing the picture of {place}")
            raise

    return prepare


def stacked(pictures: Sequence[Tensor], prepare: Prepare) -> Tensor:
    """Pictures of one size as a batch.

    Args:
        pictures: m of (3, H, W).
        prepare: that made them.

    Returns:
        (m, 3, H, W), also for a rank without samples, which still takes part in a step.
    """
    if pictures:
        return torch.stack(list(pictures))
    blank = prepare(_BLANK, "a blank picture", (0,))
    return blank.new_empty(0, *blank.shape)
