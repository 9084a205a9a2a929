"""The index of a data set: everything about its pictures, or its features, but these."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kngd_ray.data._classes import resolve_classes
from kngd_ray.data._config import EMBEDDED, DataConfig
from kngd_ray.data._features import FeatureFiles, GivenFeatures, holds_pictures, scan_features
from kngd_ray.data._folder import scan_folder
from kngd_ray.data._parquet import scan_parquet
from kngd_ray.data._source import SPLITS, Ints, Keys, Rows, Source, missing_path
from kngd_ray.errors import DataError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Pictures of a data set, by index; small enough to send to a worker, which then reads its own part.

    Of a data set of features, a row with its feature stands for a picture.

    Attributes:
        labels (N,): class numbers, int64.
        domains (N,): domain names.
        splits (N,): "train" or "test".
        keys (N,): sha256 of each picture's bytes, or feature's values, 64 hexadecimal digits.
        class_names: name of class 0, 1 and so on.
        rows (N,): number of each picture in `source`, ascending.
        source: the files.
        all_names: names of all classes of the files in order of their labels, of which `class_names` are some.
    """

    labels: Ints
    domains: npt.NDArray[np.str_]
    splits: npt.NDArray[np.str_]
    keys: Keys
    class_names: tuple[str, ...]
    rows: Ints
    source: Source
    all_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for array in (self.labels, self.domains, self.splits, self.keys, self.rows):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def kind(self) -> Literal["parquet", "folder"]:
        """Format of the files."""
        return self.source.kind

    @property
    def paths(self) -> tuple[str, ...]:
        """The parquet files, or the picture file of every index."""
        if self.kind == "parquet":
            return self.source.paths
        return tuple(self.source.paths[row] for row in self.rows)

    @property
    def features(self) -> GivenFeatures | None:
        """The features, of a data set that has them in the place of pictures."""
        return GivenFeatures(self.source, self.keys, self.rows) if isinstance(self.source, FeatureFiles) else None

    def place(self, index: int) -> str:
        """Return where a picture is, for messages: its path, or its file and row counted from 0."""
        return self.source.place(int(self.rows[index]))

    def read(self, indices: Sequence[int] | Ints) -> Iterator[tuple[int, bytes]]:
        """Stream pictures in the order of the files, whatever the order of `indices` (M,).

        Args:
            indices: which pictures; one named twice is read once.

        Yields:
            Index and bytes of each picture. Bytes that cannot be decoded are yielded all the same.
        """
        wanted = np.unique(np.asarray(indices, np.int64))
        rows = self.rows[wanted]
        for row, data in self.source.read(rows):
            yield int(wanted[np.searchsorted(rows, row)]), data


def open_images(config: DataConfig, *, test_fraction: float | None = None, features: bool = False) -> ImageSet:
    """Index a data set, reading every picture or feature once for its hash.

    Args:
        config: its path, class list and test fraction.
        test_fraction: part held out where the data states no split, 1 for all; None is the configuration's.
        features: learn from the column `features`, not from pictures.

    Returns:
        Pictures of the selected classes, in the order of the files.

    Raises:
        DataError: when the data set is missing, empty or not as the formats ask.
    """
    rows = _scan(config.path, features)
    if not rows.keys:
        content = "features" if features else "pictures"
        raise DataError(f"{_shown(config.path)} has no rows: name a data set with {content} in data.path")
    labels, class_names, all_names = resolve_classes(rows, config.classes)
    kept = np.flatnonzero(labels >= 0)
    labels, keys = labels[kept], np.array(rows.keys, "S64")[kept]
    domains = np.array(rows.domains, np.str_)[kept]
    splits = _stated_splits(rows)
    fraction = config.test_fraction if test_fraction is None else test_fraction
    return ImageSet(
        labels=labels,
        domains=domains,
        splits=hash_split(labels, domains, keys, fraction) if splits is None else splits[kept],
        keys=keys,
        class_names=class_names,
        rows=kept,
        source=rows.source,
        all_names=all_names,
    )


def hash_split(labels: Ints, domains: npt.NDArray[np.str_], keys: Keys, fraction: float) -> npt.NDArray[np.str_]:
    """Hold out a fraction of each class and domain, the pictures with the lowest hashes.

    A picture's side depends on no random number and no file order. Copies of it fall on one side,
    also when they lie in different classes or domains: held out in one is held out in all.

    Args:
        labels (N,): class numbers.
        domains (N,): domain names.
        keys (N,): picture hashes.
        fraction: part held out.

    Returns:
        "train" or "test" for each row (N,).
    """
    names, domain = np.unique(domains, return_inverse=True)
    group = labels * len(names) + domain
    order = np.argsort(group, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    pictures = [np.unique(keys[rows]) for rows in members]
    held_out = np.concatenate([part[: int(fraction * len(part) + 0.5)] for part in pictures])
    return np.where(np.isin(keys, held_out), "test", "train")


def _scan(path: str | tuple[str, ...], features: bool) -> Rows:
    """Scan files or a folder.

    Raises:
        DataError: when the path is missing, a folder is one of several paths, or there are pictures for features.
    """
    if path == EMBEDDED and features:
        raise DataError(holds_pictures(EMBEDDED))
    if path == EMBEDDED:
        return scan_parquet([Path(str(resources.files("kngd_ray"))) / "assets" / "emoji.parquet"])
    # absolute: workers, which read the files too, run in folders of their own
    paths = [Path(name).expanduser().absolute() for name in ([path] if isinstance(path, str) else path)]
    for each in paths:
        if not os.path.exists(each):  # Path.exists raises where it may not look
            raise DataError(missing_path(each))
    if len(paths) == 1 and paths[0].is_dir() and features:
        raise DataError(holds_pictures(str(paths[0])))
    if len(paths) == 1 and paths[0].is_dir():
        return scan_folder(paths[0])
    for each in paths:
        if each.is_dir():
            raise DataError(f"{each} is a folder: data.path takes several parquet files or one folder")
    return scan_features(paths) if features else scan_parquet(paths)


def _shown(path: str | tuple[str, ...]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _stated_splits(rows: Rows) -> npt.NDArray[np.str_] | None:
    """Return the splits (N,) the rows state, or None when no row states one.

    Raises:
        DataError: when a row states another split than train, test or val, or only some rows state one.
    """
    if all(split is None for split in rows.splits):
        return None
    for row, split in enumerate(rows.splits):
        if split not in SPLITS:
            stated = "no split, though others do" if split is None else f"the split {split!r}"
            raise DataError(f"{rows.source.place(row)} states {stated}: use train, test or val (a test split)")
    return np.array([SPLITS[str(split)] for split in rows.splits])
