"""``kngd-ray compare``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, display_for, print_json


def compare(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Name of an MLflow experiment.")],
    parent: Annotated[
        str | None, typer.Option(metavar="RUN", help="Only what belongs to this run; of a search, its trials.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Column, repeatable: ood/mean/brier.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="RUN|METHOD", help="What differences are from: adamw, else zero-shot.")
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store: that of train's default.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page: compare-EXPERIMENT.html.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """MLflow runs side by side: paired by seed, with intervals, a Pareto front, and one HTML page."""
    from kngd_ray import api

    display = display_for(as_json)
    found = api.compare(
        experiment, parent=parent, metrics=metric or [], baseline=baseline, uri=uri, out=out, console=display
    )
    if as_json:
        print_json(found.report)
