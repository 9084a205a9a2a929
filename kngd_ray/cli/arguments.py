"""Arguments that several commands take, and what commands do with them."""

import json
import sys
from typing import Annotated, Any, Literal

import typer


def _offered(kind: Literal["presets", "searches"], incomplete: str) -> list[str]:
    from kngd_ray.config import flatten, load_config
    from kngd_ray.configs import names

    words = [*names(kind), *(f"{key}=" for key in flatten(load_config()))]
    return [word for word in words if word.startswith(incomplete)]


def _settings(incomplete: str) -> list[str]:
    """What a shell offers for a setting of a run."""
    return _offered("presets", incomplete)


def _search_settings(incomplete: str) -> list[str]:
    """What a shell offers for a setting of a search."""
    return _offered("searches", incomplete)


Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CONFIG | KEY=VALUE",
        help="A preset or a YAML file, then settings over it: data.shots=16",
        show_default=False,
        autocompletion=_settings,
    ),
]
SearchSettings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SEARCH | KEY=VALUE",
        help="A shipped search or a YAML file, then settings over it: search.num_samples=60 data.shots=16",
        show_default=False,
        autocompletion=_search_settings,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
Storage = Annotated[str, typer.Option(help="Where runs live.", envvar="KNGD_STORAGE_PATH")]
Target = Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Name or folder of a run, or a folder in it.")]


def split(settings: list[str] | None) -> tuple[str | None, list[str]]:
    """Tell a leading preset, search or YAML file from the key=value settings."""
    settings = settings or []
    if settings and "=" not in settings[0]:
        return settings[0], settings[1:]
    return None, settings


def display_for(as_json: bool) -> Any:
    """A console for a command; with `--json` standard output is left to the object."""
    from kngd_ray.console import Display

    return Display(quiet_stdout=as_json)


def print_json(result: Any) -> None:
    """Print a result as one line of JSON."""
    sys.stdout.write(json.dumps(result) + "\n")
