"""``kngd-ray export``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json


def export(
    target: Target,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also the classifier of pictures, as ONNX.")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="Also LoRA as Hugging Face's peft reads it.")] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME", help="Then upload it to Hugging Face's hub, privately if it is new.", show_default=False
        ),
    ] = None,
    storage_path: Storage = "kngd_runs",
    as_json: Json = False,
) -> None:
    """Write a run as an open_clip checkpoint, LoRA merged, as an ONNX classifier, and for peft."""
    from kngd_ray.experiment.export import export as run

    result = run(target, out, storage_path, display_for(as_json), onnx=onnx, peft=peft, push=push)
    if as_json:
        print_json(result)
