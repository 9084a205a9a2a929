"""``kngd-ray ensemble``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json, split
from kngd_ray.errors import UsageError


def ensemble(
    target: Target,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="alpha=A | KEY=VALUE",
            help="The alpha to keep for evaluate, predict and export, chosen before looking at the test; none shows.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(metavar="N", help="Values of alpha to score, from 0 to 1.")] = 11,
    storage_path: Storage = "kngd_runs",
    as_json: Json = False,
) -> None:
    """Test accuracy over alpha of a run's weights averaged with the pretrained ones; alpha=0.5 keeps that average.

    The curve is over the test sets: it is for looking. Choose alpha without it.
    """
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.ensemble import ensemble as run

    file, overrides = split(settings)
    if file is not None:
        raise UsageError(f"ensemble takes its settings from the run: leave out {file}, or write alpha={file}.")
    result = run(target, overrides, points, storage_path, display_for(as_json), RayBackend())
    if as_json:
        print_json(result)
