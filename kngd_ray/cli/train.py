"""``kngd-ray train``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, Settings, display_for, print_json, split
from kngd_ray.errors import UsageError


def train(
    settings: Settings = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue a run that was cut short.")] = None,
    as_json: Json = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
) -> None:
    """Few-shot fine-tuning on Ray Train; without settings, on the emoji and the model that come along."""
    from kngd_ray.config import load_config, to_yaml

    file, overrides = split(settings)
    if resume is not None:
        if file is not None:
            raise UsageError(f"a resumed run keeps its settings: leave out {file}.")
        from kngd_ray.experiment.run import resumed_config

        config = resumed_config(resume, overrides)
    else:
        config = load_config(file, overrides)
    if print_config:
        typer.echo(to_yaml(config), nl=False)
        return
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.run import train as run

    result = run(config, display_for(as_json), RayBackend(), resume=resume is not None)
    if as_json:
        print_json(result)
