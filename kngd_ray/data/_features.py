"""Data sets of features that were computed elsewhere.

A parquet file with a column `features`, lists of floats of one length, in the place of `image`, or as `data.columns`
calls it; its other columns are those of pictures. A row's key is the sha256 of its values in float32, so that copies
fall on one side of a split. Every row is checked when the files are scanned, and scaled to length 1 when it is read.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kngd_ray._vectors import Vectors, flaw, lengths, unit
from kngd_ray.data._config import ColumnNames
from kngd_ray.data._encoded_by import EncodedBy, encoded_by, one_encoder
from kngd_ray.data._footer import chunks
from kngd_ray.data._given_crops import GivenCrops, StoredCrops, crops_in, read_crops
from kngd_ray.data._parquet import BATCH_BYTES, ParquetFiles, open_parquet, scan_parquet
from kngd_ray.data._schema import lacks_content, vector_column
from kngd_ray.data._source import Ints, Keys, Rows, listing
from kngd_ray.errors import DataError

MAX_WIDTH = 1 << 16  # numbers of a feature
_AT_ONCE = 8192  # rows
_NEAR = 1e-3  # unit vectors in float16 are off by less, and not worth a word


@dataclass(frozen=True)
class FeatureFiles(ParquetFiles):
    """Rows of several parquet files with features, numbered through.

    Attributes:
        width: d, the length of every list.
        shortest: Euclidean length of the shortest feature as it is stored.
        longest: that of the longest.
        crops: what each file has of crops; None is nothing.
        encoded_by: the model that computed the features; None where no file says which.
    """

    width: int
    shortest: float
    longest: float
    crops: tuple[StoredCrops | None, ...]
    encoded_by: EncodedBy | None

    @property
    def rescaled(self) -> bool:
        """Whether reading scales features by more than rounding."""
        return self.shortest < 1 - _NEAR or self.longest > 1 + _NEAR

    def vectors(self, rows: Ints) -> Vectors:
        """Return the unit features (M, d) of `rows` (M,), in any order, each as often as it is named.

        Raises:
            DataError: when the files changed since they were scanned.
        """
        wanted, back = np.unique(rows, return_inverse=True)

        def part(here: Ints, column: Any, path: Path) -> list[Vectors]:
            return [unit(matrix(column, path, int(here[0]), self.width)[np.isin(here, wanted)])]

        found = self.stored(wanted, Features(self.names, self.width), part)
        stacked = np.concatenate([np.empty((0, self.width), np.float32), *found])
        if len(stacked) != len(wanted):
            raise DataError(f"{listing(self.paths)} changed while in use: run again")
        return stacked[back]

    def crops_below(self, rows: Ints) -> dict[str, StoredCrops | None]:
        """What the files of `rows` (M,) have of crops, by their paths."""
        found = zip(self.paths, self.starts, self.crops, strict=True)
        return {path: held for path, starts, held in found if ((rows >= starts[0]) & (rows < starts[-1])).any()}

    def read_crops(self, rows: Ints, count: int) -> GivenCrops:
        """Return the first `count` crops of `rows` (M,), whose files have as many.

        Besides a DataError of a row that has others than its file says, one tells of files that changed.
        """
        return read_crops(self, self.crops, rows, count, self.width)


class Features:
    """Rows of features; their width and lengths are recorded while they are hashed.

    Args:
        names: of the columns.
        width: length that the lists must have; None is that of the first.
    """

    def __init__(self, names: ColumnNames, width: int | None = None) -> None:
        self.column, self._image = names.features, names.image
        self.width = width
        self.shortest, self.longest = np.inf, 0.0

    def check(self, file: Any, path: Path) -> None:
        """Refuse a file without features.

        Raises:
            DataError: it has no column of them, one of another type, or lists that no model computes.
        """
        schema = file.schema_arrow
        if self.column not in schema.names and self._image in schema.names:
            raise DataError(holds_pictures(str(path)))
        if self.column not in schema.names:
            raise DataError(lacks_content("features", f"the column of lists of floats `{self.column}`", schema, path))
        if not vector_column(kind := schema.field(self.column).type):
            raise DataError(f"{path}: column `{self.column}` is {kind}: it must be lists of floats")
        if self._width(file) > MAX_WIDTH:
            raise DataError(
                f"{path}: column `{self.column}` holds lists of over {MAX_WIDTH:,} numbers, as no model computes"
            )

    def at_once(self, file: Any) -> int:
        """How many rows to unpack at once; their size is what the footer says."""
        return int(max(1, min(_AT_ONCE, BATCH_BYTES // (8 * max(1, self._width(file))))))

    def _width(self, file: Any) -> int:
        """The largest mean length of the lists in a row group."""
        rows = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        values = [chunk.num_values for chunk in chunks(file, [self.column])]
        return max((value // row for value, row in zip(values, rows, strict=True) if row), default=0)

    def keys(self, column: Any, path: Path, first: int) -> list[bytes]:
        """Return the hash of each row's float32 values."""
        if self.width is None and len(column):
            self.width = len(column[0].as_py() or ())
        vectors = matrix(column, path, first, self.width or 0)
        if len(vectors):
            size = lengths(vectors)
            self.shortest, self.longest = min(self.shortest, size.min()), max(self.longest, size.max())
        # adding 0 makes one zero of 0 and -0
        return [hashlib.sha256(row.tobytes()).hexdigest().encode() for row in vectors + np.float32(0)]


class GivenFeatures:
    """Precomputed features with the interface of a cache: complete, never computed.

    Args:
        source: the files.
        keys (N,): content keys of rows of the files.
        rows (N,): numbers of these rows.
    """

    def __init__(self, source: FeatureFiles, keys: Keys, rows: Ints) -> None:
        self._source = source
        self._keys, first = np.unique(keys, return_index=True)
        self._rows = rows[first]

    def missing(self, keys: Keys) -> set[bytes]:
        """Return the `keys` (N,) without a feature."""
        return set(keys[~np.isin(keys, self._keys)].tolist())

    def read(self, keys: Keys) -> Vectors:
        """Return the unit features (N, d) of `keys` (N,)."""
        assert not self.missing(keys)
        return self._source.vectors(self._rows[np.searchsorted(self._keys, keys)])


def scan_features(paths: Sequence[Path], names: ColumnNames) -> Rows:
    """Read labels, names, domains, splits and keys of parquet files with features.

    Args:
        paths: files with one class list, and features of one width.
        names: what their columns are called.

    Returns:
        Everything but the features, row by row. A DataError tells of a row without a usable one.
    """
    content = Features(names)
    rows = scan_parquet(paths, names, content)
    assert isinstance(rows.source, ParquetFiles)
    shortest, longest = float(content.shortest), float(content.longest)
    width = content.width or 0
    paths_read = rows.source.paths
    crops = tuple(crops_in(Path(path), width) for path in paths_read)
    stated = [encoder_of(Path(path)) for path in paths_read]
    model = one_encoder(paths_read, stated)
    source = FeatureFiles(paths_read, rows.source.starts, names, width, shortest, longest, crops, model)
    silent = [path for path, found in zip(paths_read, stated, strict=True) if found is None]
    notes = (EncodedBy.unstated(listing(silent, 4), f"{model} of the others"),) if model is not None and silent else ()
    return rows._replace(source=source, notes=(*rows.notes, *notes))


def encoder_of(path: Path) -> EncodedBy | None:
    """What a parquet file says of the model that computed its features; a DataError tells of a damaged file."""
    with open_parquet(path) as file:
        return encoded_by(file.schema_arrow.metadata, path)


def read_features(path: Path, width: int, names: ColumnNames | None = None) -> Iterator[tuple[int, Vectors]]:
    """Read features alone; the file needs no other column.

    Args:
        path: the parquet file.
        width: length that the lists must have.
        names: what its columns are called; None is the defaults.

    Yields:
        Number of a part's first row, and unit features (m, width).

    Raises:
        DataError: when there is no such file, or a row is without a usable feature.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}: name a parquet file with a column `features`")
    content, done = Features(names or ColumnNames(), width), 0
    with open_parquet(path) as file:
        content.check(file, path)
        for batch in file.iter_batches(content.at_once(file), columns=[content.column]):
            yield done, unit(matrix(batch.column(0), path, done, width))
            done += len(batch)


def holds_pictures(path: str) -> str:
    """Return the sentence for pictures where features are needed."""
    return (
        f"{path} holds pictures, and model.name=precomputed learns from features: encode them first with kngd-ray"
        f" encode {path} --out FOLDER, or set model.name to a model that encodes pictures"
    )


def matrix(column: Any, path: Path, first: int, width: int) -> Vectors:
    """Return a column of lists as rows (m, width) that all have a direction.

    Args:
        column: the lists.
        path: their file, for messages.
        first: number of the first row in it.
        width: length that they must have.

    Returns:
        The rows as they are stored, in float32.

    Raises:
        DataError: for the first list of another length or without a direction.
    """
    column.validate(full=True)  # else a damaged offset leads out of the file
    counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero((counts != width) | (counts == 0))[:1]:
        if not counts[row]:
            raise DataError(f"{path}, row {first + row} has no features: drop the row, or encode it again")
        raise DataError(
            f"{path}, row {first + row}: it has {counts[row]} features, and {width} are expected: give all rows"
            " features of one model"
        )
    with np.errstate(over="ignore"):
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors: Vectors = flat.reshape(len(column), width)
    wrong = flaw(vectors)
    if wrong is not None:
        raise DataError(f"{path}, row {first + wrong[0]}: its feature {wrong[1]}: drop the row, or encode it again")
    return vectors
