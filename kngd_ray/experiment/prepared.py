"""From a task to what its fits and evaluations compute with: features, and pictures where towers are trained."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kngd_ray.clip import AnyModel, TuneOptions, best_device, load_model
from kngd_ray.config import Config
from kngd_ray.data import Crops, FeatureCache, FeatureFiles, GivenCrops, GivenFeatures, ImageSet, PictureFile, Split
from kngd_ray.experiment.backend import HERE, Backend
from kngd_ray.experiment.features import Progress, encode_pictures
from kngd_ray.experiment.task import Task, one_support, supports
from kngd_ray.training.batches import Shots, Support
from kngd_ray.training.evaluation import ID, set_name
from kngd_ray.training.fit import Towers
from kngd_ray.training.pictures import Pictures
from kngd_ray.training.pixels import TestPictures
from kngd_ray.training.restoring import identity_of

PICTURES = "pictures.arrow"  # the shots of a run that learns from pictures


@dataclass(frozen=True)
class TaskData:
    """Everything that fits and evaluations need, computed once per run.

    Attributes:
        config: what was asked for.
        model: the CLIP model, or what stands for it.
        images: the data set's index.
        class_embeddings: (C, d) unit text embeddings.
        splits: support set and test sets by seed.
        cache: where the features are.
        skipped: undecodable pictures that were left out.
        from_pictures: whether fits that train towers learn from pictures, or the image tower is frozen.
        crops: that heads learn from beside the shots; None without.
    """

    config: Config
    model: AnyModel
    images: ImageSet
    class_embeddings: torch.Tensor
    splits: dict[int, Split]
    cache: FeatureCache | GivenFeatures
    skipped: int
    from_pictures: bool
    crops: Crops | GivenCrops | None

    @property
    def identity(self) -> dict[str, Any]:
        """What weights trained on this belong to."""
        return identity_of(self.model, self.config.model, self.images.class_names, self.config.data.templates)

    @property
    def one_support(self) -> bool:
        """Whether all of several seeds learn from the same shots."""
        return one_support(self.splits, ordered=self.config.protocol == "stream")

    def support(self, seed: int) -> Support:
        """The training shots of a seed, as features of the pretrained model, with their crops."""
        rows = self.splits[seed].support
        shots = self.features(rows)
        if self.crops is None:
            return shots
        if isinstance(self.crops, GivenCrops):
            return replace(shots, crops=torch.from_numpy(self.crops.of(self.images.rows[rows])))
        keys = self.crops.keys(self.images.keys[rows])
        crops = torch.from_numpy(self.cache.read(keys.ravel())).unflatten(0, keys.shape)
        return replace(shots, crops=crops)

    def shots(self, seed: int, tune: TuneOptions, folder: Path) -> Shots:
        """What a fit learns from: features, or pictures where the image tower is trained.

        Args:
            seed: of the support set.
            tune: what is trained.
            folder: of the run, in which the pictures are kept where all ranks see them.

        Returns:
            The training shots.
        """
        if not (tune.images and self.from_pictures):
            return self.support(seed)
        rows = self.splits[seed].support
        kept = supports(self.splits)
        path = folder / PICTURES
        if not path.is_file() or PictureFile.open(path).keys.tolist() != self.images.keys[kept].tolist():
            PictureFile.write(path, self.images, kept)
        labels = torch.from_numpy(self.images.labels[rows].copy())
        return Pictures(path, torch.from_numpy(np.searchsorted(kept, rows)), labels)

    @cached_property
    def evaluator(self) -> AnyModel:
        """The model where trained towers are evaluated: on this machine's GPU if the run is to use one."""
        elsewhere = self.config.tune.images and self.device != str(self.model.device)
        return load_model(self.config.model, self.device) if elsewhere else self.model

    @property
    def device(self) -> str:
        """Where this process computes: on this machine's GPU, unless the run is to use none."""
        return "cpu" if self.config.trainer.use_gpu is False else best_device()

    def towers(self, tune: TuneOptions) -> Towers | None:
        """Where a fit has its towers from; None if it trains none."""
        if not tune.images:
            return None
        data = self.config.data
        return Towers(self.config.model.absolute(), self.images.class_names, data.templates)

    def tests(self, seed: int, tune: TuneOptions | None = None) -> dict[str, Shots]:
        """The test sets of a seed: ``id`` and each OOD domain.

        Args:
            seed: of the support set.
            tune: what was trained; None is nothing.

        Returns:
            Features by set; pictures where the image tower was trained.
        """
        split = self.splits[seed]
        made = self._pictures if tune is not None and tune.images and self.from_pictures else self.features
        return {ID: made(split.id_test), **{set_name(d): made(rows) for d, rows in split.ood.items()}}

    def _pictures(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> TestPictures:
        return TestPictures(self.images, rows)

    def features(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Support:
        """Pictures as features of the pretrained model.

        Args:
            rows: (m,) indices into the data set.

        Returns:
            Features and labels.
        """
        features = torch.from_numpy(self.cache.read(self.images.keys[rows]))
        return Support(features, torch.from_numpy(self.images.labels[rows].copy()))


def prepare(task: Task, backend: Backend = HERE, progress: Progress | None = None) -> TaskData:
    """Compute the features that are missing.

    Args:
        task: data, shots and model.
        backend: encodes, its session begun.
        progress: called with the numbers of pictures done and to do.

    Returns:
        The prepared task.
    """
    config, images, splits, model = task.config, task.images, task.splits, task.model
    class_embeddings = model.encode_classes(images.class_names, config.data.templates, known=task.known)
    cache = task.whole.features or FeatureCache(config.data.cache_root, model.fingerprint, model.embed_dim)
    bad: frozenset[int] = frozenset()
    while True:
        # A picture that cannot be decoded is replaced in the shots, and its replacement may be bad too.
        needed = np.unique(np.concatenate([split.indices for split in splits.values()]))
        found = encode_pictures(config, images, needed, model, cache, backend, progress)
        if not found - bad:
            break
        bad |= found
        splits = task.choose(bad)
    crops: Crops | GivenCrops | None = task.crops
    if isinstance(crops, Crops):
        encode_pictures(config, images, supports(splits), model, cache, backend, progress, crops)
    elif task.given_views:
        assert isinstance(images.source, FeatureFiles)
        crops = images.source.read_crops(images.rows[supports(splits)], task.given_views)
    return TaskData(config, model, images, class_embeddings, splits, cache, len(bad), task.from_pictures, crops)
