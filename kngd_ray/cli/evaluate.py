"""``kngd-ray evaluate``."""

from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.cli.arguments import Json, Settings, Storage, Target, display_for, print_json


def evaluate(
    target: Target, settings: Settings = None, storage_path: Storage = DEFAULT_STORAGE, as_json: Json = False
) -> None:
    """Evaluate a run in and out of distribution, on its own data or on other data with the same classes."""
    from kngd_ray import api

    found = api.evaluate(target, *(settings or []), storage_path=storage_path, ray=True, console=display_for(as_json))
    if as_json:
        print_json(found.report)
