"""``kngd-ray doctor``."""

from typing import Annotated, Any

import typer

from kngd_ray.cli.arguments import Json, display_for, offered, print_json, refuse_options

_RENAMED = {
    "--address": "trainer.address=HOST:PORT",
    "--storage-path": "trainer.storage_path=FOLDER",
    "--uri": "tracking.uri=URI",
    "--no-ray": "trainer.num_workers=0",
}


def _completions(incomplete: str) -> list[str]:
    return offered("presets", incomplete)


def doctor(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG | KEY=VALUE | -- COMMAND ARGUMENTS",
            help="Settings of a run, as train takes them; or a whole command: -- evaluate first data.path=new/",
            show_default=False,
            autocompletion=_completions,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check versions, Ray and its access control, GPUs, storage, inputs, tracking and model, on every node.

    Joins or starts Ray as train would, and leaves nothing behind.
    trainer.num_workers=0 checks this machine without Ray.
    Exits with 1 if a check fails.
    """
    from kngd_ray.api.machines import checks
    from kngd_ray.cli.command_line import parsed

    words = settings or []
    command = parsed(words)
    if command is None:
        refuse_options(words, _RENAMED)
        name, given = "train", dict[str, Any](settings=words)
    else:
        name, given = command
    from kngd_ray.api.needs import needs_of

    result = checks(needs_of(name, given), display_for(as_json))
    if as_json:
        print_json(result)
    if not result["ok"]:
        raise typer.Exit(1)
