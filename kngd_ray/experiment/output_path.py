"""Where pages that a command writes may go."""

from pathlib import Path

from kngd_ray.errors import StorageError, UsageError
from kngd_ray.storage import storage_errors

_HEAD = 2000  # bytes in which a page of ours bears its mark


def check_place(path: Path, mark: str, command: str, option: str) -> None:
    """Refuse to write where another file is, before anything is computed.

    Args:
        path: of the page.
        mark: what the head of each page of the command has.
        command: that writes it.
        option: that names it.

    Raises:
        UsageError: a file that is no such page is there.
        StorageError: the folder is missing.
    """
    if not path.absolute().parent.is_dir():
        raise StorageError(f"cannot write {path}: there is no folder {path.absolute().parent}.")
    if path.exists():
        ours = False
        if path.is_file():
            with storage_errors(path), path.open("rb") as file:
                ours = mark.encode() in file.read(_HEAD)
        if not ours:
            raise UsageError(f"{path} is there and is no page of `kngd-ray {command}`: give {option} another name.")
