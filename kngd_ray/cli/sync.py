"""``kngd-ray sync``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Storage, display_for, print_json


def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    uri: Annotated[str | None, typer.Option(help="Another MLflow tracking store than the run's.")] = None,
    storage_path: Storage = "kngd_runs",
    as_json: Json = False,
) -> None:
    """Send to MLflow what a run could not log while the server was away."""
    from kngd_ray.experiment.sync import sync as send

    result = send(run, storage_path, display_for(as_json), uri=uri)
    if as_json:
        print_json(result)
