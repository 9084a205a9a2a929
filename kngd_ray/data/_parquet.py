"""Data sets in parquet files.

Columns: `image` (bytes, or a struct {bytes, path} as Hugging Face `datasets` writes it), `label`
(integer, or a class name), and optionally `class_name`, `domain` and `split`. A struct entry with a
path alone is read from disk, relative to its parquet file and never outside that file's folder.
Pictures are streamed: one batch of a row group is in memory at a time.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kngd_ray.data._source import DEFAULT_DOMAIN, Ints, Rows, content_key, listing
from kngd_ray.errors import DataError

BATCH_ROWS = 256
COLUMNS = ("label", "class_name", "domain", "split")


@dataclass(frozen=True)
class ParquetFiles:
    """Rows of several parquet files, numbered through.

    Attributes:
        paths: the files.
        starts: per file, the number of the first row of each row group, and of the row after its last.
    """

    paths: tuple[str, ...]
    starts: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> Literal["parquet"]:
        """Format of the files."""
        return "parquet"

    def place(self, row: int) -> str:
        """Return the file of `row` and its number in that file, counted from 0."""
        file = next(n for n, starts in enumerate(self.starts) if row < starts[-1])
        names = [Path(path).name for path in self.paths]
        shown = names if len(set(names)) == len(names) else self.paths
        return f"{shown[file]}, row {row - self.starts[file][0]}"

    def read(self, rows: Ints) -> Iterator[tuple[int, bytes]]:
        """Yield (row, picture bytes) for ascending `rows` (M,) out of the row groups that hold them."""
        for path, starts in zip(self.paths, self.starts, strict=True):
            wanted = rows[(rows >= starts[0]) & (rows < starts[-1])]
            if not len(wanted):
                continue
            groups = np.unique(np.searchsorted(starts, wanted, side="right") - 1).tolist()
            stored = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
            done = 0
            with _open(Path(path)) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=["image"]):
                    here = stored[done : done + len(batch)]
                    done += len(batch)
                    column = batch.column(0)
                    for offset in np.flatnonzero(np.isin(here, wanted)).tolist():
                        yield int(here[offset]), _picture(column[offset], Path(path))


def scan_parquet(paths: Sequence[Path]) -> Rows:
    """Read labels, names, domains, splits and picture hashes of parquet files.

    Args:
        paths: files with one class list.

    Returns:
        Everything but the pictures, row by row.
    """
    starts: list[tuple[int, ...]] = []
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    keys: list[bytes] = []
    for path in paths:
        sizes, found, hashes = _scan_file(path)
        starts.append(tuple(np.cumsum([len(keys), *sizes]).tolist()))
        keys += hashes
        for name, values in found.items():
            columns[name] += values
    domains = [DEFAULT_DOMAIN if value is None else str(value) for value in columns["domain"]]
    source = ParquetFiles(tuple(str(path) for path in paths), tuple(starts))
    return Rows(source, columns["label"], columns["class_name"], domains, columns["split"], keys)


def _scan_file(path: Path) -> tuple[list[int], dict[str, list[Any]], list[bytes]]:
    """Return the sizes of a file's row groups, its columns (None where it has none) and picture hashes."""
    keys: list[bytes] = []
    with _open(path) as file:
        schema = file.schema_arrow
        label = _check_columns(schema, path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        stored = {name: name for name in COLUMNS if name in schema.names} | {"label": label}
        columns: dict[str, list[Any]] = {name: [] for name in stored}
        wanted = ["image", *dict.fromkeys(stored.values())]
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            keys += [content_key(_picture(value, path)) for value in batch.column("image")]
            for name, column in stored.items():
                columns[name] += batch.column(column).to_pylist()
    if "class_name" not in columns:
        known = _hugging_face_names(schema)
        columns["class_name"] = [_name(value, known) for value in columns["label"]]
    return sizes, {name: columns.get(name, [None] * len(keys)) for name in COLUMNS}, keys


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a parquet file, and name it in every error met while it is read.

    Raises:
        DataError: when the file is not parquet, damaged or unreadable.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except pa.ArrowInvalid as error:
        with path.open("rb") as stream:
            if stream.read(4) != b"PAR1":
                raise DataError(f"{path} is not a parquet file: name one in data.path") from error
        raise DataError(f"{path} is cut short or damaged: fetch or write it again") from error
    except OSError as error:
        reason = error.strerror or "damaged: fetch or write it again"
        raise DataError(f"{path} cannot be read: {reason}") from error


def _check_columns(schema: Any, path: Path) -> str:
    """Return the name of the column that tells the class.

    Raises:
        DataError: when the pictures or the classes are missing or of a type that cannot hold them.
    """
    has = f"it has {listing(schema.names) or 'no columns'}"
    if "image" not in schema.names:
        raise DataError(f"{path} has no image column ({has}): name the column of picture bytes `image`")
    label = "label" if "label" in schema.names else "class_name"
    if label not in schema.names:
        raise DataError(f"{path} has no label column ({has}): add `label`, integers or class names")
    image, kind = schema.field("image").type, schema.field(label).type
    parts = {field.name for field in image} if pa.types.is_struct(image) else set()
    if not (_is_bytes(image) or {"bytes", "path"} <= parts):
        raise DataError(f"{path}: column `image` is {image}: it must be bytes, or a struct of bytes and path")
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column `{label}` is {kind}: it must be integers or class names")
    return label


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _picture(value: Any, path: Path) -> bytes:
    """Return the bytes of one `image` entry; a null one is empty, which no decoder takes for a picture.

    Raises:
        DataError: when the entry is a path out of the parquet file's folder, or to no file there.
    """
    entry: Any = value.as_py()
    if not isinstance(entry, dict):
        return bytes(entry or b"")
    if entry["bytes"] is not None or entry["path"] is None:
        return bytes(entry["bytes"] or b"")
    folder = os.path.realpath(path.parent)
    try:
        target = Path(os.path.realpath(os.path.join(folder, entry["path"])))
        if not target.is_relative_to(folder):
            raise DataError(f"{path} names a picture outside its folder, {entry['path']}: move it there")
        return target.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise DataError(f"{path} names a picture that cannot be read, {entry['path']!r}: {error}") from error


def _hugging_face_names(schema: Any) -> list[str]:
    """Return the class names which Hugging Face `datasets` keeps in the schema's metadata, if any."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _name(label: Any, known: Sequence[str]) -> str | None:
    """Return the class name of a label in a file without class names."""
    if isinstance(label, str):
        return label
    return known[label] if label is not None and 0 <= label < len(known) else None
