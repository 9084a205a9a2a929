"""Settings in YAML files: those that come with the package, presets and searches, are in folders here."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from kngd_ray._yaml import RepeatedError, plain_data, read_text
from kngd_ray.errors import UsageError, nearest

Kind = Literal["presets", "searches"]


def names(kind: Kind) -> list[str]:
    """Name the files of a kind, sorted, without their suffix."""
    return list(_names(kind))


@cache
def _names(kind: Kind) -> tuple[str, ...]:
    folder = resources.files(__name__) / kind
    return tuple(sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")))


def text(kind: Kind, name: str) -> str:
    """Read one of them.

    Args:
        kind: of the file.
        name: one of :func:`names`.

    Returns:
        YAML text.
    """
    return (resources.files(__name__) / kind / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: the file.

    Returns:
        The nested settings.

    Raises:
        UsageError: the file is missing, unreadable or not a YAML mapping.
    """
    try:
        text = read_text(path)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UsageError(f"there is no configuration file {path}{nearest(path.name, siblings)}.") from error
    except (OSError, ValueError) as error:  # ValueError: too large, no UTF-8, or a path with a null character
        raise UsageError(f"the configuration file {path} cannot be read ({error}).") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Read the content of a configuration file.

    Args:
        text: YAML.
        source: what it is called in messages.

    Returns:
        The nested settings.

    Raises:
        UsageError: it is not a YAML mapping, or has a key twice.
    """
    try:
        parsed = plain_data(text)
    except RepeatedError as error:
        one, other = error.lines
        places = f"lines {one} and {other}" if one != other else f"line {one}"
        raise UsageError(f"{source} has {error.key} twice, at {places}: leave one of them out.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UsageError(f"{source} is not valid YAML{line}: {_problem(error)}.") from error
    if parsed is None:
        return {}
    if not isinstance(parsed, dict) or not all(isinstance(key, str) for key in parsed):
        raise UsageError(f"{source} must hold `key: value` settings at its top level.")
    return parsed


def _problem(error: Exception) -> str:
    return (getattr(error, "problem", None) or str(error)).partition("\n")[0]
