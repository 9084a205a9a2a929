"""``kngd-ray sync``."""

from typing import Annotated

import typer

from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.cli.arguments import Json, Storage, display_for, print_json


def sync(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name or folder of a run.")],
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store; by default the run's own.")] = None,
    storage_path: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Send to MLflow what a run could not log while the tracking server was unreachable."""
    from kngd_ray import api

    result = api.sync(run, uri=uri, storage_path=storage_path, console=display_for(as_json))
    if as_json:
        print_json(result)
