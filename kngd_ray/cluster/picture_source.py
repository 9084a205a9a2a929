"""Ray Data's source of pictures. What reads them for a pool of encoders needs no torch, which takes half a gigabyte."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from kngd_ray.data import ImageSet, read_batches

BATCH = 64
"""Pictures of a block, and of an encoder's batch."""


class PictureSource(Datasource):  # type: ignore[misc]
    """Chosen pictures of a data set as rows (index, image); each read task reads its own part of the files.

    Args:
        images: the data set.
        indices (M,): which pictures.
    """

    def __init__(self, images: ImageSet, indices: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self._images = images
        self._indices = indices

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown until they are read."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One for each part.

        Args:
            parallelism: how many parts.
            *_, **__: what other sources need.

        Returns:
            The tasks.
        """
        pieces = [p for p in np.array_split(self._indices, max(parallelism, 1)) if len(p)]
        return [
            ReadTask(
                lambda piece=piece: _blocks(self._images, piece),
                BlockMetadata(num_rows=len(piece), size_bytes=None, input_files=None, exec_stats=None),
            )
            for piece in pieces
        ]


def _blocks(images: ImageSet, indices: npt.NDArray[np.int64]) -> Iterable[pa.Table]:
    for rows, blobs in read_batches(images, indices, BATCH):
        yield pa.table({"index": rows, "image": pa.array(blobs, pa.binary())})
