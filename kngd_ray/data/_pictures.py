"""Pictures for training: their encoded bytes in one file that any number of processes read at random.

    <path>     Arrow IPC, not compressed: position int64, key 32 bytes, place string, image bytes

Parquet cannot hand out one picture without its row group. This file is mapped into memory instead: a picture is read
from the disk when it is asked for, processes of one machine share what the system keeps of it, and nothing else of it
is held. Pictures lie in the order of the data set's files, so that writing passes over them once; `position` says
which entry each one is. Each carries its sha256, which is checked whenever it is read.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kngd_ray.data._cache import _sweep
from kngd_ray.data._encode import read_batches
from kngd_ray.data._images import ImageSet
from kngd_ray.data._source import Ints, Keys, hint, listing
from kngd_ray.errors import DataError
from kngd_ray.storage import storage_errors

BATCH_ROWS = 32  # pictures that are in memory while a file is written
SCHEMA = pa.schema([
    pa.field("position", pa.int64(), nullable=False),
    pa.field("key", pa.binary(32), nullable=False),
    pa.field("place", pa.string(), nullable=False),
    pa.field("image", pa.large_binary(), nullable=False),
])


class PictureFile:
    """Chosen pictures of a data set, numbered from 0, each read when it is asked for.

    Any number of threads may read one. Pickled it is its path, which is opened again.

    Args:
        path: the file.
        batches: its record batches, mapped into memory.

    Attributes:
        path: the file.
        keys (N,): sha256 of each picture's bytes, 64 hexadecimal digits.
    """

    def __init__(self, path: Path, batches: Sequence[Any]) -> None:
        self.path = path
        stored = [np.frombuffer(b"".join(batch["key"].to_pylist()).hex().encode(), "S64") for batch in batches]
        positions = [batch["position"].to_numpy() for batch in batches]
        position = np.concatenate([np.empty(0, np.int64), *positions])
        if not np.array_equal(np.sort(position), np.arange(len(position))):
            raise ValueError("its pictures are not numbered from 0 on")
        order = np.argsort(position)
        self.keys: Keys = np.concatenate([np.empty(0, "S64"), *stored])[order]
        sizes = [len(batch) for batch in batches]
        self._batch = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._row = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])[order]
        self._places = [batch["place"] for batch in batches]
        self._images = [batch["image"] for batch in batches]

    def __reduce__(self) -> tuple[Any, ...]:
        return PictureFile.open, (self.path,)

    def __len__(self) -> int:
        return len(self.keys)

    def place(self, index: int) -> str:
        """Return where in the data set a picture is from, for messages."""
        return str(self._places[self._batch[index]][int(self._row[index])].as_py())

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of a picture.

        Args:
            index: 0 to N - 1.

        Returns:
            The bytes that the data set held when the file was written.

        Raises:
            DataError: when they are not.
        """
        # the buffer is part of the mapped file: nothing is read from the disk before it is copied
        data: bytes = self._images[self._batch[index]][int(self._row[index])].as_buffer().to_pybytes()
        if hashlib.sha256(data).hexdigest().encode() != self.keys[index]:
            raise DataError(
                f"{self.path}, picture {index} ({self.place(index)}): its bytes changed on the disk:"
                " delete the file and run again"
            )
        return data

    @staticmethod
    def open(path: str | os.PathLike[str]) -> "PictureFile":
        """Open a file that :meth:`write` wrote.

        Args:
            path: the file.

        Returns:
            Its pictures; none of them has been read yet.

        Raises:
            DataError: when the file is missing, cut short, damaged, or of another kind.
        """
        path = Path(path)
        try:
            return PictureFile(path, _batches(path))
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: run again to write the pictures there") from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}): delete it and run again") from error
        except (pa.ArrowException, ValueError) as error:
            raise DataError(
                f"{path} is cut short, damaged, or no file of pictures ({error}): delete it and run again"
            ) from error

    @staticmethod
    def write(path: str | os.PathLike[str], images: ImageSet, rows: Sequence[int] | Ints) -> "PictureFile":
        """Copy pictures out of a data set; the file appears whole or not at all.

        Besides the error below, a full or read-only disk raises StorageError, and a picture that changed
        since it was indexed a DataError.

        Args:
            path: the file; missing folders are made, and an older file is replaced.
            images: the data set.
            rows (N,): which pictures, each once: the first becomes picture 0.

        Returns:
            The open file.

        Raises:
            ValueError: when a picture is named twice.
        """
        path, rows = Path(path), np.asarray(rows, np.int64)
        order = np.argsort(rows)
        ascending = rows[order]
        if (np.diff(ascending) == 0).any():
            raise ValueError("rows names a picture twice: name each once, and repeat its number when reading")
        with _in_one_move(path) as file, pa.ipc.new_file(file, SCHEMA) as writer:
            for read, blobs in read_batches(images, ascending, BATCH_ROWS):
                columns = [
                    pa.array(order[np.searchsorted(ascending, read)], pa.int64()),
                    pa.array([bytes.fromhex(key.decode()) for key in images.keys[read].tolist()], pa.binary(32)),
                    pa.array([images.place(row) for row in read.tolist()], pa.string()),
                    pa.array(blobs, pa.large_binary()),
                ]
                writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
        return PictureFile.open(path)


def _batches(path: Path) -> list[Any]:
    """Return the record batches of a file, in mapped memory.

    Raises:
        ValueError: when its columns are not ours.
    """
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if not reader.schema.equals(SCHEMA):
            raise ValueError(f"its columns are {listing(reader.schema.names)}")
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    for batch in batches:
        batch.validate(full=True)  # else a damaged offset leads out of the file; reads no pictures
    return batches


@contextmanager
def _in_one_move(path: Path) -> Iterator[Any]:
    """Yield a stream whose bytes become the file at `path` at the end, unless something is raised."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):
            _sweep(left)
        # a name of its own: several processes may write one file at once, and the last one wins
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def halves(class_names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide classes as the base-to-new protocol of CoOp does.

    Args:
        class_names: C names in order of their labels.

    Returns:
        The first half, with the odd one if C is odd: base classes, trained on. The second: new classes.

    Raises:
        DataError: when a half would have fewer than two classes.
    """
    if len(class_names) < 4:
        raise DataError(
            f"base and new classes are halves of {len(class_names)} classes: they need four or more, two in each"
        )
    middle = -(-len(class_names) // 2)
    return tuple(class_names[:middle]), tuple(class_names[middle:])


def restrict(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Keep the pictures of some classes.

    Unlike opening the data set again with these classes, this keeps every picture on its side of the split, and it
    serves data with bare numbers, whose class list must name them all.

    Args:
        images: the data set.
        class_names: the classes to keep; they are numbered anew in this order.

    Returns:
        The pictures of these classes, in the order of the files.

    Raises:
        DataError: when a class is unknown or named twice.
    """
    for name in class_names:
        if name not in images.class_names:
            raise DataError(
                f"class {name!r} is not in the data set{hint(name, images.class_names)}:"
                f" it has {listing(images.class_names)}"
            )
    if len(set(class_names)) < len(class_names):
        raise DataError("the classes to keep name one twice: name each once")
    number = {name: n for n, name in enumerate(class_names)}
    labels = np.array([number.get(name, -1) for name in images.class_names], np.int64)[images.labels]
    kept = np.flatnonzero(labels >= 0)
    return replace(
        images,
        labels=labels[kept],
        domains=images.domains[kept],
        splits=images.splits[kept],
        keys=images.keys[kept],
        class_names=tuple(class_names),
        rows=images.rows[kept],
    )
