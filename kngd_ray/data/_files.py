"""Which files `data.path` names."""

import os
from collections.abc import Iterator
from glob import glob, has_magic
from pathlib import Path

from kngd_ray.data._source import hint, missing_path
from kngd_ray.errors import DataError


def data_files(path: str | tuple[str, ...]) -> list[Path]:
    """Find the files or the folder of a data set.

    A name that is no file, and has `*`, `?` or `[` in it, is a pattern of names of parquet files; `**` stands for
    folders of any depth.

    Args:
        path: as it is given.

    Returns:
        Absolute paths, since workers, which read the files too, run in folders of their own; those of a pattern in the
        order of their names, each file once.

    Raises:
        DataError: a path is missing, or nothing has a name of the pattern.
    """
    return list(dict.fromkeys(file for name in ([path] if isinstance(path, str) else path) for file in _named(name)))


def _named(name: str) -> Iterator[Path]:
    """The files of one name.

    Raises:
        DataError: there is none.
    """
    path = Path(name).expanduser().absolute()
    if os.path.exists(path):  # Path.exists raises where it may not look
        yield path
        return
    if not has_magic(name):
        raise DataError(missing_path(path))
    found = sorted(file for file in map(Path, glob(str(path), recursive=True)) if file.is_file())
    others = [file.name for file in found if file.suffix.lower() != ".parquet"]
    if others:
        raise DataError(
            f"{name} is a pattern, and finds {others[0]}: a pattern names parquet files, as in"
            f" {Path(name).parent / '*.parquet'}; of pictures name the folder in data.path"
        )
    if not found:
        first = next(part for part in path.parents if not has_magic(str(part)))
        where = f"there is no folder {first}" if not first.is_dir() else f"no file below {first} has such a name"
        raise DataError(f"{name} is a pattern, and {where}{hint(first.name, _beside(first))}: correct data.path")
    yield from found


def _beside(folder: Path) -> list[str]:
    """Names beside a missing folder."""
    if folder.is_dir() or not folder.parent.is_dir():
        return []
    return [entry.name for entry in folder.parent.iterdir()]
