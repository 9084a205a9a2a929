"""Data sets: pictures of the package's schema, and features that were computed elsewhere.

pictures    encoded by the mini CLIP through the package's feature cache
features    NAME.parquet with ``features``, ``label``, ``split`` and optionally ``class_name`` and ``domain``; the
            classes' text embeddings (C, d) lie beside it as NAME_text.npy, in the order of the labels
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from benchmarks.few_shot.geometry import OFFSET, SCALE, SPREAD, to_clip
from benchmarks.few_shot.problem import Case, Problem
from kngd_ray.clip import ClipModel, load_model
from kngd_ray.config import Config, load_config, override
from kngd_ray.data import EMBEDDED, Split, open_images, sample_shots, select
from kngd_ray.errors import DataError
from kngd_ray.experiment.prepared import prepare
from kngd_ray.experiment.task import Task
from kngd_ray.training.batches import Support
from kngd_ray.training.evaluation import ID

MINI, CROPS, CLIP_GEOMETRY, REAL, MANY = "mini", "crops", "clip_geometry", "real", "many"
_EMBEDDED_DOMAINS = ("noto",)
_ALL = "all"  # domain of features that name none

Ints = npt.NDArray[np.int64]
Strings = npt.NDArray[np.str_]
Geometry = Literal["mini", "clip"]


class Data(Protocol):
    """What problems are made from.

    Attributes:
        name: of the data set.
        group: that its rows are kept and judged with.
        dev: whether training pictures stand for the test sets.
        identity: what else decides the figures; pictures of the mini CLIP have none.
    """

    name: str
    group: str
    dev: bool
    identity: tuple[Any, ...]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains that are trained on in turn."""
        ...

    @property
    def most_shots(self) -> Mapping[str, int]:
        """By domain the training rows of the class that has fewest."""
        ...

    def problem(self, domain: str, shots: int, seeds: Sequence[int]) -> Problem:
        """Support sets of a domain.

        Args:
            domain: trained on.
            shots: per class.
            seeds: of the support sets.

        Returns:
            The problem.
        """
        ...


class DataSet:
    """Pictures whose features are computed once, by the package's cache.

    Args:
        path: parquet file, or ``embedded``.
        dev: whether training pictures stand for the test sets.
        geometry: ``clip`` maps features and texts into CLIP's geometry.
        views: random crops of each shot, as ``tune.views`` has them, that methods learn from beside it; of features as
            they are, without crops, there are results of all methods.
    """

    def __init__(self, path: str, *, dev: bool = False, geometry: Geometry = "mini", views: int = 0) -> None:
        self.path = path
        self.name = "emoji" if path == EMBEDDED else Path(path).stem
        self.dev = dev
        self.group = CROPS if views else CLIP_GEOMETRY if geometry == "clip" else MINI
        self._geometry = geometry
        self.identity: tuple[Any, ...] = (geometry, SPREAD, OFFSET, SCALE) if geometry == "clip" else ()
        self.identity += ("views", views) if views else ()
        # drawn as in the results that are kept, which name their support sets by seed
        told = ["method=adamw", f"data.path={path}", "data.draw=first", "data.val=test", f"tune.views={views}"]
        self._config = load_config(overrides=told)
        self.images = open_images(self._config.data)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains that are trained on in turn."""
        if self.path == EMBEDDED:
            return _EMBEDDED_DOMAINS
        return _trained(self.images.domains, self.images.splits)

    @cached_property
    def most_shots(self) -> dict[str, int]:
        """By domain the training pictures of the class that has fewest."""
        images = self.images
        return _fewest(images.labels, images.domains, images.splits, len(images.class_names))

    @cached_property
    def _model(self) -> ClipModel:
        return load_model(self._config.model)

    def problem(self, domain: str, shots: int, seeds: Sequence[int]) -> Problem:
        """Support sets of a domain.

        Args:
            domain: trained on.
            shots: per class.
            seeds: of the support sets.

        Returns:
            The problem.
        """
        settings = {"data.train_domain": domain, "data.shots": shots, "seeds": list(seeds)}
        config = override(self._config, settings)

        def choose(bad: frozenset[int]) -> dict[int, Split]:
            return {seed: self._split(config, seed, bad) for seed in seeds}

        images = self.images
        prepared = prepare(
            Task(config, images, images, choose, choose(frozenset()), self._model, from_pictures=False, known=False)
        )
        cases = [Case(prepared.support(seed), prepared.tests(seed), seed) for seed in seeds]
        problem = Problem(cases, prepared.class_embeddings, prepared.model.logit_scale)
        return to_clip(problem) if self._geometry == "clip" else problem

    def shots(self, domain: str, count: int, seed: int) -> Ints:
        """Rows of a support set, pictures that cannot be decoded among them.

        Args:
            domain: trained on.
            count: per class.
            seed: of the support set.

        Returns:
            (C * count,) indices of pictures.
        """
        config = override(self._config, {"data.train_domain": domain, "data.shots": count, "seeds": [seed]})
        return self._split(config, seed, frozenset()).support

    def _split(self, config: Config, seed: int, bad: frozenset[int]) -> Split:
        images = self.images
        split = select(images, config.data, seed, bad)
        if not self.dev:
            return split
        train = (images.splits == "train") & ~np.isin(images.keys, images.keys[split.support])
        train[list(bad)] = False
        own = images.domains == config.data.train_domain
        ood = {domain: np.flatnonzero(train & (images.domains == domain)) for domain in split.ood}
        return replace(
            split, id_test=np.flatnonzero(train & own), ood={d: rows for d, rows in ood.items() if len(rows)}
        )


@dataclass(frozen=True, eq=False)
class Features:
    """Embeddings of pictures and of their classes, by one CLIP model.

    Attributes:
        features: (N, d) float32, of unit length.
        labels: (N,) class numbers.
        domains: (N,) domain names.
        splits: (N,) "train" or "test".
        class_names: C names.
        class_embeddings: (C, d) float32, of unit length.
    """

    features: npt.NDArray[np.float32]
    labels: Ints
    domains: Strings
    splits: Strings
    class_names: tuple[str, ...]
    class_embeddings: npt.NDArray[np.float32]

    def digest(self) -> str:
        """Hash of all that decides a figure."""
        sha = hashlib.sha256()
        for array in (self.features, self.labels, self.class_embeddings):
            sha.update(np.ascontiguousarray(array).tobytes())
        for names in (self.domains, self.splits):
            sha.update("\n".join(names.tolist()).encode())
        return sha.hexdigest()[:16]


def has_features(path: str) -> bool:
    """Whether a parquet file has a column of features."""
    return path != EMBEDDED and Path(path).is_file() and "features" in pq.read_schema(path).names


def read_features(path: Path, class_embeddings: Path | None = None) -> Features:
    """Read features and the classes' text embeddings.

    Args:
        path: parquet file.
        class_embeddings: ``.npy`` of (C, d) text embeddings; None is NAME_text.npy beside the parquet file.

    Returns:
        Both, each row scaled to length 1. A DataError tells what cannot be used.
    """
    texts_path = class_embeddings or path.with_name(f"{path.stem}_text.npy")
    if not texts_path.is_file():
        raise DataError(
            f"{path.name}: there is no file of class embeddings {texts_path}: name one with --class-embeddings"
        )
    texts = np.load(texts_path, allow_pickle=False)
    if texts.ndim != 2:
        raise DataError(f"{texts_path.name}: has the shape {texts.shape}, not (classes, dimensions)")
    table = pq.read_table(path)
    missing = [name for name in ("features", "label", "split") if name not in table.column_names]
    if missing:
        raise DataError(f"{path.name}: has no column {', '.join(missing)}")
    rows = table["features"].combine_chunks()
    lengths = np.diff(rows.offsets.to_numpy()) if hasattr(rows, "offsets") else np.array([rows.type.list_size])
    if (lengths != texts.shape[1]).any():
        raise DataError(f"{path.name}: features have {int(lengths[0])} numbers, class embeddings {texts.shape[1]}")
    features = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(table), texts.shape[1])
    labels = table["label"].to_numpy().astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(texts):
        raise DataError(f"{path.name}: labels go from {labels.min()} to {labels.max()}, there are {len(texts)} classes")
    splits = np.array(table["split"].to_pylist(), str)
    unknown = sorted(set(splits.tolist()) - {"train", "test"})
    if unknown:
        raise DataError(f"{path.name}: there is a split {unknown[0]!r}, where only train and test are known")
    named = "domain" in table.column_names
    domains = np.array(table["domain"].to_pylist() if named else [_ALL] * len(table), str)
    return Features(
        _unit(features, path.name), labels, domains, splits, _names(table, labels, len(texts)), _unit(texts, path.name)
    )


def _unit(rows: npt.NDArray[Any], name: str) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    bad = ~(np.isfinite(lengths) & (lengths > 0)).ravel()
    if bad.any():
        raise DataError(f"{name}: embedding {int(np.flatnonzero(bad)[0])} is 0 or not finite")
    return np.asarray(rows / lengths, np.float32)


def _names(table: Any, labels: Ints, classes: int) -> tuple[str, ...]:
    found = {}
    if "class_name" in table.column_names:
        found = dict(zip(labels.tolist(), table["class_name"].to_pylist(), strict=True))
    return tuple(str(found.get(label, label)) for label in range(classes))


class FeatureSet:
    """Features that were computed elsewhere, or made.

    Args:
        name: of the data set.
        rows: features and text embeddings.
        logit_scale: of the model that they are from; OpenAI's CLIPs have 100.
        group: that its rows are kept and judged with.
        dev: whether training rows stand for the test sets.
    """

    def __init__(
        self, name: str, rows: Features, *, logit_scale: float = SCALE, group: str = REAL, dev: bool = False
    ) -> None:
        self.name, self.rows, self.logit_scale, self.group, self.dev = name, rows, logit_scale, group, dev
        self.identity: tuple[Any, ...] = (rows.digest(), logit_scale)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Domains that are trained on in turn."""
        return _trained(self.rows.domains, self.rows.splits)

    @cached_property
    def most_shots(self) -> dict[str, int]:
        """By domain the training rows of the class that has fewest."""
        return _fewest(self.rows.labels, self.rows.domains, self.rows.splits, len(self.rows.class_names))

    def problem(self, domain: str, shots: int, seeds: Sequence[int]) -> Problem:
        """Support sets of a domain, drawn as those of pictures are.

        Args:
            domain: trained on.
            shots: per class.
            seeds: of the support sets.

        Returns:
            The problem.
        """
        own, tests = self.rows.domains == domain, self.rows.splits == "test"
        others = sorted(set(self.rows.domains[tests].tolist()) - {domain})
        candidates = np.flatnonzero(own & (self.rows.splits == "train"))
        cases = []
        for seed in seeds:
            support = sample_shots(self.rows.labels, candidates, shots, seed, self.rows.class_names, draw="first")
            tested = tests
            if self.dev:
                tested = self.rows.splits == "train"
                tested[support] = False
            sets = {ID: own, **{other: self.rows.domains == other for other in others}}
            cases.append(
                Case(
                    self._support(support),
                    {name: self._support(np.flatnonzero(tested & which)) for name, which in sets.items()},
                    seed,
                )
            )
        return Problem(cases, torch.from_numpy(self.rows.class_embeddings.copy()), self.logit_scale)

    def _support(self, rows: Ints) -> Support:
        return Support(torch.from_numpy(self.rows.features[rows]), torch.from_numpy(self.rows.labels[rows]))


def _trained(domains: Strings, splits: Strings) -> tuple[str, ...]:
    return tuple(sorted(set(domains[splits == "train"].tolist())))


def _fewest(labels: Ints, domains: Strings, splits: Strings, classes: int) -> dict[str, int]:
    train = splits == "train"
    return {
        domain: int(np.bincount(labels[train & (domains == domain)], minlength=classes).min())
        for domain in sorted(set(domains.tolist()))
    }
