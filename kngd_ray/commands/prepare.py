"""From a configuration to features: the data set, the CLIP model, the shots and the test sets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kngd_ray.clip import ClipModel, load_model
from kngd_ray.config import Config
from kngd_ray.data import FeatureCache, ImageSet, Split, encode_missing, fill_cache, open_images, select
from kngd_ray.training.batches import Support
from kngd_ray.training.classifier import identity_of
from kngd_ray.training.evaluation import ID

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """Everything that fits and evaluations need, computed once per run.

    Attributes:
        config: what was asked for.
        model: the CLIP model.
        images: the data set's index.
        class_embeddings: (C, d) unit text embeddings.
        splits: support set and test sets by seed.
        cache: where the features are.
        skipped: undecodable pictures that were left out.
    """

    config: Config
    model: ClipModel
    images: ImageSet
    class_embeddings: torch.Tensor
    splits: dict[int, Split]
    cache: FeatureCache
    skipped: int

    @property
    def identity(self) -> dict[str, Any]:
        """What weights trained on this belong to."""
        return identity_of(self.model, self.config.model, self.images.class_names, self.config.data.templates)

    def support(self, seed: int) -> Support:
        """The training shots of a seed."""
        return self._features(self.splits[seed].support)

    def tests(self, seed: int) -> dict[str, Support]:
        """The test sets of a seed: ``id`` and each OOD domain."""
        split = self.splits[seed]
        return {
            ID: self._features(split.id_test),
            **{d: self._features(rows) for d, rows in split.ood.items()},
        }

    def _features(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Support:
        features = torch.from_numpy(self.cache.read(self.images.keys[rows]))
        return Support(features, torch.from_numpy(self.images.labels[rows].copy()))


@dataclass(frozen=True)
class Task:
    """A configuration whose data and model are known to serve it; nothing expensive has happened yet.

    Attributes:
        config: what is asked for.
        images: the data set's index.
        splits: support set and test sets by seed.
        model: the CLIP model.
    """

    config: Config
    images: ImageSet
    splits: dict[int, Split]
    model: ClipModel


def open_task(config: Config) -> Task:
    """Index the data set, draw the shots of every seed, load the model.

    Args:
        config: what is asked for.

    Returns:
        The task.
    """
    images = open_images(config.data)
    splits = {seed: select(images, config.data, seed) for seed in config.seeds}
    return Task(config, images, splits, load_model(config.model))


def prepare(task: Task, *, use_ray: bool = False, progress: Progress | None = None) -> Prepared:
    """Compute the features that are missing.

    Args:
        task: data, shots and model.
        use_ray: encode with Ray Data; Ray must be up.
        progress: told of pictures done and to do.

    Returns:
        The prepared task.
    """
    config, images, splits, model = task.config, task.images, task.splits, task.model
    class_embeddings = model.encode_classes(images.class_names, config.data.templates)
    cache = FeatureCache(config.data.cache_root, model.fingerprint, model.embed_dim)
    bad: frozenset[int] = frozenset()
    while True:
        # A picture that cannot be decoded is replaced in the shots, and its replacement may be bad too.
        needed = np.unique(np.concatenate([split.indices for split in splits.values()]))
        found = encode(config, images, needed, model, cache, use_ray=use_ray, progress=progress)
        if not found - bad:
            break
        bad |= found
        splits = {seed: select(images, config.data, seed, excluded=bad) for seed in config.seeds}
    return Prepared(config, model, images, class_embeddings, splits, cache, len(bad))


def encode(
    config: Config,
    images: ImageSet,
    indices: np.ndarray[Any, np.dtype[np.int64]],
    model: ClipModel,
    cache: FeatureCache,
    *,
    use_ray: bool,
    progress: Progress | None,
) -> frozenset[int]:
    """Fill the cache with the features of pictures, with Ray Data or in this process.

    Args:
        config: model, workers and what a bad picture does.
        images: the data set.
        indices: which pictures.
        model: the loaded model, for this process.
        cache: where the features go.
        use_ray: encode with Ray Data; Ray must be up.
        progress: told of pictures done and to do.

    Returns:
        Indices of the pictures that cannot be decoded.
    """
    skip = config.data.on_bad_image
    missing = cache.missing(images.keys[indices])
    if use_ray and missing:
        from kngd_ray.ray_jobs import ray_stream

        stream = ray_stream(
            images, config.model, encoders=max(config.trainer.num_workers, 1), use_gpu=config.trainer.use_gpu
        )
        return fill_cache(images, indices, cache, stream, on_bad_image=skip, progress=progress)
    device = "cuda" if config.trainer.use_gpu and torch.cuda.is_available() else "cpu"
    encoder = model if device == "cpu" or not missing else load_model(config.model, device)
    return encode_missing(
        images,
        indices,
        cache,
        lambda pictures: encoder.encode_images(pictures).numpy(),
        on_bad_image=skip,
        progress=progress,
    )
