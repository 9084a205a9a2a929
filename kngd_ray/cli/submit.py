"""``kngd-ray submit``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kngd_ray.cli.arguments import Json, display_for, print_json
from kngd_ray.errors import UsageError, nearest

if TYPE_CHECKING:
    from kngd_ray.cluster.preflight import Arguments


def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- COMMAND ARGUMENTS", help="What to run there: -- train data.shots=16", show_default=False
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Ray's dashboard: $RAY_API_SERVER_ADDRESS, else port 8265 here.")
    ] = None,
    working_dir: Annotated[
        Path,
        typer.Option("--working-dir", metavar="FOLDER", help="What is sent: its code and settings, as git lists them."),
    ] = Path(),
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="PATH", help="Send this file, folder or pattern, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and contact nobody.")] = False,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Do not wait for the job.")] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not ask the cluster first whether it has what the command needs.")
    ] = False,
    status: Annotated[str | None, typer.Option(metavar="JOB", help="How a job stands.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="JOB", help="Follow a job from its beginning.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="End a job.")] = None,
    as_json: Json = False,
) -> None:
    """Run a command on a Ray cluster; ends with the job's own exit code."""
    asked = {"--status": status, "--logs": logs, "--stop": stop}
    chosen = [name for name, job in asked.items() if job is not None] + (["a command"] if command else [])
    if len(chosen) != 1:
        found = f"there are {' and '.join(chosen)}" if chosen else "there is none"
        raise UsageError(f"submit takes one of -- COMMAND, --status, --logs and --stop, and {found}.")
    from kngd_ray.cluster import submit as jobs

    display = display_for(as_json)
    if status is not None:
        result = jobs.status(status, address, display)
    elif logs is not None:
        result = jobs.logs(logs, address, display)
    elif stop is not None:
        result = jobs.stop(stop, address, display)
    else:
        options = jobs.SubmitOptions(
            address=address,
            working_dir=working_dir,
            include=include or (),
            dry_run=dry_run,
            follow=not no_follow,
            check=not no_check,
        )
        result = jobs.submit(command or [], parsed(*(command or [])), options, display)
    if as_json:
        print_json(result)
    if (command or logs) and result["exit_code"]:
        raise typer.Exit(result["exit_code"])


def parsed(name: str, *words: str) -> "Arguments":
    """Parse a command line that is for a cluster, as it will be parsed there; wrong options end it here.

    Args:
        name: of the command.
        *words: what follows it.

    Returns:
        What was given.

    Raises:
        UsageError: there is no such command for a cluster.
    """
    from kngd_ray.cli.app import app
    from kngd_ray.cluster.preflight import Arguments

    group = typer.main.get_command(app)
    commands = {key: found for key, found in group.commands.items() if key != "submit"}  # type: ignore[attr-defined]
    if name not in commands:
        raise UsageError(f"kngd-ray has no command {name!r} for a cluster{nearest(name, list(commands))}.")
    plain: list[str] = []
    options: dict[str, str] = {}
    context = commands[name].make_context(name, list(words))
    for parameter in commands[name].params:
        value = context.params.get(parameter.name)
        source = context.get_parameter_source(parameter.name)
        if value is None or source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "argument":
            plain += [str(word) for word in (value if isinstance(value, (list, tuple)) else [value])]
        elif not parameter.is_flag:
            options[parameter.opts[-1]] = str(value)
    return Arguments(name, plain, options)
