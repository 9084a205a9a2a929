"""``kngd-ray train``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json, split


def train(
    settings: Settings = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run that was cut short.")] = None,
    as_json: Json = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
) -> None:
    """Few-shot fine-tuning on Ray Train; without settings, on the emoji and the model that come along."""
    from kngd_ray import api
    from kngd_ray.config import to_yaml

    file, overrides = split(settings)
    if print_config:
        typer.echo(to_yaml(api.configured(file, overrides, resume)), nl=False)
        return
    run = api.train(file, *overrides, resume=resume, ray=True, console=display_for(as_json))
    if as_json:
        print_json(run.report)
