"""``kngd-ray encode``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json


def encode(
    dataset: Annotated[str, typer.Argument(help='Parquet file, folder of images, or "embedded".')],
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also write features and class embeddings here.", show_default=False),
    ] = None,
    views: Annotated[
        int, typer.Option(metavar="N", min=0, help="Also N random crops of each picture, which heads learn from.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Encode a data set with Ray Data and cache its features; --out also writes them to files."""
    from kngd_ray import api

    result = api.encode(dataset, *(settings or []), out=out, views=views, ray=True, console=display_for(as_json))
    if as_json:
        print_json(result)
