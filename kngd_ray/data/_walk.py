"""The files below a user's folder, and which of them are skipped."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from kngd_ray.data._source import listing
from kngd_ray.errors import DataError

# what systems and programs put beside pictures: thumbnails, copies of other systems' attributes, deleted files
_SERVICE = {"@eadir", "__macosx", "__pycache__", "lost+found", "$recycle.bin", "#recycle", "@recycle", "#snapshot"}
_SERVICE |= {".ipynb_checkpoints", ".thumbnails", ".trash", "system volume information"}


def walk(root: Path, wanted: Callable[[str], bool], passed: Counter[str] | None = None) -> Iterator[Path]:
    """Yield the files below a folder whose names are wanted.

    Hidden files and folders are passed over, and folders that systems and programs make. Nothing outside of the folder
    is read, but for the pictures of a snapshot in Hugging Face's cache, which are links into its `blobs`.

    Args:
        root: the folder.
        wanted: tells by the name of a file.
        passed: counts wanted files in folders of systems and programs, by the name of the folder.

    Yields:
        Paths.

    Raises:
        DataError: when a link leads out of `root`, or a folder cannot be listed.
    """
    inside = [os.path.realpath(root), *_blobs(root)]

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error

    # Linked folders are not walked into: inside the root they would only repeat pictures, or loop.
    for place, folders, files in os.walk(root, onerror=refuse):
        for name in filter(of_a_system, folders):
            if passed is not None:
                below = sum(map(wanted, [file for _, _, found in os.walk(Path(place, name)) for file in found]))
                passed.update({name: below} if below else {})
        folders[:] = [name for name in folders if not name.startswith(".") and not of_a_system(name)]
        found = [name for name in files if wanted(name) and not name.startswith(".")]
        for path in (Path(place, name) for name in folders + found):
            if path.is_symlink() and not any(Path(os.path.realpath(path)).is_relative_to(known) for known in inside):
                raise DataError(f"{path} is a link out of {root}: copy what it names into the folder")
            if not _is_text(path.name):
                raise DataError(f"{str(path)!r} has a name that is not UTF-8: rename it")
        yield from (Path(place, name) for name in found)


def of_a_system(name: str) -> bool:
    """Whether a folder's name says that a system or program made it."""
    return name.casefold() in _SERVICE


def passed_over(passed: Counter[str]) -> tuple[str, ...]:
    """Return the sentence that counts what :func:`walk` passed over, if it passed over anything."""
    if not passed:
        return ()
    return (f"skipped: {sum(passed.values())} files in folders called {listing(sorted(passed))}",)


def _blobs(root: Path) -> list[str]:
    """The folder that a snapshot in Hugging Face's cache links to: datasets--x--y/blobs beside .../snapshots."""
    for folder in Path(os.path.abspath(root)).parents:
        if folder.name == "snapshots" and folder.parent.name.startswith(("datasets--", "models--", "spaces--")):
            return [os.path.realpath(folder.parent / "blobs")]
    return []


def _is_text(name: str) -> bool:
    """Whether a name is Unicode; of bytes that are not, Python makes surrogates, which no file can be written with."""
    return not any("\ud800" <= character <= "\udfff" for character in name)
