"""Features of pictures and of crops of them: computed where they are not in the cache yet, or given in files."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kngd_ray.clip import AnyModel, ClipModel, ModelConfig, PrecomputedModel, best_device, load_model, load_precomputed
from kngd_ray.config import Config
from kngd_ray.data import (
    Crops,
    EncodedBy,
    FeatureCache,
    FeatureFiles,
    GivenFeatures,
    ImageSet,
    encode_missing,
    fill_cache,
)
from kngd_ray.errors import DataError, UsageError
from kngd_ray.experiment.backend import Backend
from kngd_ray.training.restoring import load_fitted
from kngd_ray.training.resumable import SOURCE
from kngd_ray.training.views import views_of

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


def stated_model(config: ModelConfig, source: FeatureFiles, manifest: Mapping[str, Any] | None) -> ModelConfig:
    """What stands for the model of given features, with the logit scale of the model that computed them.

    Args:
        config: as it was asked for.
        source: the features' files.
        manifest: of a checkpoint that is to be used on them, whose logit scale is kept; None of a new fit.

    Returns:
        The same, its logit scale known where a file or the checkpoint states it.

    Raises:
        UsageError: the one that is asked for is another than the features' model has.
    """
    encoder, asked = source.encoded_by, config.logit_scale
    if asked is None and manifest is not None:
        return replace(config, logit_scale=manifest[SOURCE].get("logit_scale"))
    if encoder is None or manifest is not None:
        return config
    if asked is not None and not encoder.scales(asked):
        raise UsageError(
            f"model.logit_scale is {asked:g}, and the model that computed the features in {', '.join(source.paths)},"
            f" {encoder.name}, has {encoder.logit_scale:g}: leave model.logit_scale out, and it is taken from the file."
        )
    return config if asked is not None else replace(config, logit_scale=encoder.logit_scale)


def given_model(
    config: ModelConfig, source: FeatureFiles, images: ImageSet, manifest: Mapping[str, Any] | None
) -> PrecomputedModel:
    """What stands for the model of given features.

    Args:
        config: as :func:`stated_model` has it.
        source: the features' files.
        images: the whole data set.
        manifest: of a checkpoint that is to be used on them; None of a new fit.

    Returns:
        The model.

    Raises:
        DataError: the features are of another length or model than those that the checkpoint's fit learned from, or
            nobody knows which class embedding is whose.
    """
    names = images.all_names
    if manifest is None and config.class_embeddings is not None and images.label_order == "digits":
        raise DataError(
            f"{', '.join(source.paths)} has whole numbers as text for labels, which sort as text, '10' before '2', and"
            " nobody knows whether the rows of model.class_embeddings are: write the labels as integers, with their"
            " names in a column `class_name`, and the rows in order of the integers"
        )
    if manifest is None:
        encoder = source.encoded_by
        return load_precomputed(config, names, source.width, None if encoder is None else encoder.fingerprint)
    model = load_fitted(manifest, config)
    assert isinstance(model, PrecomputedModel)
    if model.embed_dim != source.width:
        raise DataError(
            f"{', '.join(source.paths)} has features of length {source.width}, and the fit learned from features of "
            f"length {model.embed_dim}: compute them with the same model"
        )
    check_encoder(source.encoded_by, model, ", ".join(source.paths))
    return model


def row_notes(images: ImageSet, model: AnyModel, shots: np.ndarray[Any, np.dtype[np.int64]]) -> list[str]:
    """What is to be said of which row of given class embeddings is whose, in lines.

    Args:
        images: the classes that are trained on.
        model: of a new fit.
        shots: indices of the shots.

    Returns:
        The order of text labels, and whether the shots match another order.
    """
    if not isinstance(model, PrecomputedModel) or not model.zero_shot or images.features is None:
        return []
    features = torch.from_numpy(images.features.read(images.keys[shots]))
    labels = torch.from_numpy(images.labels[shots].copy())
    return model.row_notes(images.class_names, features, labels, text=images.label_order != "numbers")


def check_encoder(encoder: EncodedBy | None, model: PrecomputedModel, place: str) -> None:
    """Refuse features of another model than a fit learned from, where both are known.

    Args:
        encoder: the model that computed the features.
        model: what stands for the model in the fit.
        place: where the features are, for the message.

    Raises:
        DataError: they are of another model.
    """
    if encoder is not None and model.encoded_by not in (None, encoder.fingerprint):
        raise DataError(
            f"{place} has features of the model {encoder}, and the fit learned from features of another one, of"
            f" fingerprint {str(model.encoded_by)[:12]}: encode the pictures with that model"
        )


def given_views(config: Config, source: FeatureFiles, rows: np.ndarray[Any, np.dtype[np.int64]], pictures: int) -> int:
    """How many crops of each shot a fit takes from files of features.

    Args:
        config: how many it asks for, and of which scale.
        source: the files.
        rows: of the shots of all seeds in them.
        pictures: of the largest support set.

    Returns:
        V; 0 where the fit sees none, or the files hold none.

    Raises:
        DataError: some files of the shots hold crops, and others none.
        UsageError: they are of another scale.
    """
    asked = views_of(config.fit_options, pictures)
    if not asked:
        return 0
    by_file = source.crops_below(rows)
    found = {path: held for path, held in by_file.items() if held is not None}
    if not found:
        return 0
    if len(found) < len(by_file):
        without = next(path for path in by_file if path not in found)
        raise DataError(
            f"{without} has no crops of its pictures, and {next(iter(found))} has: encode both with `views`, or set"
            " tune.views=0"
        )
    for path, held in found.items():
        if held.scale != tuple(config.tune.crop_scale):
            wanted, scale = (f"[{least:g},{most:g}]" for least, most in (config.tune.crop_scale, held.scale))
            raise UsageError(
                f"tune.crop_scale is {wanted}, and the crops in {path} are of {scale}: set tune.crop_scale={scale},"
                " encode the pictures again, or set tune.views=0"
            )
    return min(asked, *(held.views for held in found.values()))
