"""Choices that other packages add to the configuration, by entry points."""

from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

from kngd_ray.errors import UsageError

_GROUPS: dict[frozenset[type], str] = {}


def open_registry(registry: Any, group: str) -> None:
    """Let installed packages add to a registry.

    They are asked when a configuration is read, and not before: they import the package that they add to.

    Args:
        registry: a union of dataclasses, each with a ``kind``.
        group: of entry points, such as ``kngd_ray.families``; each names a dataclass of that form.
    """
    _GROUPS[frozenset(get_args(registry))] = group


@cache
def added(members: frozenset[type]) -> tuple[type, ...]:
    """What installed packages add to a registry.

    Args:
        members: of its union.

    Returns:
        Their classes; none of a union that is no registry.
    """
    group = _GROUPS.get(members)
    if group is None:
        return ()
    known = {_kind(member): member for member in members}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        found = _loaded(point, known)  # a package may be found twice, on the path and installed
        known[_kind(found)] = found
    return tuple(found for found in known.values() if found not in members)


def kinds(registry: Any) -> list[str]:
    """Names of the choices in a registry, those of other packages too.

    Args:
        registry: a union of dataclasses, each with a ``kind``.

    Returns:
        What settings call them, in alphabetical order.
    """
    members = get_args(registry)
    return sorted(_kind(member) for member in (*members, *added(frozenset(members))))


def _loaded(point: EntryPoint, known: dict[str, type]) -> type:
    """The class that an entry point names.

    Raises:
        UsageError: it cannot be imported, is no choice, or takes the name of another.
    """
    where = f"{point.value}, which {point.dist.name if point.dist else 'a package'} adds to {point.group}"
    try:
        found = point.load()
    except Exception as error:  # whatever the code of another package raises
        raise UsageError(f"{where}, cannot be imported ({error}): update that package, or uninstall it.") from error
    if not (isinstance(found, type) and is_dataclass(found) and _kind(found)):
        raise UsageError(f"{where}, is not a dataclass with a kind: see docs/extending.md.")
    if known.get(_kind(found), found) is not found:
        raise UsageError(f"{where}, has the kind {_kind(found)!r}, which is taken: give it another.")
    return found


def _kind(choice: Any) -> str:
    return next((str(f.default) for f in fields(choice) if f.name == "kind" and isinstance(f.default, str)), "")
