"""``kngd-ray compare``."""

from pathlib import Path
from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, display_for, print_json


def compare(
    experiment: Annotated[str, typer.Argument(metavar="EXPERIMENT", help="Name of an MLflow experiment.")],
    parent: Annotated[str | None, typer.Option(metavar="RUN", help="Only this run; for a search, its trials.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Metric to show, repeatable: ood/mean/brier.", show_default=False),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="RUN|METHOD", help="Baseline of the differences; by default adamw, else zero-shot."),
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow tracking store; by default that of train.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="The HTML page, by default compare-EXPERIMENT.html; replaces only pages that kngd-ray wrote.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the runs of an MLflow experiment: paired by seed, with intervals, a Pareto front and an HTML page."""
    from kngd_ray import api

    display = display_for(as_json)
    found = api.compare(
        experiment, parent=parent, metrics=metric or [], baseline=baseline, uri=uri, out=out, console=display
    )
    if as_json:
        print_json(found.report)
