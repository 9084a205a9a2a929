"""Data sets in folders of picture files, in the layouts that :mod:`kngd_ray.data._layout` tells apart.

Hidden files and files that are no pictures by their suffix are passed over, the latter counted. Nothing outside the
root is ever read: a symbolic link that leads out of it is refused.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kngd_ray.data._config import DataConfig
from kngd_ray.data._decode import SUFFIXES
from kngd_ray.data._layout import LAYOUTS, read_folders
from kngd_ray.data._passed_over import check_passed_over
from kngd_ray.data._source import Ints, Rows, content_key, read_picture
from kngd_ray.data._walk import passed_over, walk
from kngd_ray.errors import DataError


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


def scan_folder(root: Path, config: DataConfig) -> Rows:
    """Find the pictures of a folder and tell class, domain and split by their paths.

    Args:
        root: the folder.
        config: what is asked for.

    Returns:
        Everything but the pictures, in the order of the paths.

    Raises:
        DataError: when it holds no pictures, the layout is none that can be told, or the folder cannot be read.
    """
    passed: Counter[str] = Counter()
    files = sorted(walk(root, is_picture, passed))
    if not files:
        hint = "name its files in data.path" if any(root.glob("*.parquet")) else f"lay it out as {LAYOUTS}"
        if next(walk(root, lambda name: name in ("dataset_info.json", "dataset_dict.json")), None) is not None:
            hint = "save_to_disk of Hugging Face's datasets wrote it: write each split as parquet, by its to_parquet"
        raise DataError(f"{root} holds no pictures in class folders: {hint}")
    read = read_folders([file.relative_to(root).parts[:-1] for file in files], root, config)
    unread = check_passed_over(root, files, read.classes)
    return Rows(
        source=PictureFiles(tuple(str(file) for file in files)),
        labels=read.classes,
        names=read.classes,
        domains=read.domains,
        splits=read.splits,
        keys=[content_key(_read(str(file))) for file in files],
        origins=read.origins,
        notes=(*([read.note] if read.note else []), *passed_over(passed), *unread),
    )


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return Path(name).suffix.lower() in SUFFIXES


def _read(path: str) -> bytes:
    """Return a file's bytes.

    Raises:
        DataError: when the file cannot be read.
    """
    try:
        return read_picture(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
