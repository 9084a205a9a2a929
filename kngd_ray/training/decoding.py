"""Pictures decoded by threads, while those decoded before are learned from.

PictureFile --read--> bytes --decode--> PIL --augment or transform--> (3, H, W) --stack--> (m, 3, H, W)
`------------- a thread for each picture ---------------'
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kngd_ray.data import ImageSet, read_batches
from kngd_ray.training.pictures import Augment, Numbers, Pictures, Sample, Transform, preparation, stacked

_Tag = TypeVar("_Tag")
Job = Callable[[], Tensor]
"""Decodes one picture."""


class _Ahead(Generic[_Tag]):
    """Runs the jobs of batches on threads, a few batches before they are asked for, and gives them in order.

    Args:
        batches: for each batch a tag and its jobs; taken one at a time, by the thread that asks.
        threads: how many jobs run at once.
        ahead: batches that are being made or wait, besides the one that is being used.
    """

    def __init__(self, batches: Iterator[tuple[_Tag, Sequence[Job]]], threads: int, ahead: int) -> None:
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
        steps: the steps, from the one at which a run begins or continues.
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
        self._prepare = preparation(transform, augment)
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
        return stacked(pictures, self._prepare)

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
    prepare = preparation(transform, None)

    def batches() -> Iterator[tuple[npt.NDArray[np.int64], Sequence[Job]]]:
        for read, blobs in read_batches(images, rows, batch_size):
            places = [images.place(row) for row in read.tolist()]
            yield read, [partial(prepare, blob, place, ()) for blob, place in zip(blobs, places, strict=True)]

    ahead: _Ahead[Any] = _Ahead(batches(), threads, ahead=1)
    try:
        for read, pictures in ahead:
            yield read, torch.stack(pictures)
    finally:
        ahead.close()
