"""Training on pictures: read at random, augmented, and decoded by threads while the last batch is learned from.

    PictureFile --read--> bytes --decode--> PIL --augment or transform--> (3, H, W) --stack--> (m, 3, H, W)
                          `------------- a thread for each picture ---------------'

A sample's crop is a function of the fit's seed, the turn and the number of the picture: of neither the ranks, nor the
threads, nor the step at which a run was resumed.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kngd_ray.data import ImageSet, PictureFile, decode, read_batches
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
_Tag = TypeVar("_Tag")
_Job = Callable[[], Tensor]
_Prepare = Callable[[bytes, str, Numbers], Tensor]
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
        """The shots that a boolean or index tensor selects, numbered anew."""
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
        prepare, file = _preparation(transform, augment), self.file
        samples = zip(self.positions[which.cpu()].tolist(), numbers, strict=True)
        return _stack([prepare(file.read(p), file.place(p), n) for p, n in samples], prepare)


@lru_cache(maxsize=4)
def _opened(path: Path, *_version: int) -> PictureFile:
    return PictureFile.open(path)


def _preparation(transform: Transform, augment: Augment | None) -> _Prepare:
    """Return the function from (bytes, place, numbers of the generator) to (3, H, W)."""

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


def _stack(pictures: Sequence[Tensor], prepare: _Prepare) -> Tensor:
    """Return (m, 3, H, W), also for a rank without samples, which takes part in a step all the same."""
    if pictures:
        return torch.stack(list(pictures))
    return torch.empty(0, *prepare(_BLANK, "a blank picture", (0,)).shape)


class _Ahead(Generic[_Tag]):
    """Runs the jobs of batches on threads, a few batches before they are asked for, and gives them in order.

    Args:
        batches: for each batch a tag and its jobs; taken one at a time, by the thread that asks.
        threads: how many jobs run at once.
        ahead: batches that are being made or wait, besides the one that is being used.
    """

    def __init__(self, batches: Iterator[tuple[_Tag, Sequence[_Job]]], threads: int, ahead: int) -> None:
        if threads < 1 or ahead < 1:
            raise ValueError(f"threads is {threads} and ahead {ahead}: both must be 1 or more")
        self._batches = batches
        self._ahead = ahead
        self._queue: deque[tuple[Any, list[Future[Tensor]]]] = deque()
        # Once nobody refers to the pool any more its threads end, so a forgotten iterator keeps no process alive.
        self._pool = ThreadPoolExecutor(threads, "pictures")

    def __iter__(self) -> "_Ahead[_Tag]":
        return self

    def __next__(self) -> tuple[_Tag, list[Tensor]]:
        """The next batch.

        Raises:
            StopIteration: there is none, or this is closed.
        """
        try:
            self._fill()
            if not self._queue:
                raise StopIteration
            tag, futures = self._queue.popleft()
            results = [future.result() for future in futures]
            self._fill()
            return tag, results
        except BaseException:
            self.close()
            raise

    def _fill(self) -> None:
        while len(self._queue) < self._ahead:
            try:
                tag, jobs = next(self._batches)
            except StopIteration:
                return
            except Exception as error:  # raised where its batch is asked for, after those before it
                failed: Future[Tensor] = Future()
                failed.set_exception(error)
                self._queue.append((None, [failed]))
                self._batches = iter(())
                return
            self._queue.append((tag, [self._pool.submit(job) for job in jobs]))

    def close(self) -> None:
        """Drop what was not asked for, and wait for the threads to end."""
        self._batches = iter(())  # an open file is closed with what read it
        self._queue.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Prefetcher:
    """Batches of training pictures, made by threads while the last one is learned from.

    An iterator over the batches of `steps` in order, and a context manager that ends its threads. What goes wrong
    with a picture is raised where its batch is asked for, and names the picture.

    Args:
        pictures: the shots.
        plan: gives the samples of a step, of this rank alone; see ``augmentation`` for their numbers.
        steps: the steps, from the one at which a run begins or goes on.
        transform: what the image tower takes, where nothing is augmented.
        augment: instead of `transform`; None leaves the pictures as they are.
        threads: how many pictures are decoded at once.
        ahead: batches in memory at most, besides the one that is being learned from.
    """

    def __init__(
        self,
        pictures: Pictures,
        plan: Callable[[int], Sequence[Sample]],
        steps: range,
        transform: Transform,
        *,
        augment: Augment | None = None,
        threads: int = 2,
        ahead: int = 2,
    ) -> None:
        self._prepare = _preparation(transform, augment)
        file, positions = pictures.file, pictures.positions.tolist()
        prepare = self._prepare

        def job(index: int, numbers: Numbers) -> Tensor:
            return prepare(file.read(positions[index]), file.place(positions[index]), numbers)

        batches = ((step, [partial(job, *sample) for sample in plan(step)]) for step in steps)
        self._ahead: _Ahead[int] = _Ahead(batches, threads, ahead)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> Tensor:
        """Pixels (m, 3, H, W) of the next step, on the CPU."""
        _, pictures = next(self._ahead)
        return _stack(pictures, self._prepare)

    def close(self) -> None:
        """End the threads; batches that were not asked for are dropped."""
        self._ahead.close()


def stream(
    images: ImageSet, rows: npt.NDArray[np.int64], transform: Transform, batch_size: int = 64, threads: int = 2
) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
    """Pictures of a data set in one pass over its files, to evaluate on; a batch is decoded while one is used.

    Args:
        images: the data set.
        rows: (M,) which pictures.
        transform: what the image tower takes.
        batch_size: pictures of a batch.
        threads: how many pictures are decoded at once.

    Yields:
        Indices (b,) of a batch, ascending, each index once, and its pixels (b, 3, H, W) on the CPU.
    """
    prepare = _preparation(transform, None)

    def batches() -> Iterator[tuple[npt.NDArray[np.int64], Sequence[_Job]]]:
        for read, blobs in read_batches(images, rows, batch_size):
            places = [images.place(row) for row in read.tolist()]
            yield read, [partial(prepare, blob, place, ()) for blob, place in zip(blobs, places, strict=True)]

    ahead: _Ahead[Any] = _Ahead(batches(), threads, ahead=1)
    try:
        for read, pictures in ahead:
            yield read, torch.stack(pictures)
    finally:
        ahead.close()
