"""``kngd-ray encode``: the features of a whole data set, ahead of the runs that need them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kngd_ray.clip import load_model
from kngd_ray.commands.display import Display
from kngd_ray.commands.prepare import encode as encode_pictures
from kngd_ray.commands.session import ray_for
from kngd_ray.config import load_config
from kngd_ray.data import FeatureCache, open_images


def encode(dataset: str, file: Path | None, overrides: Sequence[str], display: Display) -> dict[str, Any]:
    """Fill the cache for every picture of a data set.

    Args:
        dataset: parquet file, folder of pictures or ``embedded``.
        file: configuration file, or None.
        overrides: ``key=value`` settings.
        display: where progress is shown.

    Returns:
        How many pictures there are, were encoded and could not be decoded, and where the cache is.
    """
    config = load_config(file, overrides, forced={"data": {"path": dataset}})
    images = open_images(config.data)
    workers = config.trainer.least_workers
    with ray_for(config.trainer):
        model = load_model(config.model)
        cache = FeatureCache(config.data.cache_root, model.fingerprint, model.embed_dim)
        everything = np.arange(len(images))
        missing = len(cache.missing(images.keys))
        with display.pictures("encoding") as progress:
            bad = encode_pictures(config, images, everything, model, cache, use_ray=workers > 0, progress=progress)
    display.say(
        f"{len(images)} pictures, {missing - len(bad)} encoded now, {len(bad)} undecodable; features in {cache.folder}"
    )
    return {
        "pictures": len(images),
        "encoded": missing - len(bad),
        "undecodable": len(bad),
        "cache": str(cache.folder),
    }
