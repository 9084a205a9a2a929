"""Python keywords as ``key=value`` settings of the command line: both have one meaning and one error."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from kngd_ray.clip import ModelConfig
from kngd_ray.config import Config, TrackingConfig, TrainerConfig
from kngd_ray.data import DataConfig
from kngd_ray.errors import UsageError

_SECTIONS = ("data", "model", "trainer", "tracking", "search", "space")
# what a section means where it is given no mapping: data="pacs.parquet", model="ViT-B-32", tracking=False
_CHIEF = {"data": "data.path", "model": "model.name", "tracking": "tracking.enabled"}
_COUNTED = "seeds"


def settings_of(keywords: Mapping[str, Any], search: Sequence[str] = ()) -> list[str]:
    """Write keywords as settings.

    A keyword is a setting: its dotted path (``**{"filter.p0": 0.1}``), a section with a mapping
    (``data={"path": "pacs.parquet", "shots": 16}``), or the last name of a setting of ``data``, ``trainer``,
    ``tracking`` or ``model`` (``shots=16``). ``data``, ``model`` and ``tracking`` alone stand for ``data.path``,
    ``model.name`` and ``tracking.enabled``. A whole number of ``seeds`` is how many: 5 are the seeds 0 to 4. (In
    a mapping that stands for a file, and as text, ``seeds`` are the seeds themselves, as on the command line.)

    Args:
        keywords: by name.
        search: names of the options of a search, where one is set.

    Returns:
        ``key=value`` strings, values in JSON, which YAML reads.

    Raises:
        UsageError: a value that no setting has, or one setting by two names.
    """
    settings = list(_flat(keywords, _short_names(search)))
    twice = [key for key, count in Counter(key for key, _ in settings).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is given twice, by its own name and by another: leave one out.")
    return [f"{key}={_written(key, value)}" for key, value in settings]


def names_setting(settings: Sequence[str], key: str) -> bool:
    """Whether settings name one, by itself or by its section."""
    return any(text.partition("=")[0].strip() in (key, key.partition(".")[0]) for text in settings)


def _short_names(search: Sequence[str]) -> dict[str, str]:
    """Full paths of settings by their last names; a setting of the tree itself keeps its own."""
    sections = {"model": ModelConfig, "tracking": TrackingConfig, "trainer": TrainerConfig, "data": DataConfig}
    found = {f.name: f"{section}.{f.name}" for section, cls in sections.items() for f in fields(cls)}
    found |= {name: f"search.{name}" for name in search}
    return {name: path for name, path in found.items() if name not in {f.name for f in fields(Config)}}


def _flat(keywords: Mapping[str, Any], short: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for key, value in keywords.items():
        if key in _SECTIONS and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        elif key in _CHIEF and value is not None:
            yield _CHIEF[key], value
        elif key == _COUNTED and not isinstance(value, bool) and _is_whole(value):
            yield key, list(range(int(value)))  # of numpy's numbers too
        else:
            yield short.get(key, key), value


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) or (isinstance(value, Real) and float(value).is_integer())


def _written(key: str, value: Any) -> str:
    """A value as JSON.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        return json.dumps(value, default=_plain, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{key} is of type {type(value).__name__}, which no setting takes: give plain data."
        ) from error


def _plain(value: Any) -> Any:
    """What JSON does not know as what it knows.

    Raises:
        TypeError: nothing stands for it.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (range, set, frozenset)):
        return sorted(value)
    raise TypeError
