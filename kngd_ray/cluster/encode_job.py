"""Frozen features with Ray Data: read tasks near the files, a pool of encoders that load the model once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.exceptions import RayError

from kngd_ray.clip import ClipModel, ModelConfig, load_model
from kngd_ray.cluster.picture_source import BATCH, PictureSource
from kngd_ray.data import BadImage, Crops, EncodedBatch, EncodedStream, ImageSet, encode_batch
from kngd_ray.errors import KngdError

# A core is shared by an encoder and the reading that feeds it; with whole cores for the encoders a
# machine of as many cores would leave none to read with, and wait for ever.
_ENCODER_CPUS, _READER_CPUS = 0.8, 0.1


class _Encode:
    """An actor of the pool: decodes and encodes batches, and returns errors as text beside empty features."""

    def __init__(self, model: ModelConfig, gpu: bool, crops: Crops | None) -> None:
        self._source, self._crops = (model, "cuda" if gpu else "cpu"), crops

    @cached_property
    def _model(self) -> ClipModel:
        """Loaded for the first batch: of what fails while an actor starts, Ray would pass on the text alone."""
        return load_model(*self._source)

    def __call__(self, batch: pa.Table) -> pa.Table:
        blobs = batch["image"].to_pylist()
        encode = lambda pictures: self._model.encode_images(pictures).numpy()  # noqa: E731
        encoded = encode_batch(blobs, [""] * len(blobs), encode, self._crops)
        each = 1 if self._crops is None else self._crops.count
        features = iter(zip(encoded.keys.tolist(), encoded.features.tolist(), strict=True))
        keys, vectors, errors = [], [], []
        for position in range(len(blobs)):
            error = encoded.bad.get(position)
            own = [] if error is not None else list(islice(features, each))
            keys.append([key for key, _ in own])
            vectors.append([vector for _, vector in own])
            errors.append(None if error is None else str(error))
        return pa.table({
            "index": batch["index"],
            "keys": pa.array(keys, pa.list_(pa.binary())),
            "features": pa.array(vectors, pa.list_(pa.list_(pa.float32()))),
            "error": pa.array(errors, pa.string()),
        })


def ray_stream(
    images: ImageSet, model: ModelConfig, *, encoders: int, use_gpu: bool = False, crops: Crops | None = None
) -> EncodedStream:
    """A stream for :func:`kngd_ray.data.fill_cache` that encodes on the Ray cluster.

    Args:
        images: the data set, its files on storage that all nodes share.
        model: each actor of the pool loads it.
        encoders: size of the pool.
        use_gpu: give each actor a GPU.
        crops: encode these of the pictures; None encodes the pictures.

    Returns:
        The stream; batches arrive in any order. Ray must be up when it is used.
    """
    model = model.absolute()

    def stream(todo: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], EncodedBatch]]:
        if not len(todo):
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the caller shows its own
        context.issue_detectors_config.detectors = []  # it warns of memory that the imports of torch take
        context.raise_original_map_exception = True  # ours are not wrapped in Ray's
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs as errors, it raises as well
        blocks = _blocks_for(len(todo))
        encoded = ray.data.read_datasource(
            PictureSource(images, todo),
            override_num_blocks=blocks,
            num_cpus=_READER_CPUS,
        ).map_batches(
            _Encode,
            fn_constructor_args=(model, use_gpu, crops),
            batch_size=BATCH,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(size=min(encoders, blocks)),  # more would have nothing to do
            num_cpus=_ENCODER_CPUS,
            num_gpus=1 if use_gpu else None,
        )
        with _one_sentence():
            for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                if table.num_rows:
                    yield _unpacked(table, images)

    return stream


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Raise our own errors as they were on the worker, without its traceback, and name what was done in others.

    Raises:
        KngdError: a worker failed, or died.
    """
    try:
        yield
    except RayError as error:
        cause = getattr(error, "cause", error)
        lines = str(cause).splitlines() or [type(cause).__name__]
        reason = lines[0].rstrip(".")  # below it is Ray's advice to programmers, or its record of an actor
        if isinstance(cause, KngdError):
            raise type(cause)(reason) from error
        raise KngdError(
            f"encoding features with Ray failed ({reason}): fix that, "
            "or set trainer.num_workers=0 to encode in this process"
        ) from error


def _unpacked(table: pa.Table, images: ImageSet) -> tuple[npt.NDArray[np.int64], EncodedBatch]:
    rows = table["index"].to_numpy()
    errors = table["error"].to_pylist()
    good = [n for n, error in enumerate(errors) if error is None]
    keys = np.array([key for n in good for key in table["keys"][n].as_py()], "S64")
    vectors = [vector for n in good for vector in table["features"][n].as_py()]
    features = np.array(vectors, np.float32).reshape(len(keys), -1 if good else 0)
    bad = {n: BadImage(f"{images.place(rows[n])}{error}") for n, error in enumerate(errors) if error is not None}
    return rows, EncodedBatch(keys, features, bad)


def _blocks_for(pictures: int) -> int:
    """Enough blocks to feed a pool and to cache often, none smaller than a batch."""
    return int(min(max(pictures // BATCH, 1), 200))
