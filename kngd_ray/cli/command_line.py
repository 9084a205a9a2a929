"""The command line that ``submit`` and ``doctor`` take among their arguments."""

from collections.abc import Sequence
from typing import Any

import typer

_OUTER = ("submit",)


def command_names() -> list[str]:
    """Commands that can be run on a cluster."""
    from kngd_ray.cli.app import app

    return [name for name in typer.main.get_command(app).commands if name not in _OUTER]  # type: ignore[attr-defined]


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """Parse a command line as the command itself would; wrong options end the process with its usage message.

    Args:
        words: name of the command and its arguments.

    Returns:
        The name, and the arguments of the command's function; None if the first word is no command.
    """
    from kngd_ray.cli.app import app

    if not words or words[0] not in command_names():
        return None
    name, *arguments = words
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return name, commands[name].make_context(name, arguments).params
