"""``kngd-ray predict``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json
from kngd_ray.errors import UsageError


def predict(
    target: Target,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE", help="Picture files, or folders of them; parquet files of a run on features."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also a gallery, the least certain first.", show_default=False),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values in place of the table.")] = False,
    storage_path: Storage = "kngd_runs",
    as_json: Json = False,
) -> None:
    """Class of pictures, its probability with an interval, and how unlike the training pictures they are."""
    from kngd_ray.experiment import predict as command

    if as_csv and as_json:
        raise UsageError("--csv and --json both print on standard output: leave one of them out.")
    result = command.predict(target, images, storage_path, display_for(as_json or as_csv), html=html, table=not as_csv)
    if as_csv:
        sys.stdout.write(command.as_csv(result))
    if as_json:
        print_json(result)
