"""Writing so that a reader finds all or nothing, and a full disk is one sentence. Standard library only."""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from kngd_ray._option import option
from kngd_ray.errors import StorageError

_ABANDONED = 3600.0  # seconds after which nobody is still writing a file of text
MAX_JSON = 16 << 20  # four times the most that kngd_ray writes; as objects it takes thirty times as much


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
            message = f"no space left while writing {place}: free some, then continue with {option('resume')}."
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
        temporary = temporary_beside(path)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            # names of files need not be text; those that hold none are shown by their bytes
            with open(os.open(temporary, flags, mode), "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk its room is needed
            raise
        _sweep(path)


def temporary_beside(path: Path) -> Path:
    """A name for what is to become a file, next to it: each writer's own, since several may write the same file.

    Args:
        path: the file.

    Returns:
        A name that begins with a dot and ends with ``.tmp``.
    """
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")


def _sweep(path: Path) -> None:
    """Remove what writers of a file left behind that were killed; what is young may be another's at this moment."""
    with suppress(OSError):
        for left in path.parent.glob(f".{escape(path.name)}.*.tmp"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink(missing_ok=True)


def take_lock(file: IO[Any], place: Path, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed, or its process ends.

    Args:
        file: the file.
        place: what is locked, for the message.
        wait: until whoever holds it is done.

    Returns:
        Whether it is ours; without waiting, False where another process holds it.

    Raises:
        StorageError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"{place} is on a file system without file locks ({error.strerror}): give trainer.storage_path on another."
        ) from error
    return True


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
