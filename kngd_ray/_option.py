"""How a message names an argument: as it is typed on the command line, or as it is written in Python."""

from collections.abc import Iterator
from contextlib import contextmanager

_typed = False


@contextmanager
def on_the_command_line() -> Iterator[None]:
    """Name arguments as the command line has them.

    Yields:
        Nothing, while messages are written for somebody who types.
    """
    global _typed
    before, _typed = _typed, True
    try:
        yield
    finally:
        _typed = before


def option(name: str, value: object = None) -> str:
    """An argument of a command, which the Python function of the same name has too.

    Args:
        name: of the argument in Python.
        value: what to give it, if that is said; True of one that is on or off.

    Returns:
        ``--name`` and the value, or ``name=value``.
    """
    if _typed:
        flag = "--" + name.replace("_", "-")
        return flag if value is None or value is True else f"{flag} {value}"
    return name if value is None else f"{name}={value!r}"
