"""Data sets in parquet files.

Columns: `image` (bytes, or a struct {bytes, path} as Hugging Face `datasets` writes it), `label`
(integer, or a class name), and optionally `class_name`, `domain` and `split`, or as `data.columns`
calls them. Without `split`, the names of several files say it if they tell splits apart. A struct
entry with a path alone is read from disk, relative to its parquet file and never outside that file's
folder.
Pictures are streamed: one batch of a row group is in memory at a time.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kngd_ray.data._config import ColumnNames
from kngd_ray.data._footer import chunks
from kngd_ray.data._layout import file_splits, split_named
from kngd_ray.data._schema import (
    ROLES,
    check_named,
    check_texts,
    columns_of,
    hugging_face_names,
    lacks_content,
    picture_column,
)
from kngd_ray.data._source import DEFAULT_DOMAIN, Ints, Rows, content_key, listing, read_picture
from kngd_ray.data._walk import walk
from kngd_ray.errors import DataError

BATCH_ROWS = 256
BATCH_BYTES = 256 << 20  # of a batch, if every row of it held all that its row group has
MAX_RATIO, RATIO_FROM = 1000, 64 << 20  # to one is how far pictures never shrink; smaller columns may
MAX_NAME = 1000  # characters of a class, domain or split
Item = TypeVar("Item")


class Column(Protocol):
    """A column that is read in parts."""

    @property
    def column(self) -> str:
        """Its name."""

    def at_once(self, file: Any) -> int:
        """How many rows to unpack at once."""


class Content(Column, Protocol):
    """The content of a data set's rows besides the labels: one column of its files."""

    def check(self, file: Any, path: Path) -> None:
        """Refuse a file whose column is missing, of another type, or unpacks to more than it can hold."""

    def keys(self, column: Any, path: Path, first: int) -> list[bytes]:
        """Return the content keys of a batch whose first row has a number in its file."""


@dataclass(frozen=True)
class ParquetFiles:
    """Rows of several parquet files, numbered through.

    Attributes:
        paths: the files.
        starts: per file, the number of the first row of each row group, and of the row after its last.
        names: what their columns are called.
    """

    paths: tuple[str, ...]
    starts: tuple[tuple[int, ...], ...]
    names: ColumnNames

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

        def pictures(here: Ints, column: Any, path: Path) -> Iterator[tuple[int, bytes]]:
            for offset in np.flatnonzero(np.isin(here, rows)).tolist():
                yield int(here[offset]), _picture(column[offset], path)

        return self.stored(rows, Pictures(self.names), pictures)

    def stored(self, rows: Ints, content: Column, take: Callable[[Ints, Any, Path], Iterable[Item]]) -> Iterator[Item]:
        """Read the row groups that hold some of the ascending `rows` (M,).

        Args:
            rows: which rows.
            content: which column, and how much of it at once.
            take: makes items of a part: of the numbers of its rows (m,), the column and the file.

        Yields:
            The items.
        """
        for path, starts in zip(self.paths, self.starts, strict=True):
            wanted = rows[(rows >= starts[0]) & (rows < starts[-1])]
            if not len(wanted):
                continue
            groups = np.unique(np.searchsorted(starts, wanted, side="right") - 1).tolist()
            numbers = np.concatenate([np.arange(starts[group], starts[group + 1]) for group in groups])
            done = 0
            with open_parquet(Path(path)) as file:
                for batch in file.iter_batches(content.at_once(file), row_groups=groups, columns=[content.column]):
                    yield from take(numbers[done : done + len(batch)], batch.column(0), Path(path))
                    done += len(batch)


class Pictures:
    """Rows that are pictures.

    Args:
        names: of the columns.
    """

    def __init__(self, names: ColumnNames) -> None:
        self.column = names.image
        self._read = [names.image, *(name for role in ROLES if (name := getattr(names, role)) is not None)]

    def check(self, file: Any, path: Path) -> None:
        """Refuse a file without pictures, or with such as no pictures are.

        Raises:
            DataError: it has no column of them, one of another type, or one that unpacks to very much more than it is.
        """
        schema, size = file.schema_arrow, path.stat().st_size
        if self.column not in schema.names and "features" in schema.names:
            raise DataError(
                f"{path} holds features and no pictures: set model.name=precomputed to learn from features, or name"
                " a data set with pictures"
            )
        if self.column not in schema.names:
            raise DataError(lacks_content("image", f"the column of picture bytes `{self.column}`", schema, path))
        if not picture_column(kind := schema.field(self.column).type):
            raise DataError(
                f"{path}: column `{self.column}` is {kind}: it must be bytes, or a struct of bytes and path"
            )
        for chunk in chunks(file, self._read):
            packed, unpacked = min(chunk.total_compressed_size, size), chunk.total_uncompressed_size
            if unpacked > max(RATIO_FROM, MAX_RATIO * packed):
                raise DataError(
                    f"{path}: its column `{chunk.path_in_schema}` unpacks from {packed:,} bytes to {unpacked:,}, "
                    "as no pictures do: write it again with fewer copies of them"
                )

    def at_once(self, file: Any) -> int:
        """How many rows to unpack at once: a value that is stored once may be repeated in every row."""
        largest = max((chunk.total_uncompressed_size for chunk in chunks(file, self._read)), default=1)
        return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, largest)))

    def keys(self, column: Any, path: Path, first: int) -> list[bytes]:
        """Return the hash of each picture."""
        return [content_key(_picture(value, path)) for value in column]


def scan_parquet(paths: Sequence[Path], names: ColumnNames, content: Content | None = None) -> Rows:
    """Read labels, names, domains, splits and content keys of parquet files.

    Args:
        paths: files with one class list.
        names: what their columns are called.
        content: what their rows are; None is pictures.

    Returns:
        Everything but the content, row by row.
    """
    content = content or Pictures(names)
    starts: list[tuple[int, ...]] = []
    columns: dict[str, list[Any]] = {role: [] for role in ROLES}
    keys: list[bytes] = []
    origins: list[str | None] = []
    silent: list[str] = []  # files without domains
    lacking: dict[str, list[Path]] = {"label": [], "class_name": [], "domain": []}
    base = os.path.commonpath([path.parent for path in paths])
    for path, named in zip(paths, file_splits(paths), strict=True):
        sizes, found, hashes = _scan_file(path, names, content)
        starts.append(tuple(np.cumsum([len(keys), *sizes]).tolist()))
        keys += hashes
        shown = os.path.relpath(path, base)
        origins += [f"column {names.split} of {shown}" if "split" in found else shown] * len(hashes)
        if hashes and all(value is None for value in found.get("domain", [None])):
            silent.append(shown)
        for role, files in lacking.items():
            files += [] if role in found else [path]
        for role in ROLES:
            columns[role] += found.get(role, [named if role == "split" else None] * len(hashes))
    for role, files in lacking.items():
        if (column := getattr(names, role)) is not None:
            _check_partitions(files, column)
    domains = [DEFAULT_DOMAIN if value is None else str(value) for value in columns["domain"]]
    source = ParquetFiles(tuple(str(path) for path in paths), tuple(starts), names)
    unread = "features" if isinstance(content, Pictures) else "image"
    read = {role: name for role, name in names.renamed.items() if role != unread}
    other = [f"{role} from {name}" if name else f"no {role}" for role, name in read.items()]
    notes: tuple[str, ...] = (f"columns: {', '.join(other)}",) if other else ()
    if 0 < len(silent) < len(paths):
        held = "its rows are" if len(silent) == 1 else "their rows are"
        notes += (
            f"no domain is stated in {listing(silent, 6)}, as others do: {held} of the domain {DEFAULT_DOMAIN!r}",
        )
    return Rows(source, columns["label"], columns["class_name"], domains, columns["split"], keys, origins, notes)


def _check_partitions(paths: Sequence[Path], column: str) -> None:
    """Refuse a column that is in the names of folders alone, ``domain=photo/0.parquet``, as partitioned data has it.

    Args:
        paths: files without the column.
        column: its name.

    Raises:
        DataError: their folders state several values.
    """
    stated = [dict(part.partition("=")[::2] for part in path.parent.parts if "=" in part).get(column) for path in paths]
    if len({value for value in stated if value is not None}) > 1:
        folder = next(path.parent for path, value in zip(paths, stated, strict=True) if value is not None)
        raise DataError(
            f"{folder}: its name states the column {column!r}, as in a partitioned data set, and columns are read from"
            " files alone: write it into them, as pyarrow.dataset.dataset(FOLDER, partitioning='hive') reads it"
        )


def parquet_below(root: Path) -> list[Path]:
    """Find the parquet files of a folder, such as a snapshot of a data set of Hugging Face's.

    Args:
        root: the folder.

    Returns:
        The files in the order of their paths; none where there are none.

    Raises:
        DataError: they lie in several folders that are no splits, as the versions of one data set do.
    """
    files = sorted(walk(root, lambda name: name.lower().endswith(".parquet")))
    places = [file.parent.relative_to(root) for file in files]
    kinds = {tuple(part for part in place.parts if split_named(part) is None) for place in places}
    if len(kinds) > 1:
        named = listing(sorted({str(place) for place in places}), 8)
        raise DataError(
            f"{root} holds parquet files in several folders, {named}, which may be versions of one data set: name one"
            " of them in data.path, or the files"
        )
    return files


def _scan_file(path: Path, names: ColumnNames, content: Content) -> tuple[list[int], dict[str, list[Any]], list[bytes]]:
    """Return the sizes of a file's row groups, those columns that it has by their roles, and content keys.

    Raises:
        DataError: when it does not hold the rows that it declares, or names that are none.
    """
    keys: list[bytes] = []
    with open_parquet(path) as file:
        schema = file.schema_arrow
        _check_rows(file, path)
        check_named(schema, names, content.column, path)
        content.check(file, path)
        stored = columns_of(schema, names, path)
        check_texts(schema, stored, path)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        columns: dict[str, list[Any]] = {role: [] for role in stored}
        wanted = [content.column, *dict.fromkeys(stored.values())]
        once: dict[str, str] = {}  # a name is held once, however many rows have it
        for batch in file.iter_batches(content.at_once(file), columns=wanted):
            keys += content.keys(batch.column(content.column), path, len(keys))
            for role, column in stored.items():
                values = [_decoded(value, column, path) for value in batch.column(column).to_pylist()]
                columns[role] += [once.setdefault(v, v) if isinstance(v, str) else v for v in values]
            for text in once:
                if len(text) > MAX_NAME:
                    raise DataError(f"{path} has a name of {len(text):,} characters, {text[:40]!r}...: shorten it")
        if sum(sizes) != len(keys):
            raise DataError(f"{path} declares {sum(sizes):,} rows and holds {len(keys):,}: fetch or write it again")
    columns.setdefault("class_name", columns["label"])
    for role in stored.keys() | {"class_name"}:
        if role != "label":
            column = stored.get(role, stored["label"])
            known = hugging_face_names(schema, column)
            if role == "class_name" and known:
                _check_named_all(columns[role], known, column, path)
            if role == "domain":
                _check_domains(columns[role], column, path)
            columns[role] = [_name(value, known, bare=role in stored) for value in columns[role]]
    return sizes, columns, keys


def _check_domains(values: Sequence[Any], column: str, path: Path) -> None:
    """Refuse a column that states the domain of some rows alone; one without any is as good as none.

    Raises:
        DataError: for the first row without.
    """
    lost = [row for row, value in enumerate(values) if value is None]
    if lost and len(lost) < len(values):
        others = f", as have {len(lost)} of {len(values)} rows" if len(lost) > 1 else ""
        raise DataError(
            f"{path}, row {lost[0]} has no domain in the column `{column}`{others}: name the domain of every row, or"
            " read no domain, data.columns.domain=null"
        )


def _check_named_all(values: Sequence[Any], known: Sequence[str], column: str, path: Path) -> None:
    """Refuse numbers of classes beyond the names of a `ClassLabel`.

    Raises:
        DataError: for the first.
    """
    for row, value in enumerate(values):
        if isinstance(value, int) and value >= len(known):
            raise DataError(
                f"{path}, row {row}: column `{column}` has {value}, and the ClassLabel in the file's schema names"
                f" {len(known)} classes, 0 to {len(known) - 1}: write the file again with all names"
            )


def _check_rows(file: Any, path: Path) -> None:
    """Refuse a file that declares more rows than it has bytes, before it is unpacked.

    Raises:
        DataError: when it does.
    """
    metadata, size = file.metadata, path.stat().st_size
    rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if rows > size or min((metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)), default=0) < 0:
        raise DataError(f"{path} declares {rows:,} rows in {size:,} bytes: it is damaged, or no file of pictures")


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a parquet file, and name it in every error met while it is read.

    Raises:
        DataError: when the file is not parquet, damaged or unreadable.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, ValueError, TypeError, LookupError, MemoryError) as error:
        # ValueError: text that is no UTF-8; the rest is what a footer made up can lead to
        with path.open("rb") as stream:
            if stream.read(4) != b"PAR1":
                raise DataError(f"{path} is not a parquet file: name one in data.path") from error
        raise DataError(f"{path} is cut short or damaged: fetch or write it again") from error
    except OSError as error:
        reason = error.strerror or "damaged: fetch or write it again"
        raise DataError(f"{path} cannot be read: {reason}") from error


def _decoded(value: Any, column: str, path: Path) -> Any:
    """Return a name as text, and a number unchanged.

    Raises:
        DataError: when a name is bytes that are no UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: column `{column}` holds {value[:40]!r}, which is not UTF-8: write it as text"
        ) from error


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
        return read_picture(target)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} names a picture that cannot be read, {entry['path']!r}: {reason}") from error


def _name(value: Any, known: Sequence[str], *, bare: bool) -> str | None:
    """Return the name that a value is, or is the number of; of other numbers their digits where `bare`, or nothing."""
    if value is None or isinstance(value, str):
        return value
    return known[value] if 0 <= value < len(known) else str(value) if bare else None
