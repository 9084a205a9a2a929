"""``kngd-ray encode``: the features of a whole data set, ahead of the runs that need them.

Into the cache, where runs on the pictures find them; or into a folder that needs neither pictures nor model::

    <folder>/features.parquet        features, label, class_name, domain and split of every picture; crops, if asked
             class_embeddings.npy    (C, d) embeddings of the classes, in order of the labels
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kngd_ray.clip import PRECOMPUTED, ClipModel, TuneOptions, load_model, public_name, worded
from kngd_ray.config import Config
from kngd_ray.console import Display
from kngd_ray.data import Crops, EncodedBy, FeatureCache, ImageSet, open_images, write_features
from kngd_ray.errors import UsageError
from kngd_ray.experiment.backend import HERE, Backend
from kngd_ray.experiment.features import encode_pictures
from kngd_ray.storage import storage_errors
from kngd_ray.training.views import drawn

FEATURES = "features.parquet"
CLASS_EMBEDDINGS = "class_embeddings.npy"


def encode(
    config: Config,
    display: Display,
    backend: Backend = HERE,
    *,
    out: Path | None = None,
    views: int = 0,
) -> dict[str, Any]:
    """Compute the features of every picture of a data set.

    Args:
        config: its data and its model.
        display: where progress is shown.
        backend: encodes.
        out: a new or empty folder for features and class embeddings; None only fills the cache.
        views: random crops of each picture to encode as well, of ``tune.crop_scale``.

    Returns:
        How many pictures there are, were encoded and could not be decoded, and where the cache is. With a folder also
        ``features`` and ``class_embeddings``, its files, and ``settings``, which use them.

    Raises:
        UsageError: there is no model that encodes, `out` is a file or holds something, or there are no such crops.
    """
    if config.model.precomputed:
        raise UsageError(f"encode needs a model with towers, and model.name is {PRECOMPUTED}: name a CLIP model.")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not an empty folder: name another one.")
    if views < 0 or (views and config.tune.augment == "none"):
        wrong = f"views is {views}" if views < 0 else f"views is {views}, and tune.augment=none leaves no crops"
        raise UsageError(f"{wrong}: give 0 or more crops of each picture, or leave it out.")
    images = open_images(config.data)
    for note in images.notes:
        display.say(note)
    with backend.session(config.trainer):
        model = load_model(config.model)
        texts = None if out is None else _texts(model, images, config.data.templates, display)  # before the long part
        cache = FeatureCache(config.data.cache_root, model.fingerprint, model.embed_dim)
        everything = np.arange(len(images))
        missing = len(cache.missing(images.keys))
        with display.pictures("encoding") as progress:
            bad = encode_pictures(config, images, everything, model, cache, backend, progress)
        rows = np.setdiff1d(everything, list(bad))
        crops = drawn(model, config.tune, views) if views else None
        if crops is not None:
            with display.pictures("encoding crops") as progress:
                encode_pictures(config, images, rows, model, cache, backend, progress, crops)
    display.say(
        f"{len(images)} pictures, {missing - len(bad)} encoded now, {len(bad)} undecodable; features in {cache.folder}"
    )
    report: dict[str, Any] = {
        "pictures": len(images),
        "encoded": missing - len(bad),
        "undecodable": len(bad),
        "cache": str(cache.folder),
    }
    if out is not None and texts is not None:
        report |= _write(config, images, rows, cache, model, texts, crops, out)
        several = {0: "no crops", 1: "1 crop"}.get(views, f"{views} crops")
        display.say(
            f"{report['features']}: {len(rows)} rows of {model.embed_dim} features, and {several} of each picture"
        )
        if not views and config.tune.views and config.tune.augment != "none":
            display.say(
                "runs on it learn from the shots alone, as by tune.views=0; to write crops as well, encode with `views`"
                f" at {config.tune.views}, which takes {config.tune.views + 1} times the time and space"
            )
        display.say("to train, tune and evaluate on them, here or elsewhere, use the settings")
        display.out.print(shlex.join(report["settings"]), highlight=False, markup=False, soft_wrap=True)
    return report


def _texts(model: ClipModel, images: ImageSet, templates: Sequence[str], display: Display) -> Tensor:
    """Class embeddings (C, d), and remarks on their prompts."""
    names = images.class_names
    templates = worded(templates, names)
    for note in model.notes(names, templates):
        display.say(note)
    return model.encode_classes(names, templates)


def _write(
    config: Config,
    images: ImageSet,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    cache: FeatureCache,
    model: ClipModel,
    texts: Tensor,
    crops: Crops | None,
    out: Path,
) -> dict[str, Any]:
    """Write features and class embeddings; returns where they are, and the settings for them."""
    features, embeddings = (out.absolute() / name for name in (FEATURES, CLASS_EMBEDDINGS))
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        np.save(embeddings, texts.numpy())
    least, greatest = config.tune.crop_scale
    encoder = EncodedBy(public_name(model.name), model.fingerprint, model.logit_scale)
    write_features(features, images, rows, cache, encoder, crops, (least, greatest))
    settings = [
        f"data.path={features}",
        f"model.name={PRECOMPUTED}",
        f"model.class_embeddings={embeddings}",
        f"model.logit_scale={model.logit_scale!r}",
    ]
    if crops is not None and config.tune.crop_scale != TuneOptions().crop_scale:
        settings.append(f"tune.crop_scale=[{least!r},{greatest!r}]")
    return {"features": str(features), "class_embeddings": str(embeddings), "settings": settings}
