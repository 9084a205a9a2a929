"""``kngd-ray export``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json


def export(
    target: Target,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write the image classifier as ONNX.")] = False,
    storage_path: Storage = "kngd_runs",
    as_json: Json = False,
) -> None:
    """Export a run as an open_clip checkpoint, with LoRA merged, and as an ONNX classifier."""
    from kngd_ray import api

    result = api.export(target, out, onnx=onnx, storage_path=storage_path, console=display_for(as_json))
    if as_json:
        print_json(result)
