"""What the trials of a search are scored on: one that is continued scores the rest on the same."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kngd_ray.errors import CheckpointError, UsageError
from kngd_ray.experiment.prepared import TaskData
from kngd_ray.storage import read_json, write_text

TASK = "task.json"


def check_same_task(folder: Path, prepared: TaskData, seeds: Iterable[int]) -> None:
    """Note what a search is about, or refuse to go on with other shots, classes or another model.

    Args:
        folder: of the search; one that was begun by an earlier version has no note yet, and gets one.
        prepared: its data and model.
        seeds: of the support sets of each trial.

    Raises:
        UsageError: something has changed since the search was begun.
        CheckpointError: the note cannot be read.
    """
    identity, place = prepared.identity, folder / TASK
    now: dict[str, Any] = {
        "model": identity["model"],
        "logit_scale": prepared.model.logit_scale,
        "class_names": identity["class_names"],
        "templates": identity["templates"],
        "shots": {str(seed): _digest(prepared, seed) for seed in seeds},
    }
    if not place.is_file():
        write_text(place, json.dumps(now, indent=1))
        return
    try:
        begun = read_json(place)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{place} cannot be read ({error}): restore it, or delete it if data and model are as they were."
        ) from error
    changed = [key for key, value in now.items() if not isinstance(begun, Mapping) or begun.get(key) != value]
    if changed:
        what = {"shots": "training shots", "model": "model or class embeddings"}.get(changed[0], changed[0])
        raise UsageError(
            f"the search {folder.name} was begun with other {what.replace('_', ' ')}, and trials on both cannot be "
            f"compared: put {prepared.config.data.name} and the model back as they were, or start a new search."
        )


def _digest(prepared: TaskData, seed: int) -> str:
    """Of the pictures or features of a support set, and their classes."""
    rows = prepared.splits[seed].support
    names = [prepared.images.class_names[label] for label in prepared.images.labels[rows].tolist()]
    return hashlib.sha256(prepared.images.keys[rows].tobytes() + "\0".join(names).encode()).hexdigest()
