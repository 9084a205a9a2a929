"""Features of crops beside the features of pictures, in the column `crops` of their parquet file.

A row's V crops are one list of V x d floats, one crop after another. How they were drawn is in the schema's metadata,
as JSON: `views` (V), `scale` (least and greatest part of the area), `crop` (all of its settings) and `rule`, the
version of the drawing. Crops are read for the shots alone, in parts of the row groups that hold some.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kngd_ray._vectors import Vectors, flaw, unit
from kngd_ray.data._crops import RULE, Crops
from kngd_ray.data._parquet import BATCH_BYTES, ParquetFiles, open_parquet
from kngd_ray.data._schema import vector_column
from kngd_ray.data._source import Ints, listing
from kngd_ray.errors import DataError

COLUMN = "crops"
_METADATA = b"kngd_ray.crops"
_AT_ONCE = 8192  # rows
_ENCODE = "encode the pictures again with `views`, or set tune.views=0"


@dataclass(frozen=True)
class StoredCrops:
    """What a file says of its crops.

    Attributes:
        views: V, of each picture.
        scale: least and greatest part of the picture's area.
    """

    views: int
    scale: tuple[float, float]


@dataclass(frozen=True)
class GivenCrops:
    """Crops of shots, read.

    Attributes:
        rows: (N,) numbers of the shots in their files, ascending.
        vectors: (N, V, d) unit features of their crops.
    """

    rows: Ints
    vectors: Vectors

    def of(self, rows: Ints) -> Vectors:
        """The crops (M, V, d) of some of these rows (M,)."""
        return self.vectors[np.searchsorted(self.rows, rows)]


def described(crops: Crops, scale: tuple[float, float]) -> dict[bytes, bytes]:
    """Metadata of a schema with crops."""
    about = {"views": crops.count, "scale": list(scale), "crop": crops.name, "rule": RULE}
    return {_METADATA: json.dumps(about).encode()}


def crops_in(path: Path, width: int) -> StoredCrops | None:
    """What a file has of crops.

    Args:
        path: the parquet file.
        width: d, of its features.

    Returns:
        How many and how they were drawn; None where `encode` wrote none.

    Raises:
        DataError: the column is of another type or width than the file says, or what it says cannot be read.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
    about = (schema.metadata or {}).get(_METADATA)
    if about is None or schema.names.count(COLUMN) != 1:
        return None
    try:
        told = json.loads(about)
        views, rule, (least, greatest) = told["views"], told["rule"], told["scale"]
        sound = type(views) is int and views >= 1 and 0 < least <= greatest <= 1
    except (LookupError, TypeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise DataError(f"{path}: what its schema says of the column `{COLUMN}` is damaged: write the file again")
    if rule != RULE:
        raise DataError(f"{path}: its crops were drawn by rule {rule!r}, and this version draws by {RULE}: {_ENCODE}")
    kind = schema.field(COLUMN).type
    if not vector_column(kind):
        raise DataError(f"{path}: column `{COLUMN}` is {kind}: it must be lists of floats")
    if pa.types.is_fixed_size_list(kind) and kind.list_size != views * width:
        raise DataError(
            f"{path}: column `{COLUMN}` has {kind.list_size} numbers a row, and {views} crops of {width} features are"
            f" {views * width}: {_ENCODE}"
        )
    return StoredCrops(views, (float(least), float(greatest)))


def read_crops(
    source: ParquetFiles, stored: Sequence[StoredCrops | None], rows: Ints, count: int, width: int
) -> GivenCrops:
    """Read the first crops of shots.

    Args:
        source: the files.
        stored: what each of them has of crops.
        rows: of the shots, in any order; their files hold `count` or more crops of each.
        count: V, how many to take.
        width: d, of features.

    Returns:
        The crops, of length 1.

    Raises:
        DataError: a row of these has another number of values, or a crop without a direction.
    """
    wanted = np.unique(rows)
    views = {path: held.views for path, held in zip(source.paths, stored, strict=True) if held is not None}

    def part(here: Ints, column: Any, path: Path) -> list[Vectors]:
        chosen = np.flatnonzero(np.isin(here, wanted))
        if not len(chosen):
            return []
        places = [source.place(row) for row in here[chosen].tolist()]
        shape = views[str(path)], width
        return [_checked(column, chosen, places, shape)[:, :count]]

    found = source.stored(wanted, _Column(max(views.values()) * width), part)
    vectors = np.concatenate([np.empty((0, count, width), np.float32), *found])
    if len(vectors) != len(wanted):
        raise DataError(f"{listing(source.paths)} changed while in use: run again")
    return GivenCrops(wanted, unit(vectors.reshape(-1, width)).reshape(vectors.shape))


@dataclass(frozen=True)
class _Column:
    """The column of crops, a part of it at once.

    Attributes:
        size: numbers of a row.
    """

    size: int
    column: str = COLUMN

    def at_once(self, file: Any) -> int:
        """How many rows to unpack at once."""
        return max(1, min(_AT_ONCE, BATCH_BYTES // (8 * self.size)))


def _checked(column: Any, chosen: Ints, places: Sequence[str], shape: tuple[int, int]) -> Vectors:
    """Crops (m, V, d) of some rows of a part, as they are stored.

    Raises:
        DataError: for the first row of another length, or with a crop without a direction.
    """
    column.validate(full=True)  # else a damaged offset leads out of the file
    lists = column.take(pa.array(chosen))
    counts = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    for row in np.flatnonzero(counts != shape[0] * shape[1])[:1]:
        raise DataError(
            f"{places[row]}: column `{COLUMN}` has {counts[row]} numbers, and {shape[0]} crops of {shape[1]} features"
            f" are {shape[0] * shape[1]}: {_ENCODE}"
        )
    with np.errstate(over="ignore"):
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    vectors: Vectors = flat.reshape(-1, shape[1])
    wrong = flaw(vectors)
    if wrong is not None:
        row, number = divmod(wrong[0], shape[0])
        raise DataError(f"{places[row]}: crop {number} in its column `{COLUMN}` {wrong[1]}: {_ENCODE}")
    return vectors.reshape(-1, *shape)
