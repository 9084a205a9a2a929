"""Writing so that a reader finds all or nothing, and a full disk is one sentence. Standard library only."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kngd_ray.errors import StorageError


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
        path: the file; its folder exists.
        text: its content.
    """
    with storage_errors(path):
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
