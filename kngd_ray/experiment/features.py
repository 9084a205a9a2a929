"""Features of pictures and of crops of them, computed where they are not in the cache yet."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kngd_ray.clip import AnyModel, ClipModel, best_device, load_model
from kngd_ray.config import Config
from kngd_ray.data import Crops, FeatureCache, GivenFeatures, ImageSet, encode_missing, fill_cache
from kngd_ray.experiment.backend import Backend

Progress = Callable[[int, int], None]


def encode_pictures(
    config: Config,
    images: ImageSet,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    model: AnyModel,
    cache: FeatureCache | GivenFeatures,
    backend: Backend,
    progress: Progress | None,
    crops: Crops | None = None,
) -> frozenset[int]:
    """Fill the cache with the features of pictures, or of crops of them, with the backend's workers or in this process.

    Args:
        config: model, workers and what a bad picture does.
        images: the data set.
        indices: which pictures.
        model: the loaded model, for this process.
        cache: where the features go.
        backend: encodes, its session begun.
        progress: told of pictures done and to do.
        crops: encode these instead.

    Returns:
        Indices of the pictures that cannot be decoded.
    """
    skip = config.data.on_bad_image
    keys = images.keys[indices]
    if not cache.missing(keys if crops is None else crops.keys(keys).ravel()):
        return frozenset()
    assert isinstance(model, ClipModel)
    assert isinstance(cache, FeatureCache)
    stream = backend.stream(images, config.model, config.trainer, crops)
    if stream is not None:
        return fill_cache(images, indices, cache, stream, crops=crops, on_bad_image=skip, progress=progress)
    device = "cpu" if config.trainer.use_gpu is False else best_device()
    encoder = model if device == "cpu" else load_model(config.model, device)
    return encode_missing(
        images,
        indices,
        cache,
        lambda pictures: encoder.encode_images(pictures).numpy(),
        crops=crops,
        on_bad_image=skip,
        progress=progress,
    )
