"""``kngd-ray submit``."""

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, display_for, offered, print_json, refuse_options
from kngd_ray.errors import UsageError, nearest

_RENAMED = {
    "--address": "address=http://HOST:8265",
    "--working-dir": "working_dir=FOLDER",
    "--include": "include=[PATH, ...]",
    "--dry-run": "dry_run=true",
    "--no-follow": "follow=false",
    "--no-check": "check=false",
    "--status": "status=JOB",
    "--logs": "logs=JOB",
    "--stop": "stop=JOB",
}


def _completions(context: typer.Context, incomplete: str) -> list[str]:
    """Settings of submit and names of commands; after a name, what that command takes."""
    from kngd_ray.cli.command_line import command_names

    given = [word for word in context.params.get("words") or [] if "=" not in word]
    if given:
        return offered("searches" if given[0] == "tune" else "presets", incomplete)
    keys = ("address", "working_dir", "include", "dry_run", "follow", "check", "status", "logs", "stop")
    return [word for word in (*(f"{key}=" for key in keys), *command_names()) if word.startswith(incomplete)]


def submit(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE ... -- COMMAND ARGUMENTS",
            help="Settings of the submission, then the command: check=false -- train data.shots=16",
            show_default=False,
            autocompletion=_completions,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a command as a job on a Ray cluster, and exit with its exit code.

    Runs doctor on the cluster first, to check what the command needs.

    \b
    Settings:
      address=URL          Ray's dashboard; by default http://127.0.0.1:8265
      working_dir=FOLDER   folder whose code and settings are sent; default .
      include=[PATH, ...]  files, folders or patterns to send as well
      dry_run=true         show what would be sent, without contacting the cluster
      follow=false         do not wait for the job
      check=false          do not check settings here, nor run doctor first
      status=JOB           show the state of a job
      logs=JOB             follow the log of a job from its start
      stop=JOB             stop a job
    """  # noqa: D301
    from kngd_ray.cli.command_line import command_names, parsed
    from kngd_ray.cluster import submit as jobs

    words = words or []
    start = next((place for place, word in enumerate(words) if "=" not in word), len(words))
    options, command = words[:start], words[start:]
    refuse_options([*options, *command[:1]], _RENAMED)
    display = display_for(as_json)
    request = jobs.read_options(options, command)
    given = parsed(command)
    if command and given is None:
        raise UsageError(
            f"kngd-ray has no command {command[0]!r} that runs on a cluster{nearest(command[0], command_names())}."
        )
    if given is not None:
        name, arguments = given
        settings = arguments.get("settings") or []
        if request.check and arguments.get("resume") is None:  # of what is continued the settings are there
            _check_settings(name, settings, Path(request.working_dir).expanduser())
        result = jobs.submit(command, settings, request, display)
    else:
        result = jobs.show_job(request, display)
    if as_json:
        print_json(result)
    if request.status is None and request.stop is None and result["exit_code"]:
        raise typer.Exit(result["exit_code"])


def _check_settings(name: str, settings: Sequence[str], folder: Path) -> None:
    """Refuse here what the command would refuse on the cluster, as far as that takes no more than its settings.

    Raises:
        UsageError: a setting is misspelt, or has a value that it cannot have.
    """
    from kngd_ray.api.settings import configured, configured_search

    if name not in ("train", "tune") or not folder.is_dir():
        return
    with chdir(folder):  # whose files are sent; those that are not are told of by name, or are the cluster's own
        if not all(Path(file).is_file() for file in _files(settings)):
            return
        try:
            if name == "train":
                configured(None, settings)
            else:
                configured_search(None, settings)
        except UsageError as error:
            raise UsageError(f"{str(error).rstrip('.')} (check=false sends the command as it is).") from error


def _files(settings: Sequence[str]) -> list[str]:
    """Settings files that a command names: before its settings, as its preset, or as those that a search starts at."""
    named = [settings[0]] if settings and "=" not in settings[0] else []
    for text in settings:
        key, separator, value = text.partition("=")
        if separator and key.strip() in ("preset", "search.start"):
            named += value.strip(" []").split(",")
    return [word for word in map(str.strip, named) if "/" in word or word.endswith((".yaml", ".yml"))]
