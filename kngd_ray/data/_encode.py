"""Features of pictures that are not in the cache yet."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from kngd_ray.data._cache import FeatureCache, Features
from kngd_ray.data._crops import Crops
from kngd_ray.data._decode import decode
from kngd_ray.data._images import ImageSet
from kngd_ray.data._source import Ints, Keys, content_key
from kngd_ray.errors import BadImage, DataError

Encoder = Callable[[list[Image.Image]], npt.NDArray[np.floating]]
"""m RGB pictures to features (m, d)."""

PART_ROWS = 512  # pictures between two writes: what a killed run computes again at most


class EncodedBatch(NamedTuple):
    """Features of the pictures of a batch that could be decoded, or of their crops, and the errors of the others.

    Attributes:
        keys (m,): hashes of the decoded pictures, in order; of crops, those of a picture one after another.
        features (m, d): their features; (0, 0) when m is 0.
        bad: for each undecodable picture its position in the batch and its error.
    """

    keys: Keys
    features: Features
    bad: dict[int, BadImage]


EncodedStream = Callable[[Ints], Iterator[tuple[Ints, EncodedBatch]]]
"""Pictures to encode, by index, to (indices of a batch in ascending order, what became of them)."""


def encode_batch(
    blobs: Sequence[bytes], places: Sequence[str], encoder: Encoder, crops: Crops | None = None
) -> EncodedBatch:
    """Decode and encode a batch, in this process or in an actor.

    Args:
        blobs: the pictures' bytes.
        places: where each is, for messages.
        encoder: called once with all that can be decoded, never with none.
        crops: encode these of the pictures; None encodes the pictures.

    Returns:
        Keys, features and errors.
    """
    pictures: list[Image.Image] = []
    keys: list[bytes] = []
    bad = {}
    for position, (blob, place) in enumerate(zip(blobs, places, strict=True)):
        try:
            picture = decode(blob, place)
        except BadImage as error:
            bad[position] = error
            continue
        key = content_key(blob)
        pictures += [picture] if crops is None else crops.of(picture, key)
        keys += [key] if crops is None else crops.keys(np.array([key], "S64"))[0].tolist()
    if not pictures:
        return EncodedBatch(np.empty(0, "S64"), np.empty((0, 0), np.float32), bad)
    features = np.asarray(encoder(pictures), np.float32)
    assert features.shape[:1] == (len(pictures),), features.shape
    return EncodedBatch(np.array(keys, "S64"), features, bad)


def read_batches(images: ImageSet, rows: Ints, size: int) -> Iterator[tuple[Ints, list[bytes]]]:
    """Read pictures of a data set in one pass over its files.

    Args:
        images: the data set.
        rows (M,): which pictures.
        size: how many are held at once.

    Yields:
        Indices of a batch, in ascending order, and the pictures' bytes.

    Raises:
        DataError: when a picture changed since it was indexed.
    """
    stream = images.read(rows)
    while batch := list(islice(stream, size)):
        for row, blob in batch:
            if content_key(blob) != images.keys[row]:
                raise DataError(f"{images.place(row)} changed while it was in use: run again")
        yield np.array([row for row, _ in batch]), [blob for _, blob in batch]


def encode_missing(
    images: ImageSet,
    indices: Sequence[int] | Ints,
    cache: FeatureCache,
    encoder: Encoder,
    *,
    crops: Crops | None = None,
    batch_size: int = 64,
    on_bad_image: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> frozenset[int]:
    """Fill the cache in this process; :func:`fill_cache` with a stream that encodes here.

    Args:
        images: the data set.
        indices (M,): pictures that need a feature.
        cache: where features are.
        encoder: computes them.
        crops: of which features are needed instead; None is the pictures themselves.
        batch_size: pictures per call of the encoder.
        on_bad_image: "error" raises the first `BadImage`, "skip" returns the indices of all.
        progress: called after each batch with pictures done and pictures to do.

    Returns:
        Those of `indices` that cannot be decoded, empty unless `on_bad_image` is "skip".
    """

    def stream(todo: Ints) -> Iterator[tuple[Ints, EncodedBatch]]:
        for rows, blobs in read_batches(images, todo, batch_size):
            yield rows, encode_batch(blobs, [images.place(row) for row in rows], encoder, crops)

    return fill_cache(images, indices, cache, stream, crops=crops, on_bad_image=on_bad_image, progress=progress)


def fill_cache(
    images: ImageSet,
    indices: Sequence[int] | Ints,
    cache: FeatureCache,
    stream: EncodedStream,
    *,
    crops: Crops | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> frozenset[int]:
    """Fill the cache with the features of pictures, each computed once however often it occurs.

    Whatever ends the call early, a bad picture or an interrupt, what was computed is written first.
    Besides the errors below, a full or read-only cache raises StorageError.

    Args:
        images: the data set.
        indices (M,): pictures that need a feature.
        cache: where features are.
        stream: encodes the pictures that it is given, or their crops, in batches of its own size and order.
        crops: of which features are needed instead; None is the pictures themselves.
        on_bad_image: "error" raises the first `BadImage`, "skip" returns the indices of all.
        progress: called after each batch with pictures done and pictures to do.

    Returns:
        Those of `indices` that cannot be decoded, empty unless `on_bad_image` is "skip".

    Raises:
        BadImage: when a picture cannot be decoded and `on_bad_image` is "error".
    """
    asked = np.unique(np.asarray(indices, np.int64))
    keys, first = np.unique(images.keys[asked], return_index=True)
    needed = keys.reshape(-1, 1) if crops is None else crops.keys(keys)
    missing = np.array(sorted(cache.missing(needed.ravel())), "S64")
    todo = np.sort(asked[first][np.isin(needed, missing).any(1)])
    bad: set[bytes] = set()
    done = 0
    with _PartWriter(cache) as writer:
        for rows, encoded in stream(todo):
            places = [images.place(row) for n, row in enumerate(rows) if n not in encoded.bad]
            writer.add(encoded, [place for place in places for _ in range(needed.shape[1])])
            for position, error in encoded.bad.items():
                if on_bad_image == "error":
                    raise error
                bad.add(images.keys[rows[position]])
            done += len(rows)
            if progress is not None:
                progress(done, len(todo))
    return frozenset(asked[np.isin(images.keys[asked], np.array(sorted(bad), "S64"))].tolist())


class _PartWriter:
    """Gathers batches into parts; leaving it, for whatever reason, writes the rest."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._pending: list[EncodedBatch] = []
        self._places: list[str] = []

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()

    def add(self, batch: EncodedBatch, places: Sequence[str]) -> None:
        if not len(batch.keys):
            return
        self._pending.append(batch)
        self._places += places
        if len(self._places) >= PART_ROWS:
            self._flush()

    def _flush(self) -> None:
        pending, places = self._pending, self._places
        self._pending, self._places = [], []  # first: a part the cache refuses is not offered again
        if pending:
            keys = np.concatenate([batch.keys for batch in pending])
            self._cache.write(keys, np.concatenate([batch.features for batch in pending]), places)
