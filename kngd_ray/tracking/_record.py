"""One future MLflow run as a folder of plain files, written while the run goes on.

::

    <run folder>/records/<id>/
        meta.json      id, uid, name, parent, params, tags, status, start and end
        steps.jsonl    {"step": 12, "time": 1700000000000, "metrics": {"train/nll": 0.31}}
        metrics.json   final metrics, name to value
        system.jsonl   what the run took of its machine, as steps.jsonl
        model.json     the fit that is logged as a model, if any
        artifacts/     every file here is logged, subfolders kept

Files are strict JSON: a value that is not finite is the string "NaN", "Infinity" or "-Infinity".
Such values stay here; MLflow gets the finite ones. Nothing in this module needs MLflow or a network.
"""

import json
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kngd_ray.storage import storage_errors
from kngd_ray.tracking._files import (
    ARTIFACTS,
    META,
    METRICS,
    MODEL,
    RECORDS,
    STEPS,
    cut_torn_line,
    read_json,
    read_steps,
    write_json,
)

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_FLUSH_LINES = 200
_FLUSH_SECONDS = 2.0

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class Record:
    """What one run has to say, in order; made by :meth:`open`. Only one process writes a record.

    Attributes:
        folder: the record's folder.
        artifacts: put files here, in subfolders if wanted, and they are logged.
    """

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self.folder = folder
        self.artifacts = folder / ARTIFACTS
        self._meta = meta
        self._buffer: list[str] = []
        self._flushed = time.monotonic()
        self._end = cut_torn_line(folder / STEPS)
        self._seen = {line["step"] for line in read_steps(folder / STEPS)}

    @classmethod
    def open(
        cls,
        run_folder: Path,
        id: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        parent: str | None = None,
    ) -> "Record":
        """Start a record, or continue the one that an interrupted run left.

        A continued record keeps its start time, its steps and the params it had, since MLflow does
        not let a param change; new params and all tags are taken over. Its status is RUNNING again.

        Args:
            run_folder: the run's folder, which may hold many records.
            id: letters, digits, dots, dashes and underscores; names the record within the run.
            name: of the MLflow run.
            params: flat settings, name to value.
            tags: name to value.
            parent: id of the record that this one is a child of.

        Returns:
            The record, ready to log.

        Raises:
            ValueError: the id cannot name a folder.
        """
        if not _ID.fullmatch(id):
            raise ValueError(f"record id {id!r} must be letters, digits, dots, dashes and underscores")
        folder = run_folder / RECORDS / id
        with storage_errors(folder):
            (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
            meta = _known(folder / META)
            if not (_is_text(meta.get("uid")) and type(meta.get("start")) is int and _are_texts(meta)):
                meta = {"id": id, "uid": uuid.uuid4().hex, "start": _now()}
            meta |= {
                "name": name,
                "parent": parent,
                "params": {key: str(value) for key, value in params.items()} | meta.get("params", {}),
                "tags": meta.get("tags", {}) | {key: str(value) for key, value in tags.items()},
                "status": "RUNNING",
                "end": None,
            }
            write_json(folder / META, meta)
            return cls(folder, meta)

    @property
    def status(self) -> Status:
        """RUNNING until :meth:`finish`."""
        status: Status = self._meta["status"]
        return status

    def log_input(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Note the data set that the run learns from; MLflow groups runs by its name and digest.

        Args:
            name: of the data set.
            digest: of its content, at most 36 characters.
            source: where it was read.
            profile: what else is to be shown of it, plain data.
        """
        self._meta["input"] = {"name": name, "digest": digest, "source": source, "profile": dict(profile)}
        with storage_errors(self.folder):
            write_json(self.folder / META, self._meta)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the figures of a step; a step that is already noted is passed over.

        A resumed run repeats the steps after its checkpoint, with the same figures.

        Args:
            step: number of the step.
            metrics: name to value; non-finite values are kept, but not sent to MLflow.
        """
        if step in self._seen:
            return
        self._seen.add(step)
        line = {
            "step": step,
            "time": _now(),
            "metrics": {key: _strict(value) for key, value in metrics.items()},
        }
        self._buffer.append(json.dumps(line) + "\n")
        if len(self._buffer) >= _FLUSH_LINES or time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put buffered steps into the file; whole lines or none, so it can be tried again.

        Raises:
            StorageError: the file cannot be written.
        """  # noqa: DOC501 - storage_errors turns OSError into it
        self._flushed = time.monotonic()
        if not self._buffer:
            return
        data = "".join(self._buffer).encode()
        path = self.folder / STEPS
        with storage_errors(path), path.open("ab", buffering=0) as file:
            try:
                written = file.write(data)
                if written < len(data):  # the disk is about to be full; the rest says how
                    file.write(data[written:])
            except OSError:
                file.truncate(self._end)
                raise
        self._end += len(data)
        self._buffer.clear()

    def steps(self) -> list[dict[str, float]]:
        """All steps so far, those before a resume too, as ``{"step": 3, "train/nll": 0.4, ...}``."""
        self.flush()
        lines = [line for line in read_steps(self.folder / STEPS) if line["step"] >= 0]  # others were damaged
        return [{"step": line["step"], **_values(line["metrics"])} for line in lines]

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Note final metrics; a name noted before gets the new value.

        Args:
            metrics: name to value; non-finite values are kept, but not sent to MLflow.
        """
        path = self.folder / METRICS
        write_json(path, _known(path) | {key: _strict(value) for key, value in metrics.items()})

    def set_tag(self, key: str, value: object) -> None:
        """Note a tag.

        Args:
            key: its name.
            value: what it says.
        """
        self._meta["tags"][key] = str(value)
        write_json(self.folder / META, self._meta)

    def set_model(
        self,
        folder_of_fit: Path,
        class_names: Sequence[str] = (),
        registered_model: str | None = None,
        *,
        features: int | None = None,
    ) -> None:
        """Name the finished fit that is logged as this run's model.

        Args:
            folder_of_fit: its checkpoint and calibration; copied when it is published.
            class_names: the classes in order, noted in the model's metadata.
            registered_model: name in the registry under which it becomes the champion; None registers nothing.
            features: length of the features that the fit takes; None is of one that takes pictures.
        """
        run_folder = self.folder.parents[1].resolve()
        fit = folder_of_fit.resolve()
        inside = fit.is_relative_to(run_folder)  # then the run folder can move to another machine
        place = fit.relative_to(run_folder) if inside else fit
        model: dict[str, Any] = {"folder": str(place), "class_names": list(class_names)}
        if registered_model is not None:
            model["registered_model"] = registered_model
        if features is not None:
            model["features"] = features
        write_json(self.folder / MODEL, model)

    def finish(self, status: Status = "FINISHED") -> None:
        """Say how the run ended, after all else is written.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        self.flush()
        self._meta |= {"status": status, "end": _now()}
        write_json(self.folder / META, self._meta)


def artifacts_of(run_folder: Path, id: str) -> Path:
    """The folder of a record's artifacts.

    Args:
        run_folder: the run's folder.
        id: of the record.

    Returns:
        The folder, which is not there if the record is not.
    """
    return run_folder / RECORDS / id / ARTIFACTS


def read_metrics(run_folder: Path, id: str) -> dict[str, float]:
    """Read the final metrics of a record, as :meth:`Record.log_metrics` has noted them.

    Args:
        run_folder: the run's folder.
        id: of the record.

    Returns:
        Name to value; empty where there is no such record.
    """
    return _values(_known(run_folder / RECORDS / id / METRICS))


def _known(path: Path) -> dict[str, Any]:
    """What a file of the record holds already; a damaged one is begun again, which is better than no run."""
    try:
        return read_json(path) or {}
    except ValueError as error:
        logger.warning("%s is damaged (%s): begun again", path, error)
        return {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(meta: Mapping[str, Any]) -> bool:
    """Whether params and tags are names and texts, as this module writes them."""
    both = [meta.get("params", {}), meta.get("tags", {})]
    return all(isinstance(each, dict) and all(map(_is_text, each.values())) for each in both)


def _strict(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _values(metrics: Mapping[str, float | str]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _now() -> int:
    return time.time_ns() // 1_000_000
