"""Standard output and error that nothing can make a command fail: a reader that leaves, a full disk, a closed stream.

What a command computes takes minutes, and what it prints is the least of it. A reader that has left (``| head``)
changes nothing; a disk that is full is said at the end; a character that the terminal does not have is replaced.
"""

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_PLAIN = "kngd_ray.plain"
_INSTEAD = {"±": "+-", "−": "-", "–": "-", "·": ".", "×": "x", "…": "..."}
_LEFT = (errno.EPIPE, errno.ECONNRESET, errno.EIO)  # who read it is gone; EIO is of a terminal that was closed


class _Lasting(io.FileIO):
    """A stream that is dropped when it cannot be written, instead of an error.

    Args:
        descriptor: of the stream, which stays open.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.problem: OSError | None = None

    def write(self, data: bytes) -> int | None:  # type: ignore[override]
        """Write, or drop it.

        Args:
            data: bytes.

        Returns:
            How many were taken; None where a reader has to catch up.
        """
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, self.fileno())  # for whatever else writes there: libraries, processes of ours
            os.close(sink)
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let a command come to its end whatever becomes of standard output and error.

    Yields:
        Nothing.

    Raises:
        SystemExit: with 1, where all went well but what belongs on standard output could not be written there.
    """
    codecs.register_error(_PLAIN, _plain)
    _open_all()
    before = sys.stdout, sys.stderr
    out = _replaced(sys.stdout, 1)
    err = _replaced(sys.stderr, 2)
    sys.stdout, sys.stderr = out, err
    code: object = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        raise
    finally:
        for stream in (out, err):
            stream.flush()
        sys.stdout, sys.stderr = before[0] or out, before[1] or err
        raw = getattr(getattr(out, "buffer", None), "raw", None)
        error = raw.problem if isinstance(raw, _Lasting) else None
        if not code and sys.exc_info()[0] in (None, SystemExit) and error is not None and error.errno not in _LEFT:
            err.write(
                f"kngd-ray: standard output cannot be written ({error.strerror}): what the command keeps in files is "
                "there, send its output elsewhere.\n"
            )
            err.flush()
            raise SystemExit(1)


def _open_all() -> None:
    """Open what the shell has closed: a file that takes the number of standard output would get what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free is this one


def _replaced(stream: TextIO | None, number: int) -> TextIO:
    """The same stream, lasting; one that a program has put in place, as tests do, stays as it is."""
    if stream is None:
        stream = io.TextIOWrapper(_sink(), encoding="utf-8", errors=_PLAIN)
    if not isinstance(stream, io.TextIOWrapper) or stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    stream.flush()
    interactive = stream.isatty()
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number)),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=_PLAIN,
        line_buffering=number == 2 or interactive,
    )


def _sink() -> io.BufferedWriter:
    return io.BufferedWriter(io.FileIO(os.open(os.devnull, os.O_WRONLY), "w"))


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_INSTEAD.get(c, "?") for c in error.object[error.start : error.end]), error.end
