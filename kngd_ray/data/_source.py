"""What a data set on disk looks like to the rest of the package, whatever its format."""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kngd_ray.errors import closest
from kngd_ray.storage import address

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.bytes_]

DEFAULT_DOMAIN = "all"
MAX_FILE = 1 << 30  # bytes of a picture's file; the largest that can be decoded has 640 MB of pixels


class Source(Protocol):
    """A data set's files: says where a row is, and reads pictures without holding them all."""

    @property
    def kind(self) -> Literal["parquet", "folder"]:
        """Format of the files."""

    @property
    def paths(self) -> tuple[str, ...]:
        """Parquet: the files. Folder: one picture file per row."""

    def place(self, row: int) -> str:
        """Where `row` is, in words for a message."""

    def read(self, rows: Ints) -> Iterator[tuple[int, bytes]]:
        """Yield (row, picture bytes) for the ascending `rows` (M,), in this order."""


class Rows(NamedTuple):
    """What a scan of a data set finds, one entry per row, before classes and splits are settled.

    Origins say what states a row's split: a column, or the name of a file or folder. Notes are sentences on how the
    data set was read, and on what was passed over.
    """

    source: Source
    labels: Sequence[int | str | None]
    names: Sequence[str | None]
    domains: Sequence[str]
    splits: Sequence[str | None]
    keys: Sequence[bytes]
    origins: Sequence[str | None]
    notes: tuple[str, ...] = ()


def content_key(data: bytes) -> bytes:
    """Return the sha256 of a picture's bytes as 64 hexadecimal digits.

    Hexadecimal because NumPy's fixed-width bytes drop trailing zero bytes, which digests may end in.
    """
    return hashlib.sha256(data).hexdigest().encode()


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        OSError: when it cannot be read, or is no file: a pipe would be waited for, a device never end.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file")
    if found.st_size > MAX_FILE:
        raise OSError(0, f"it has {found.st_size:,} bytes, more than a picture")
    with open(path, "rb") as file:
        return file.read()


def hint(name: str, options: Sequence[str]) -> str:
    """Return ` (the nearest name is 'x')` for the option nearest to `name`, or nothing."""
    return "".join(f" (the nearest name is {match!r})" for match in closest(name, options))


def listing(names: Sequence[str], limit: int = 20) -> str:
    """Return names for a message, only the first few if there are many."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def missing_path(path: Path) -> str:
    """Return the sentence for a path that does not exist, with the nearest name that does."""
    if address(path) is not None:
        return f"{address(path)} is an address, and nothing is downloaded: download it, and name the file in data.path"
    path = path.absolute()
    while not os.path.exists(path.parent):  # Path.exists raises where it may not look
        path = path.parent
    try:
        siblings = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        siblings = []
    return f"no such file or folder: {path}{hint(path.name, siblings)}: correct data.path"
