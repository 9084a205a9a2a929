"""The index of a data set: everything about its pictures, or its features, but these."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from kngd_ray.data._classes import LabelOrder, named_as_splits, order_of, resolve_classes
from kngd_ray.data._config import EMBEDDED, ColumnNames, DataConfig
from kngd_ray.data._features import FeatureFiles, GivenFeatures, holds_pictures, scan_features
from kngd_ray.data._files import data_files
from kngd_ray.data._folder import is_picture, scan_folder
from kngd_ray.data._parquet import parquet_below, scan_parquet
from kngd_ray.data._source import Ints, Keys, Rows, Source, hint, listing
from kngd_ray.data._splits import count_copies, settle_splits
from kngd_ray.data._walk import walk
from kngd_ray.errors import DataError, closest, spelled

_ALIKE = 0.8  # likeness from which a class is named as the one that may be meant


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
        notes: sentences on how the data set was read: what states its splits, what was left out, what is there twice.
        label_order: whether labels are numbers or text, or text that is all digits and in another order than numbers.
        numbered: whether labels are bare numbers, which the configuration names.
    """

    labels: Ints
    domains: npt.NDArray[np.str_]
    splits: npt.NDArray[np.str_]
    keys: Keys
    class_names: tuple[str, ...]
    rows: Ints
    source: Source
    all_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    label_order: LabelOrder = "numbers"
    numbered: bool = False

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

    @cached_property
    def digest(self) -> str:
        """What tells a data set from any other: of its pictures, classes, domains and splits; 32 hexadecimal digits.

        The order of rows, and where the files lie, have no part in it.
        """
        return self._digest(np.arange(len(self)))

    def test_digest(self, domains: Collection[str]) -> str:
        """The same of the test pictures of some domains alone."""
        return self._digest(np.flatnonzero((self.splits == "test") & np.isin(self.domains, list(domains))))

    def _digest(self, which: Ints) -> str:
        names = [self.class_names[label] for label in self.labels[which].tolist()]
        keys, domains, splits = (array[which].tolist() for array in (self.keys, self.domains, self.splits))
        digest = hashlib.sha256()
        for key, *rest in sorted(zip(keys, names, domains, splits, strict=True)):
            digest.update(key + "\0".join(rest).encode() + b"\n")
        return digest.hexdigest()[:32]

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


def open_images(
    config: DataConfig, *, test_fraction: float | None = None, features: bool = False, absent: bool = False
) -> ImageSet:
    """Index a data set, reading every picture or feature once for its hash.

    Args:
        config: its path, class list and test fraction.
        test_fraction: part held out where the data states no split, 1 for all; None is the configuration's.
        features: learn from the column `features`, not from pictures.
        absent: whether the configuration may name classes that the data lacks.

    Returns:
        Pictures of the selected classes, in the order of the files.

    Raises:
        DataError: when the data set is missing, empty or not as the formats ask.
    """
    rows = _scan(config, features)
    if not rows.keys:
        content = "features" if features else "pictures"
        raise DataError(f"{_shown(config.path)} has no rows: name a data set with {content} in data.path")
    labels, class_names, all_names = resolve_classes(rows, config.classes, absent=absent)
    fraction = config.test_fraction if test_fraction is None else test_fraction
    keys, domains = np.array(rows.keys, "S64"), np.array(rows.domains, np.str_)
    sides, sentence = settle_splits(rows, labels, domains, keys, config.val, fraction)
    kept = np.flatnonzero(sides != "")
    copies = count_copies(labels[kept], keys[kept], in_time=config.time is not None)
    return ImageSet(
        labels=labels[kept],
        domains=domains[kept],
        splits=sides[kept],
        keys=keys[kept],
        class_names=class_names,
        rows=kept,
        source=rows.source,
        all_names=all_names,
        notes=(*rows.notes, sentence, *copies, *named_as_splits(class_names)),
        label_order=order_of(rows.labels),
        numbered=all(name is None for name in rows.names),
    )


def arrange(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Number the classes of a data set as another numbers them, by their names.

    Args:
        images: the data set; it may lack classes, and have them in another order.
        class_names: names of all classes in order of their labels.

    Returns:
        The same pictures; of its files' other classes that were not selected, a note says that they are left out.

    Raises:
        DataError: when it has pictures of other classes, or none.
    """
    number = {name: n for n, name in enumerate(class_names)}
    present = [name for n, name in enumerate(images.class_names) if (images.labels == n).any()]
    unknown = [name for name in present if name not in number]
    if not present or unknown:
        others = listing([spelled(name) for name in unknown], 8) if unknown else "no pictures of them"
        known = [name for name in present if name in number]
        way = f": leave them out with data.classes=[{','.join(known)}]" if known else ", and none that it knows"
        raise DataError(
            f"the fit knows the classes {listing(class_names)}, and the data has {others}"
            f"{hint(unknown[0], class_names) if unknown else ''}{way if unknown else ''}"
        )
    labels = np.array([number.get(name, -1) for name in images.class_names], np.int64)[images.labels]
    # one that is written otherwise looks like one that was meant to be left out, and figures are of the rest alone
    left_out = [
        repr(name) + "".join(f" (the nearest name is {match!r})" for match in closest(name, class_names, cutoff=_ALIKE))
        for name in images.all_names
        if name not in images.class_names and name not in number
    ]
    told = [f"pictures of classes that the fit does not know are left out: {listing(left_out, 8)}"] if left_out else []
    return replace(images, labels=labels, class_names=tuple(class_names), notes=(*images.notes, *told))


def _scan(config: DataConfig, features: bool) -> Rows:
    """Scan files or a folder.

    Raises:
        DataError: when the path is missing, a folder is one of several paths, or there are pictures for features.
    """
    path = config.path
    if path == EMBEDDED and features:
        raise DataError(holds_pictures(EMBEDDED))
    if path == EMBEDDED:
        emoji = Path(str(resources.files("kngd_ray"))) / "assets" / "emoji.parquet"
        return _unnamed(scan_parquet([emoji], ColumnNames()), config, EMBEDDED)
    paths = data_files(path)
    if len(paths) == 1 and paths[0].is_dir():
        found = parquet_below(paths[0])
        if not found or not features:
            pictures = next(walk(paths[0], is_picture), None) is not None
            if features and pictures:
                raise DataError(holds_pictures(str(paths[0])))
            if found and pictures:
                raise DataError(f"{paths[0]} holds pictures and parquet files: name the files, or one folder of either")
            if not found:
                return _unnamed(scan_folder(paths[0], config), config, str(paths[0]))
        rows = _scan_files(found, config, features)
        names = listing([str(file.relative_to(paths[0])) for file in found], 6)
        return rows._replace(notes=(f"read {len(found)} parquet files: {names}", *rows.notes))
    for each in paths:
        if each.is_dir():
            raise DataError(f"{each} is a folder: data.path takes several parquet files or one folder")
    return _scan_files(paths, config, features)


def _scan_files(paths: Sequence[Path], config: DataConfig, features: bool) -> Rows:
    return scan_features(paths, config.columns) if features else scan_parquet(paths, config.columns)


def _unnamed(rows: Rows, config: DataConfig, path: str) -> Rows:
    """The rows of a data set read without `data.columns`, and a sentence where columns were named."""
    if not config.columns.renamed:
        return rows
    return rows._replace(notes=(*rows.notes, f"data.columns is for parquet files of yours, and not for {path}"))


def _shown(path: str | tuple[str, ...]) -> str:
    return path if isinstance(path, str) else ", ".join(path)
