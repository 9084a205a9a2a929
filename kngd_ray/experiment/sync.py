"""``kngd-ray sync``: send to MLflow what a run could not log."""

import time

from kngd_ray.console import Display
from kngd_ray.experiment import run_folder
from kngd_ray.tracking import publish


def sync(name: str, storage_path: str, display: Display, *, uri: str | None = None) -> dict[str, str]:
    """Send what a run keeps in its folder and the tracking store does not have yet.

    Args:
        name: name or folder of the run.
        storage_path: where runs live.
        display: where the outcome is shown.
        uri: another tracking store than the run's.

    Returns:
        MLflow run id by record.
    """
    folder = run_folder.find(name, storage_path)
    config = run_folder.read_config(folder)
    began = time.monotonic()
    with run_folder.locked(folder):
        ids = publish(folder, uri or config.tracking.uri, config.tracking.experiment)
    display.say(f"MLflow runs up to date: {len(ids)} ({time.monotonic() - began:.1f} s)")
    return ids
