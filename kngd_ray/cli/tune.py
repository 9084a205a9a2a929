"""``kngd-ray tune``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, SearchSettings, display_for, print_json


def tune(
    settings: SearchSettings = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Continue a search, or join the process that runs it.")
    ] = None,
    as_json: Json = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete search configuration and exit.")
    ] = False,
) -> None:
    """Search for settings with Optuna on Ray, then fit the best trial and test it once."""
    from kngd_ray.api import settings as given
    from kngd_ray.api import tune as run
    from kngd_ray.config import to_yaml

    if print_config:
        from kngd_ray.tuning.file import search_yaml

        search = given.configured_search(None, settings or [], resume)
        typer.echo(to_yaml(search.config) + search_yaml(search), nl=False)
        return
    found = run(None, *(settings or []), resume=resume, ray=True, console=display_for(as_json))
    if as_json:
        print_json(found.report)
