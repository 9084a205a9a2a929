"""``kngd-ray predict``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json
from kngd_ray.errors import UsageError


def predict(
    target: Target,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE", help="Image files or folders; parquet files if the run was trained on features."
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Also write a gallery, the most novel first; replaces only pages that kngd-ray wrote.",
            show_default=False,
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of the table.")] = False,
    storage_path: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Classify images: the class, its probability with an interval, and a novelty percentile."""
    from kngd_ray.api.runs import as_csv as written
    from kngd_ray.api.runs import predictions

    if as_csv and as_json:
        raise UsageError("--csv and --json both print on standard output: leave one of them out.")
    console = display_for(as_json or as_csv)
    result = predictions(target, images, storage_path=storage_path, html=html, table=not as_csv, console=console)
    if as_csv:
        sys.stdout.write(written(result))
    if as_json:
        print_json(result)
