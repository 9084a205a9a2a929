"""``kngd-ray ensemble``."""

from typing import Annotated

import typer

from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.cli.arguments import Json, Storage, Target, display_for, print_json


def ensemble(
    target: Target,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="alpha=A | KEY=VALUE",
            help="The alpha that evaluate, predict and export use from now on; without it the curve is only shown.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(metavar="N", help="Number of alphas between 0 and 1 to score.")] = 11,
    storage_path: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Average a run's weights with the pretrained ones and plot test accuracy over alpha; alpha=0.5 keeps the average.

    The curve is measured on the test sets, so do not choose alpha from it.
    """
    from kngd_ray import api

    console = display_for(as_json)
    result = api.ensemble(
        target, *(settings or []), points=points, storage_path=storage_path, ray=True, console=console
    )
    if as_json:
        print_json(result)
