"""``kngd-ray tune``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, SearchSettings, display_for, print_json, split


def tune(
    settings: SearchSettings = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Continue a search, or help the process that runs it.")
    ] = None,
    as_json: Json = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole search and stop.")] = False,
) -> None:
    """Search for priors with Ray Tune and Optuna, then fit and test the best once."""
    from kngd_ray import api
    from kngd_ray.config import to_yaml

    file, overrides = split(settings)
    if print_config:
        from kngd_ray.tuning.file import search_yaml

        search = api.configured_search(file, overrides, resume)
        typer.echo(to_yaml(search.config) + search_yaml(search), nl=False)
        return
    found = api.tune(file, *overrides, resume=resume, ray=True, console=display_for(as_json))
    if as_json:
        print_json(found.report)
