"""``kngd-ray tune``."""

from typing import Annotated

import typer

from kngd_ray.cli.arguments import Json, SearchSettings, display_for, print_json, split
from kngd_ray.errors import UsageError


def tune(
    settings: SearchSettings = None,
    resume: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="Continue a search, or help the process that runs it.")
    ] = None,
    as_json: Json = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the whole search and stop.")] = False,
) -> None:
    """Search for priors with Ray Tune and Optuna, then fit and test the best once."""
    from kngd_ray.config import to_yaml
    from kngd_ray.tuning.file import load_search, resumed_search, search_yaml

    file, overrides = split(settings)
    if resume is not None:
        if file is not None:
            raise UsageError(f"a continued search keeps its settings: leave out {file}.")
        search = resumed_search(resume, overrides)
    elif file is None:
        raise UsageError("name a search, such as noise_priors or a YAML file, or --resume SEARCH.")
    else:
        search = load_search(file, overrides)
    if print_config:
        typer.echo(to_yaml(search.config) + search_yaml(search), nl=False)
        return
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.tuning.run import tune as run

    result = run(search, display_for(as_json), RayBackend(), resume=resume is not None)
    if as_json:
        print_json(result)
