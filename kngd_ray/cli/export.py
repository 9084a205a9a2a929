"""``kngd-ray export``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json


def export(
    target: Target,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new or empty folder.", show_default=False)],
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write the image classifier as ONNX.")] = False,
    peft: Annotated[bool, typer.Option("--peft", help="Also write LoRA in the layout of Hugging Face's peft.")] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Then upload it to the Hugging Face hub; a new repository is private.",
            show_default=False,
        ),
    ] = None,
    storage_path: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Export a run as an open_clip checkpoint, with LoRA merged, as an ONNX classifier, and for peft."""
    from kngd_ray import api

    result = api.export(
        target, out, onnx=onnx, peft=peft, push=push, storage_path=storage_path, console=display_for(as_json)
    )
    if as_json:
        print_json(result)
