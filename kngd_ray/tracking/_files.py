"""The files of a record: their names, and reading and writing them so that no reader sees a half."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kngd_ray.storage import write_text

RECORDS = "records"
META, STEPS, METRICS, MODEL, ARTIFACTS = "meta.json", "steps.jsonl", "metrics.json", "model.json", "artifacts"


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
                yield json.loads(line)
            except ValueError:
                yield {"step": -1, "time": 0, "metrics": {}}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
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
