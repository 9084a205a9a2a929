"""Data sets in folders of picture files.

Three layouts are told apart by depth, and the two deeper ones by the names of the top folders:

    root/<class>/x.png                 one domain, no stated split
    root/<train|test|val>/<class>/x.png    every top folder is a split; val and validation count as test
    root/<domain>/<class>/x.png            no top folder is a split

Hidden files and files that are no pictures by their suffix are passed over, the latter counted. Nothing outside the
root is ever read: a symbolic link that leads out of it is refused.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kngd_ray.data._decode import SUFFIXES
from kngd_ray.data._passed_over import check_passed_over
from kngd_ray.data._source import DEFAULT_DOMAIN, SPLITS, Ints, Rows, content_key, read_picture
from kngd_ray.errors import DataError

LAYOUTS = "class/picture, train/class/picture and test/class/picture, or domain/class/picture"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureFiles:
    """One picture file per row.

    Attributes:
        paths: the files, in the order of their names.
    """

    paths: tuple[str, ...]

    @property
    def kind(self) -> Literal["folder"]:
        """Format of the files."""
        return "folder"

    def place(self, row: int) -> str:
        """Return the path of `row`."""
        return self.paths[row]

    def read(self, rows: Ints) -> Iterator[tuple[int, bytes]]:
        """Yield (row, picture bytes) for ascending `rows` (M,)."""
        for row in rows.tolist():
            yield row, _read(self.paths[row])


def scan_folder(root: Path) -> Rows:
    """Find the pictures of a folder and tell class, domain and split by their paths.

    Args:
        root: the folder.

    Returns:
        Everything but the pictures, in the order of the paths.

    Raises:
        DataError: when the layout is none of the three, or the folder cannot be read.
    """
    files = sorted(_pictures(root))
    if not files:
        hint = "name its files in data.path" if any(root.glob("*.parquet")) else f"lay it out as {LAYOUTS}"
        raise DataError(f"{root} holds no pictures in class folders: {hint}")
    parts = [file.relative_to(root).parts[:-1] for file in files]
    depths, tops = {len(part) for part in parts}, {part[0] for part in parts if part}
    if depths not in ({1}, {2}):
        raise DataError(f"{root} holds pictures at other depths than a data set: lay it out as {LAYOUTS}")
    splits = tops & SPLITS.keys()
    if splits and (depths == {1} or splits != tops):
        mixed = ", ".join(sorted(tops - splits)) or "pictures without class folders"
        raise DataError(f"{root} mixes {', '.join(sorted(splits))} with {mixed}: lay it out as {LAYOUTS}")
    classes = [part[-1] for part in parts]
    for sentence in check_passed_over(root, files, classes):
        log.warning("%s: %s", root, sentence)
    return Rows(
        source=PictureFiles(tuple(str(file) for file in files)),
        labels=classes,
        names=classes,
        domains=[DEFAULT_DOMAIN if splits or depths == {1} else part[0] for part in parts],
        splits=[part[0] if splits else None for part in parts],
        keys=[content_key(_read(str(file))) for file in files],
    )


def _pictures(root: Path) -> Iterator[Path]:
    """Yield the picture files under `root`.

    Raises:
        DataError: when a link leads out of `root`, or a folder cannot be listed.
    """
    inside = os.path.realpath(root)

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error

    # Linked folders are not walked into: inside the root they would only repeat pictures, or loop.
    for place, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        pictures = [name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")]
        for path in (Path(place, name) for name in folders + pictures):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
                raise DataError(f"{path} is a link out of {root}: copy what it names into the folder")
            if not _is_text(path.name):
                raise DataError(f"{str(path)!r} has a name that is no UTF-8: rename it")
        yield from (Path(place, name) for name in pictures)


def _is_text(name: str) -> bool:
    """Whether a name is Unicode; of bytes that are not, Python makes surrogates, which no file can be written with."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _read(path: str) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        return read_picture(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
