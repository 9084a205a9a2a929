"""Sending one record: settings, steps, final metrics, artifacts, model, and its status last."""

import hashlib
import logging
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kngd_ray.errors import printable, redact
from kngd_ray.tracking._files import ARTIFACTS, META, METRICS, MODEL, STEPS, SYSTEM, read_json, read_steps
from kngd_ray.tracking._pyfunc import save_pyfunc
from kngd_ray.tracking._server import Server

logger = logging.getLogger(__name__)

_MAX_METRICS = 1000  # of one log_batch
_MAX_PARAMS = 100
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000
_FORBIDDEN = re.compile(r"[^/\w.\- :]")

Point = tuple[str, float, int, int]


class Sender:
    """Sends one record.

    Args:
        server: where to.
        folder: the record's.
        sent: what the store has already; changed in place.
        save: keeps `sent`.
    """

    def __init__(self, server: Server, folder: Path, sent: dict[str, Any], save: Callable[[], None]) -> None:
        self._server = server
        self._folder = folder
        self._sent = sent
        self._save = save

    def send(self, parent: str | None) -> str | None:
        """Send what is missing; the status goes last, so a finished run is complete.

        Args:
            parent: id of the parent run, if any.

        Returns:
            The id of the run; None if it was deleted in MLflow.
        """
        stamp = _stamp(self._folder)  # taken before anything is read: what comes later is for the next time
        if self._sent.get("stamp") == stamp:
            run_id: str = self._sent["run_id"]
            return run_id
        meta = read_json(self._folder / META)
        assert meta is not None
        run = self._run(meta, parent)
        if run is None:
            return None
        self._send_settings(run, meta)
        self._send_steps(run, STEPS, "steps")
        self._send_steps(run, SYSTEM, "system")
        self._send_metrics(run)
        self._send_artifacts(run)
        self._send_model(run)
        self._send_status(run, meta)
        self._keep(stamp=stamp)
        return run

    def _run(self, meta: dict[str, Any], parent: str | None) -> str | None:
        """The run's id, created if need be; None if the run was deleted.

        Raises:
            ValueError: the record's uid is none of ours.
        """
        known = self._sent.get("run_id")
        stage = self._server.stage(known) if known is not None else None
        if stage == "deleted":
            logger.warning("run %s of record %s was deleted in MLflow: it is left alone", known, self._folder.name)
            return None
        if stage is None:
            self._sent.clear()
            if not meta["uid"].isalnum():  # it becomes part of a search
                raise ValueError(f"its uid is {meta['uid']!r}")
            tags = {_key(key): _value(value)[:_MAX_TAG] for key, value in meta["tags"].items()}
            run_id = self._server.create_run(meta["uid"], printable(meta["name"]), tags, meta["start"], parent)
            self._keep(run_id=run_id, steps=0, tags=meta["tags"])
            return run_id
        return known

    def _send_settings(self, run: str, meta: dict[str, Any]) -> None:
        params = {k: v for k, v in meta["params"].items() if k not in self._sent.get("params", [])}
        tags = {k: v for k, v in meta["tags"].items() if self._sent.get("tags", {}).get(k) != v}
        for part in _chunks(list(params.items()), _MAX_PARAMS):
            self._server.log(run, params={_key(k): _value(v)[:_MAX_PARAM] for k, v in part})
        for part in _chunks(list(tags.items()), _MAX_PARAMS):
            self._server.log(run, tags={_key(k): _value(v)[:_MAX_TAG] for k, v in part})
        if meta.get("input") is not None and self._sent.get("input") != meta["input"]:
            self._server.log_input(run, meta["input"])
        self._keep(params=list(meta["params"]), tags=meta["tags"], input=meta.get("input"))

    def _send_steps(self, run: str, file: str, counted: str) -> None:
        done: int = self._sent.get(counted, 0)
        waiting: list[Point] = []
        for line in read_steps(self._folder / file, done):
            points = _points(line["metrics"], line["time"], line["step"], _keys(line["metrics"]))
            if waiting and len(waiting) + len(points) > _MAX_METRICS:
                self._send_points(run, waiting)
                self._keep(**{counted: done})
                waiting = []
            waiting += points
            done += 1
        self._send_points(run, waiting)
        self._keep(**{counted: done})

    def _send_metrics(self, run: str) -> None:
        metrics = read_json(self._folder / METRICS)
        if metrics is None:
            return
        changed = {k: v for k, v in metrics.items() if self._sent.get("metrics", {}).get(k) != v}
        self._send_points(run, _points(changed, _mtime_ms(self._folder / METRICS), 0, _keys(metrics)))
        self._keep(metrics=metrics)

    def _send_points(self, run: str, points: list[Point], model_id: str | None = None) -> None:
        for part in _chunks(points, _MAX_METRICS):
            self._server.log(run, metrics=part, model_id=model_id)

    def _send_artifacts(self, run: str) -> None:
        root = self._folder / ARTIFACTS
        sent = self._sent.setdefault("artifacts", {})
        for name, version in _files(root):
            if sent.get(name) == version:
                continue
            below = Path(name).parent.as_posix()
            with self._server.refusals():
                self._server.client.log_artifact(run, str(root / name), None if below == "." else below)
            sent[name] = version
            self._save()

    def _send_model(self, run: str) -> None:
        """Send the model as MLflow's own log_model does, without its active run and global address."""
        wanted = read_json(self._folder / MODEL)
        state = self._sent.get("model", {})
        if wanted is None or state.get("ready") == wanted:
            return
        fit = (self._folder.parents[1] / wanted["folder"]).resolve()
        inside = fit.is_relative_to(self._folder.parents[1].resolve())
        if not inside or any(path.is_symlink() for path in fit.rglob("*")):
            logger.warning("%s leads out of the run's folder, so run %s has no model", fit, self._folder.name)
            return
        if not fit.is_dir():
            logger.warning("%s is gone, so run %s has no model", fit, self._folder.name)
            return
        from mlflow.entities import LoggedModelOutput

        client = self._server.client
        with self._server.refusals():
            if state.get("begun") != wanted:  # else an upload that was cut short goes on
                model_id = client.create_logged_model(self._server.experiment_id, "model", source_run_id=run).model_id
                state = {"begun": wanted, "id": model_id}
                self._keep(model=state)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model"
                save_pyfunc(
                    fit,
                    path,
                    wanted["class_names"],
                    run_id=run,
                    model_id=state["id"],
                    features=wanted.get("features"),
                )
                client.log_model_artifacts(state["id"], str(path))
            client.finalize_logged_model(state["id"], "READY")
            client.log_outputs(run, [LoggedModelOutput(state["id"], step=0)])
        if "registered_model" in wanted:
            self._server.register(wanted["registered_model"], state["id"], run)
        metrics = read_json(self._folder / METRICS) or {}
        self._send_points(run, _points(metrics, _mtime_ms(self._folder / METRICS), 0, _keys(metrics)), state["id"])
        self._keep(model={**state, "ready": wanted})

    def _send_status(self, run: str, meta: dict[str, Any]) -> None:
        ended = [meta["status"], meta["end"]]
        if self._sent.get("ended") == ended:
            return
        with self._server.refusals():
            if meta["status"] != "RUNNING":
                self._server.client.set_terminated(run, meta["status"], meta["end"])
            elif "ended" in self._sent:  # resumed
                self._server.client.update_run(run, status="RUNNING")
        self._keep(ended=ended)

    def _keep(self, **changes: Any) -> None:
        if any(self._sent.get(key) != value for key, value in changes.items()):
            self._sent |= changes
            self._save()


def _points(metrics: Mapping[str, float | str], time_ms: int, step: int, keys: Mapping[str, str]) -> list[Point]:
    """Finite values as MLflow takes them."""
    return [
        (keys[name], float(value), time_ms, step)
        for name, value in metrics.items()
        if not isinstance(value, str) and math.isfinite(value)
    ]


def _key(name: str) -> str:
    """A name that MLflow accepts: other characters become underscores, and parts that a path would not keep."""
    parts = _FORBIDDEN.sub("_", name).split("/")
    key = "/".join("_" if part in {"", ".", ".."} else part for part in parts)
    return key if len(key) <= _MAX_KEY else f"{key[: _MAX_KEY - 1]}_"


def _keys(names: Collection[str]) -> dict[str, str]:
    """The key of each name. Of names that have one key, those that it changes end with a digest: none hides another."""
    shared = Counter(map(_key, names))
    keys = {}
    for name in names:
        keys[name] = _key(name)
        if keys[name] != name and shared[keys[name]] > 1:
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            keys[name] = f"{keys[name][: _MAX_KEY - 9]}-{digest}"
    return keys


def _value(text: str) -> str:
    """A text as it may be stored for others to read."""
    return printable(redact(text), "\n\t")


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mtime_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000 if path.exists() else 0


def _files(root: Path) -> list[tuple[str, list[int]]]:
    """Names, sizes and times of the files below a folder, without those still being written, and what links lead to."""
    found = []
    inside = root.resolve()
    for path in sorted(root.rglob("*")):
        with suppress(FileNotFoundError):  # gone since
            if path.suffix != ".tmp" and path.is_file() and path.resolve() == inside / path.relative_to(root):
                stat = path.stat()
                found.append((path.relative_to(root).as_posix(), [stat.st_size, stat.st_mtime_ns]))
    return found


def _stamp(folder: Path) -> str:
    """Changes whenever a file of a record does."""
    return hashlib.sha256(repr(_files(folder)).encode()).hexdigest()[:16]
