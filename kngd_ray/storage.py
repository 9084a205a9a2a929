"""Writing so that a reader finds all or nothing, and a full disk is one sentence. Standard library only."""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kngd_ray.errors import StorageError

MAX_JSON = 16 << 20  # a hundred times what kngd_ray writes; as objects it takes thirty times as much


_ADDRESS = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/+(?=[^/])")


def address(path: str | os.PathLike[str]) -> str | None:
    """The address that stands where a path should.

    Args:
        path: as it was given, or as pathlib has it: with one slash of two, and perhaps below the current folder.

    Returns:
        The address with both; None of a path.
    """
    found = _ADDRESS.search(os.fspath(path))
    return f"{found[1]}://{os.fspath(path)[found.end() :]}" if found else None


@contextmanager
def storage_errors(place: Path, *also: type[Exception]) -> Iterator[None]:
    """Turn failures to write into one sentence for the user.

    Args:
        place: what is being written, for the message.
        *also: exceptions other than OSError by which a library reports a failed write.

    Yields:
        Nothing.

    Raises:
        StorageError: no space left, no permission, a read-only or missing file system.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, *also)):
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full:
            message = f"no space left while writing {place}: free some, then continue with --resume."
        else:
            message = f"cannot write {place} ({error}): check the path and its permissions."
        raise StorageError(message) from error


def write_text(path: Path, text: str) -> None:
    """Put a text file in place in one move, after its bytes are on the disk.

    Args:
        path: the file; its folder exists. Who may read a file that is there may read the new one, and nobody else,
            also while it is being written.
        text: its content.

    Raises:
        StorageError: it cannot be written.
    """  # noqa: DOC501 - storage_errors turns OSError into it
    with storage_errors(path):
        temporary = path.with_name(f".{path.name}.tmp")
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(temporary, flags, mode), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk its room is needed
            raise


def read_json(path: Path, most: int = MAX_JSON) -> Any:
    """Read a JSON file that anybody may have written.

    Args:
        path: the file.
        most: bytes that it may have.

    Returns:
        Its value.

    Raises:
        ValueError: no JSON, nested too deeply or too large; OSError passes.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 20} MiB")
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
