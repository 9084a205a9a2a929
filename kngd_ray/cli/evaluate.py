"""``kngd-ray evaluate``."""

from kngd_ray.cli.arguments import Json, Settings, Storage, Target, display_for, print_json, split


def evaluate(
    target: Target, settings: Settings = None, storage_path: Storage = "kngd_runs", as_json: Json = False
) -> None:
    """Score a trained run in and out of distribution, on its own data or on other data."""
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.experiment.evaluate import evaluate as run

    result = run(target, *split(settings), storage_path, display_for(as_json), RayBackend())
    if as_json:
        print_json(result)
