"""What the footer of a parquet file says of its parts, also where it is damaged or made up.

pyarrow ends the process at the first look at a part (a column chunk) that the C++ library below refuses to describe: an
exception that nothing catches, seen with 25.0 where histograms of levels have another length than their column asks
for. Whoever reads the part meets the same exception as an OSError, so that is tried first, of a file without pages.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_ANY_SIZE = 1 << 62  # of a file: whether its parts lie in it is found out when they are read


def chunks(file: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Yield what the footer says of the parts of some columns.

    Args:
        file: a ``ParquetFile``.
        columns: names, of which the file may lack some.

    Yields:
        ``ColumnChunkMetaData``, row group by row group.

    Raises:
        OSError: the footer is damaged; :func:`open_parquet` turns it into a sentence.
    """
    paths = [file.schema.column(number).path for number in range(len(file.schema))]
    leaves = [number for number, path in enumerate(paths) if path.partition(".")[0] in columns]
    source = pa.PythonFile(_NoPages(), mode="r")
    described = pq.ParquetFile(source, metadata=file.metadata)
    for group in range(file.metadata.num_row_groups):
        for leaf in leaves:
            with suppress(_PageAskedError):  # so its description is sound
                next(described.iter_batches(1, row_groups=[group], columns=[paths[leaf]]), None)
            yield file.metadata.row_group(group).column(leaf)


class _PageAskedError(Exception):
    """A reader has got as far as to ask for a page."""


class _NoPages(io.RawIOBase):
    """A file that has nothing but a footer, which is known."""

    def __init__(self) -> None:
        super().__init__()
        self._at = 0

    def readable(self) -> bool:
        """Yes, as far as a reader asks."""
        return True

    def seekable(self) -> bool:
        """Yes: its size is told so."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, whatever is there."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: _ANY_SIZE}[whence]
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Refuse.

        Raises:
            _PageAskedError: always.
        """
        raise _PageAskedError
