"""Presets: shipped ones by name, and YAML files, each of which may name another that it builds on."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from kngd_ray import configs
from kngd_ray.errors import UsageError, nearest

_KALMAN = "kalman"


def preset_layers(name: str, method: Any) -> list[dict[str, Any]]:
    """A preset and those that it builds on.

    Args:
        name: preset or path.
        method: that a run names; None leaves it to the preset.

    Returns:
        Nested settings, the later over the earlier. A file that names no preset builds on no other.

    Raises:
        UsageError: there is no such preset or file, presets go round in a circle, or one is for methods of another
            kind: its steps and epochs say nothing of this one's.
    """
    layers: list[dict[str, Any]] = []
    at, seen = name, []
    while at not in seen:
        seen.append(at)
        layers.insert(0, read_preset(at))
        below = layers[0].get("preset")
        if below is None:
            break
        at = str(below)
    else:
        raise UsageError(f"presets name one another in a circle: {' -> '.join([*seen, at])}.")
    own = next((layer["method"] for layer in reversed(layers) if layer.get("method") is not None), None)
    if method is not None and own is not None and (own == _KALMAN) != (method == _KALMAN):
        raise UsageError(f"preset {name} is for method={own}, and method is {method}: leave one of them out.")
    return layers


def read_preset(name: str) -> dict[str, Any]:
    """Read a shipped preset by name, or a YAML file by path.

    Args:
        name: preset or path.

    Returns:
        The nested settings.

    Raises:
        UsageError: there is no such preset or file.
    """
    shipped = configs.names("presets")
    if name in shipped:
        return deepcopy(_shipped_preset(name))  # whoever asked may change it
    if name.endswith((".yaml", ".yml")):
        return read_config(Path(name))
    raise UsageError(f"there is no preset {name!r}{nearest(name, shipped)}; name one of these or a YAML file.")


@cache
def _shipped_preset(name: str) -> dict[str, Any]:
    """Read once in a process: to parse a preset took half of the time of a configuration."""
    return configs.parse_yaml(configs.text("presets", name), f"preset {name}")


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration file that describes no search.

    Args:
        path: the file.

    Returns:
        The nested settings.

    Raises:
        UsageError: it does, or cannot be read.
    """
    settings = configs.read_yaml(path)
    if any(key.partition(".")[0] in ("search", "space") for key in settings):
        raise UsageError(f"{path} is a search file: run it with kngd-ray tune, or leave out its search and space.")
    return settings
