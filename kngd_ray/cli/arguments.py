"""Arguments that several commands share, and helpers for their output."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import typer

from kngd_ray.errors import UsageError, nearest


def offered(kind: Literal["presets", "searches"], incomplete: str) -> list[str]:
    """Completions of a setting, or of a preset or search before it.

    Args:
        kind: whether presets or searches may come first.
        incomplete: what has been typed of the word.

    Returns:
        Whole words.
    """
    from kngd_ray.config import flatten, load_config
    from kngd_ray.configs import names

    words = [*names(kind), *(f"{key}=" for key in flatten(load_config()))]
    return [word for word in words if word.startswith(incomplete)]


def _settings(incomplete: str) -> list[str]:
    return offered("presets", incomplete)


def _search_settings(incomplete: str) -> list[str]:
    return offered("searches", incomplete)


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG | KEY=VALUE",
        help="A preset or a YAML file, then settings that override it: data.shots=16",
        show_default=False,
        autocompletion=_settings,
    ),
]
SearchSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SEARCH | KEY=VALUE",
        help="A shipped search or a YAML file, then settings that override it: search.num_samples=60 data.shots=16",
        show_default=False,
        autocompletion=_search_settings,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
Storage = Annotated[str, typer.Option(help="Folder where runs are stored.", envvar="KNGD_STORAGE_PATH")]
Target = Annotated[
    str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Name or folder of a run, or of a fit or checkpoint in it.")
]


def refuse_options(words: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Refuse options among words that must be settings.

    Args:
        words: of a command that lets unknown options through.
        renamed: the setting, with an example value, that took the place of each former option.

    Raises:
        UsageError: there is one; names the setting.
    """
    for word in words:
        option = word.partition("=")[0]
        if option in renamed:
            raise UsageError(f"{option} is a setting now: write {renamed[option]}.")
        if word.startswith("-"):
            raise UsageError(f"there is no option {option}{nearest(option, ['--json', '--help', *renamed])}.")


def display_for(as_json: bool) -> Any:
    """A console for a command; with ``--json``, standard output is left to the object."""
    from kngd_ray.console import Display

    return Display(quiet_stdout=as_json)


def print_json(result: Any) -> None:
    """Print a result as one line of JSON."""
    sys.stdout.write(json.dumps(result) + "\n")
