"""Files of a folder of pictures that are not read, because their suffix is none of :data:`~kngd_ray.data.SUFFIXES`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from kngd_ray.data._decode import SUFFIXES
from kngd_ray.data._source import listing
from kngd_ray.data._walk import of_a_system
from kngd_ray.errors import DataError

MOST = 0.05
"""Part of a class that may be passed over."""

# what lies beside pictures and is none
_BESIDE = {
    ".aae", ".cfg", ".css", ".csv", ".db", ".doc", ".docx", ".htm", ".html", ".ini", ".ipynb", ".js", ".json",
    ".jsonl", ".lnk", ".log", ".md", ".md5", ".parquet", ".pdf", ".py", ".rst", ".sh", ".sha1", ".sha256", ".toml",
    ".tsv", ".txt", ".url", ".xls", ".xlsx", ".xml", ".xmp", ".yaml", ".yml",
}  # fmt: skip
# pictures all the same: a folder of them alone is a class that is lost
_OTHER_PICTURES = {
    ".arw", ".blp", ".bw", ".cr2", ".cr3", ".cur", ".dcm", ".dcx", ".dds", ".dng", ".emf", ".eps", ".exr", ".fit",
    ".fits", ".flif", ".hdr", ".icns", ".ico", ".im", ".jls", ".jp2k", ".jxl", ".jxr", ".nef", ".orf", ".pcx",
    ".pict", ".psd", ".pxr", ".qoi", ".raf", ".ras", ".raw", ".rgb", ".rgba", ".rw2", ".sgi", ".svg", ".svs", ".tga",
    ".wmf", ".xbm", ".xcf", ".xpm",
}  # fmt: skip


def check_passed_over(root: Path, pictures: Sequence[Path], classes: Sequence[str]) -> tuple[str, ...]:
    """Count the files of a data set's folder that are not read.

    Files that are no pictures by their suffix (text, tables, settings) do not count against a class, nor do
    those beside a picture of the same name, as its annotation or raw original.

    Args:
        root: the folder.
        pictures: what is read of it.
        classes: of each of them.

    Returns:
        A sentence with the number of files by suffix, if there are any.

    Raises:
        DataError: more than 5 % of a class is passed over, or all of a folder of pictures.
    """
    class_of = {picture.parent: name for picture, name in zip(pictures, classes, strict=True)}
    stems = {picture.with_suffix("") for picture in pictures}
    passed: Counter[str] = Counter()
    lost: dict[str, Counter[str]] = {}
    for path in unread(root):
        suffix = path.suffix.lower()
        passed[suffix] += 1
        elsewhere = path.parent not in class_of and suffix not in _OTHER_PICTURES
        if suffix in _BESIDE or path.with_suffix("") in stems or elsewhere:
            continue
        folder = str(path.parent.relative_to(root))
        lost.setdefault(class_of.get(path.parent, folder), Counter())[suffix] += 1
    read = Counter(classes)
    over = [name for name, found in lost.items() if found.total() > MOST * (found.total() + read[name])]
    if over:
        name = max(over, key=lambda name: lost[name].total() / (lost[name].total() + read[name]))
        count, more = lost[name].total(), "" if len(over) == 1 else f", and more of {len(over) - 1} other classes"
        raise DataError(
            f"{root}: {count} of the {count + read[name]} files of the class {name!r} would be skipped because of their"
            f" suffix, {by_suffix(lost[name])}{more}: save them as PNG or JPEG, or move them out of the folder"
        )
    return (f"skipped because of their suffix: {by_suffix(passed)}",) if passed else ()


def unread(root: Path) -> Iterator[Path]:
    """Yield the files in and below a folder that are not pictures, except hidden and system files.

    Args:
        root: the folder.

    Yields:
        Paths.
    """
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and not of_a_system(name)]
        yield from (Path(place, n) for n in files if n[0] != "." and Path(n).suffix.lower() not in SUFFIXES)


def by_suffix(counts: Counter[str]) -> str:
    """Return numbers of files for a message, the most first.

    Args:
        counts: of files by suffix.

    Returns:
        ``.tga (12), none (1)``.
    """
    return listing([f"{suffix or 'none'} ({count})" for suffix, count in counts.most_common()], limit=8)
