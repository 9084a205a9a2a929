"""``kngd-ray encode``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json, split


def encode(
    dataset: Annotated[str, typer.Argument(help='Parquet file, folder of pictures, or "embedded".')],
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also features and class embeddings as files.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute frozen features of a whole data set into the cache, with Ray Data; --out writes them as files, too."""
    file, overrides = split(settings)
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.encode import encode as run

    result = run(dataset, None if file is None else Path(file), overrides, display_for(as_json), RayBackend(), out=out)
    if as_json:
        print_json(result)
