"""``kngd-ray doctor``."""

import json
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json, split


def doctor(
    settings: Settings = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster: that of trainer.address.")] = None,
    storage_path: Annotated[str | None, typer.Option(help="Where runs would live: trainer.storage_path.")] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store: that of tracking.uri.")] = None,
    no_ray: Annotated[bool, typer.Option("--no-ray", help="Neither join nor start Ray.")] = False,
    as_json: Json = False,
) -> None:
    """Check what a run needs, here and on every node: versions, Ray and who it lets in, GPUs, storage, tracking, model.

    Joins the cluster that train would join, or starts Ray as train would, and leaves nothing behind; exit code 1 if a
    check failed.
    """
    from kngd_ray import api

    given = {"trainer.address": address, "trainer.storage_path": storage_path, "tracking.uri": uri}
    file, overrides = split(settings)
    config = api.configured(
        file, [*overrides, *(f"{key}={json.dumps(v)}" for key, v in given.items() if v is not None)]
    )
    from kngd_ray.cluster.doctor.run import doctor as run

    result = run(config, display_for(as_json), with_ray=not no_ray)
    if as_json:
        print_json(result)
    if not result["ok"]:
        raise typer.Exit(1)
