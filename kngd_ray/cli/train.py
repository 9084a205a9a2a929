"""``kngd-ray train``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json


def train(
    settings: Settings = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue an interrupted run.")] = None,
    as_json: Json = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete configuration and exit.")
    ] = False,
) -> None:
    """Fine-tune CLIP on a few images per class, with Ray Train.

    Without settings it trains the shipped model on the shipped emoji.
    """
    from kngd_ray.api import settings as given
    from kngd_ray.api import train as run
    from kngd_ray.config import to_yaml

    if print_config:
        typer.echo(to_yaml(given.configured(None, settings or [], resume)), nl=False)
        return
    found = run(None, *(settings or []), resume=resume, ray=True, console=display_for(as_json))
    if as_json:
        print_json(found.report)
