"""Frozen features on disk, found by what they were computed from.

    <root>/<model_key>/part-<decoding>-<uuid>.parquet     key: 32 bytes, feature: dim float32

The folder's name is a hash of the model's weights and preprocessing, a feature's key the sha256 of
the picture's bytes. A changed model looks in another folder and a changed picture asks for another
key, so neither ever meets a stale feature, and nothing has to be invalidated. Parts of another version
of the decoder, to which pictures looked otherwise, are left alone.

A part is written under a temporary name, flushed to the disk and renamed: a writer that is killed
leaves no part, and writers on one folder never touch each other's files. Every page carries a
checksum, which is verified before a part is believed; a damaged part is set aside and its features
are computed again.
"""

import errno
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kngd_ray.data._decode import DECODING
from kngd_ray.data._footer import chunks
from kngd_ray.data._source import Keys
from kngd_ray.errors import DataError, StorageError

Features = npt.NDArray[np.float32]

STALE_SECONDS = 24 * 3600  # a temporary file this old belongs to no living writer
ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EROFS: "mount it writable",
    errno.EACCES: "correct its permissions",
}

_PART = f"part-{DECODING}-"

log = logging.getLogger(__name__)


class FeatureCache:
    """Features of one model, in files that any number of processes read and write at once.

    Every method raises StorageError when the folder cannot be read or written, with the way out.

    Args:
        root: folder of all caches.
        model_key: hash of weights and preprocessing, letters and digits.
        dim: length of a feature.
    """

    def __init__(self, root: str | os.PathLike[str], model_key: str, dim: int) -> None:
        assert re.fullmatch(r"[0-9A-Za-z_-]+", model_key), model_key
        self.folder = Path(root) / model_key
        self.dim = dim
        self._schema = pa.schema([("key", pa.binary(32)), ("feature", pa.list_(pa.float32(), dim))])
        self._seen: set[str] = set()
        self._where: dict[bytes, tuple[str, int]] = {}  # key to part and row

    def missing(self, keys: Keys) -> set[bytes]:
        """Return the `keys` (N,) without a feature, after a look for parts of other writers."""
        self._refresh()
        return {key for key in keys.tolist() if key not in self._where}

    def read(self, keys: Keys) -> Features:
        """Return the features (N, dim) of `keys` (N,).

        Raises:
            DataError: when a key has no feature, or its part was damaged after `missing` looked.
        """
        absent = self.missing(keys)
        wanted: dict[str, list[int]] = {}
        for n, key in enumerate(keys.tolist()):
            if key not in absent:
                wanted.setdefault(self._where[key][0], []).append(n)
        features = np.empty((len(keys), self.dim), np.float32)
        for name, places in wanted.items():
            part = self._load(name)
            if part is None:
                absent |= {keys[n] for n in places}
                continue
            features[places] = part[1][[self._where[keys[n]][1] for n in places]]
        if absent:
            raise DataError(f"{self.folder} lacks {len(absent)} features: run again to compute them")
        return features

    def write(self, keys: Keys, features: Features, places: Sequence[str] | None = None) -> None:
        """Add one part.

        Args:
            keys (N,): picture hashes.
            features (N, dim): their features.
            places: where the pictures are, for the message; None names their hashes.

        Raises:
            DataError: when a feature is not finite; the part is not written.
        """
        assert features.shape == (len(keys), self.dim), (features.shape, len(keys), self.dim)
        if not len(keys):
            return
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            where = keys[bad[0]].decode() if places is None else places[bad[0]]
            raise DataError(
                f"{where}: the model's feature is not finite ({len(bad)} of {len(keys)} pictures):"
                " compute in float32, or check the model's weights"
            )
        name = f"{_PART}{uuid.uuid4().hex}.parquet"
        self._publish(name, _to_bytes(keys, features, self._schema))
        self._add(name, keys)

    def _publish(self, name: str, data: bytes) -> None:
        """Make a file appear whole or not at all.

        Raises:
            StorageError: when it cannot be written.
        """
        temporary = self.folder / f".{name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(self.folder / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise StorageError(self._trouble("write features to", error)) from error

    def _refresh(self) -> None:
        """Index parts not seen before, and sweep away what killed writers left.

        Raises:
            StorageError: when the folder cannot be listed.
        """
        try:
            entries = sorted(self.folder.iterdir())
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise StorageError(self._trouble("read features in", error)) from error
        for path in entries:
            if path.suffix == ".tmp":
                _sweep(path)
            elif path.suffix == ".parquet" and path.name.startswith(_PART) and path.name not in self._seen:
                part = self._load(path.name)
                if part is not None:
                    self._add(path.name, part[0])

    def _add(self, name: str, keys: Keys) -> None:
        self._seen.add(name)
        for row, key in enumerate(keys.tolist()):
            self._where.setdefault(key, (name, row))

    def _load(self, name: str) -> tuple[Keys, Features] | None:
        """Read and verify a part; None when it is gone or was damaged and is now set aside.

        Raises:
            StorageError: when the disk or its permissions keep it from being read.
        """
        path = self.folder / name
        try:
            data = path.read_bytes()
        except FileNotFoundError:  # set aside by another process
            self._forget(name)
            return None
        except OSError as error:
            raise StorageError(self._trouble("read features in", error)) from error
        try:
            return _from_bytes(data, self._schema)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            log.warning("%s is damaged (%s): set aside, its features are computed again", path, error)
        try:
            path.rename(path.with_suffix(".corrupt"))
        except OSError as error:  # a cache that is read-only here: passing the part over is enough
            log.warning("%s cannot be renamed: %s", path, error)
        self._forget(name)
        return None

    def _forget(self, name: str) -> None:
        """Take a part out of the index, and never look at it again."""
        self._seen.add(name)
        self._where = {key: where for key, where in self._where.items() if where[0] != name}

    def _trouble(self, action: str, error: OSError) -> str:
        advice = ADVICE.get(error.errno or 0, "check the folder")
        return (
            f"cannot {action} {self.folder} ({error.strerror or error}): {advice},"
            " or set data.cache_dir to another folder"
        )


def _to_bytes(keys: Keys, features: Features, schema: Any) -> bytes:
    """Return a part: `keys` (N,) and `features` (N, dim), each page with its checksum."""
    raw = bytes.fromhex(keys.tobytes().decode())
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(keys), [None, pa.py_buffer(raw)]),
        pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1), pa.float32()), features.shape[1]),
    ]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(
        table,
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return bytes(sink.getvalue().to_pybytes())


def _from_bytes(data: bytes, schema: Any) -> tuple[Keys, Features]:
    """Return keys (N,) and features (N, dim) of a part.

    Raises:
        ValueError: when the part is sound but not one of ours, or holds a value that is not finite.
    """
    with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"columns {file.schema_arrow.names[:9]} are not those of a feature part")
        packed = {chunk.compression for chunk in chunks(file, schema.names)}
        # ours are not compressed, and so never larger in memory than they are on the disk
        if packed - {"UNCOMPRESSED"} or file.metadata.num_rows * schema.field("feature").type.list_size * 4 > len(data):
            raise ValueError("it unpacks to more than it holds")
        table = file.read()
    # The footer has no checksum; a flipped bit there shows as another column name or type.
    if not table.schema.equals(schema):
        raise ValueError(f"columns {table.schema.names} are not those of a feature part")
    if any(column.null_count for column in table.columns):
        raise ValueError("a value is missing")
    raw = b"".join(table.column("key").to_pylist())
    features = table.column("feature").combine_chunks().flatten().to_numpy()
    if not np.isfinite(features).all():
        raise ValueError("a feature is not finite")
    return np.frombuffer(raw.hex().encode(), "S64"), features.reshape(table.num_rows, -1)


def _sweep(temporary: Path) -> None:
    """Remove a killed writer's file; a failure is another process's luck or a read-only cache."""
    try:
        if time.time() - temporary.stat().st_mtime > STALE_SECONDS:
            temporary.unlink()
    except OSError:
        log.debug("%s is left where it is", temporary)
