"""The files of a record: their names, and reads and writes that never show a partial file."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kngd_ray import storage
from kngd_ray.storage import write_text

RECORDS = "records"
META, STEPS, METRICS, MODEL, ARTIFACTS = "meta.json", "steps.jsonl", "metrics.json", "model.json", "artifacts"
SYSTEM = "system.jsonl"


def read_steps(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Lines of a steps file; a last line without its newline is still being written.

    Args:
        path: the file, which need not exist.
        start: lines to pass over.

    Yields:
        The lines; one that is no JSON, after damage to the disk, is an empty step -1 so that the count holds.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number < start or not line.endswith(b"\n"):
                continue
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            yield found if _is_step(found) else {"step": -1, "time": 0, "metrics": {}}


def _is_step(line: Any) -> bool:
    """Whether a line is one that a record writes."""
    if not isinstance(line, dict) or not all(type(line.get(key)) is int for key in ("step", "time")):
        return False
    metrics = line.get("metrics")
    return isinstance(metrics, dict) and all(_is_value(value) for value in metrics.values())


def _is_value(value: Any) -> bool:
    return type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        value = storage.read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} does not hold a JSON object")
    json.dumps(value, allow_nan=False)  # what is read is written again, as strict as before
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one move: a reader sees the old text or the new one."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def cut_torn_line(path: Path) -> int:
    """Drop a line that a killed process did not finish; returns the size of what is left."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return whole
