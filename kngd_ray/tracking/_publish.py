"""From the run folder to MLflow: whatever has not been sent yet, and nothing twice.

``<run folder>/tracking.json`` remembers, for every store, what it has. It is saved after each
step, so an interrupted publish goes on where it stopped; what was sent but not yet remembered
is recognised by the record's uid (runs) or dropped by MLflow as the same point (metrics).
"""

import logging
import re

logger = logging.getLogger(__name__)

TRACKING = "tracking.json"
_LOCK = "tracking.lock"
_LOCK_SECONDS = 60.0
_MAX_METRICS = 1000  # of one log_batch
_MAX_PARAMS = 100
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000
_FORBIDDEN = re.compile(r"[^/\w.\- :]")

Point = tuple[str, float, int, int]


def publish(run_folder: Path, uri: str, experiment: str) -> dict[str, str]:
    """Send what MLflow does not have yet of all records of a run; safe to call again at any time.

    Args:
        run_folder: the run's folder.
        uri: the tracking store.
        experiment: name of the experiment, created if need be.

    Returns:
        MLflow run id by record id. Runs that were deleted in MLflow are left alone and left out.

    Raises:
        TrackingError: the store does not answer or refuses; what was sent until then is remembered.
    """
    uri = resolve_uri(uri)
    folders = _by_parents(run_folder)
    if not folders:
        return {}
    with _only_publisher(run_folder), quiet():
        server = Server(uri, experiment)
        memory = _Memory(run_folder / TRACKING, server, experiment)
        published: dict[str, str] = {}
        for folder, parent in folders:
            sender = _Sender(server, folder, memory.of(folder.name), memory.save)
            run_id = sender.send(published.get(parent or ""))
            if run_id is not None:
                published[folder.name] = run_id
        return published


class _Memory:
    """What each store has, in tracking.json; addresses are kept without their passwords.

    Args:
        path: the file.
        server: the store at hand.
        experiment: the experiment at hand.
    """

    def __init__(self, path: Path, server: Server, experiment: str) -> None:
        self._path = path
        self._all = read_json(path) or {}
        self._all |= {"uri": server.shown, "experiment": experiment}
        stores = self._all.setdefault("stores", {})
        key = f"{server.shown} {experiment}"
        made = [server.experiment_id, server.experiment_created]
        if stores.get(key, {}).get("made") != made:  # a new store, or a database that was deleted and begun again
            stores[key] = {"made": made, "runs": {}}
        self._runs: dict[str, dict[str, Any]] = stores[key]["runs"]

    def of(self, id: str) -> dict[str, Any]:
        """What the store has of a record, to be changed in place."""
        return self._runs.setdefault(id, {})

    def save(self) -> None:
        """Put it on disk."""
        with storage_errors(self._path):
            write_json(self._path, self._all)


class _Sender:
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
        """Send what is missing; the status goes last, so that a finished run is a complete one.

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
        self._send_steps(run)
        self._send_metrics(run)
        self._send_artifacts(run)
        self._send_model(run)
        self._send_status(run, meta)
        self._keep(stamp=stamp)
        return run

    def _run(self, meta: dict[str, Any], parent: str | None) -> str | None:
        """The run's id, created if need be; None if the run was deleted."""
        known = self._sent.get("run_id")
        stage = self._server.stage(known) if known is not None else None
        if stage == "deleted":
            logger.warning("run %s of record %s was deleted in MLflow: it is left alone", known, self._folder.name)
            return None
        if stage is None:
            self._sent.clear()
            tags = {_key(key): value[:_MAX_TAG] for key, value in meta["tags"].items()}
            run_id = self._server.create_run(meta["uid"], meta["name"], tags, meta["start"], parent)
            self._keep(run_id=run_id, status="RUNNING", steps=0, tags=meta["tags"])
            return run_id
        return known

    def _send_settings(self, run: str, meta: dict[str, Any]) -> None:
        params = {k: v for k, v in meta["params"].items() if k not in self._sent.get("params", [])}
        tags = {k: v for k, v in meta["tags"].items() if self._sent.get("tags", {}).get(k) != v}
        for part in _chunks(list(params.items()), _MAX_PARAMS):
            self._server.log(run, params={_key(k): v[:_MAX_PARAM] for k, v in part})
        for part in _chunks(list(tags.items()), _MAX_PARAMS):
            self._server.log(run, tags={_key(k): v[:_MAX_TAG] for k, v in part})
        self._keep(params=list(meta["params"]), tags=meta["tags"])

    def _send_steps(self, run: str) -> None:
        done: int = self._sent["steps"]
        waiting: list[Point] = []
        for line in read_steps(self._folder / STEPS, done):
            points = _points(line["metrics"], line["time"], line["step"])
            if waiting and len(waiting) + len(points) > _MAX_METRICS:
                self._send_points(run, waiting)
                self._keep(steps=done)
                waiting = []
            waiting += points
            done += 1
        self._send_points(run, waiting)
        self._keep(steps=done)

    def _send_metrics(self, run: str) -> None:
        metrics = read_json(self._folder / METRICS)
        if metrics is None:
            return
        changed = {k: v for k, v in metrics.items() if self._sent.get("metrics", {}).get(k) != v}
        self._send_points(run, _points(changed, _mtime_ms(self._folder / METRICS), 0))
        self._keep(metrics=metrics)

    def _send_points(self, run: str, points: list[Point], model_id: str | None = None) -> None:
        for part in _chunks(points, _MAX_METRICS):
            self._server.log(run, metrics=part, model_id=model_id)

    def _send_artifacts(self, run: str) -> None:
        root = self._folder / ARTIFACTS
        sent = self._sent.setdefault("artifacts", {})
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            name = path.relative_to(root).as_posix()
            version = [path.stat().st_size, path.stat().st_mtime_ns]
            if sent.get(name) == version:
                continue
            below = path.parent.relative_to(root).as_posix()
            with self._server.refusals():
                self._server.client.log_artifact(run, str(path), None if below == "." else below)
            sent[name] = version
            self._save()

    def _send_model(self, run: str) -> None:
        """Send the model as MLflow's own log_model does, without its active run and global address."""
        wanted = read_json(self._folder / MODEL)
        state = self._sent.get("model", {})
        if wanted is None or state.get("ready") == wanted:
            return
        fit = self._folder.parents[1] / wanted["folder"]
        if not fit.is_dir():
            logger.warning("%s is gone, so run %s has no model", fit, self._folder.name)
            return
        from mlflow.entities import LoggedModelOutput

        from kngd_ray.tracking._pyfunc import save_pyfunc

        client = self._server.client
        with self._server.refusals():
            if state.get("begun") != wanted:  # else an upload that was cut short goes on
                model_id = client.create_logged_model(self._server.experiment_id, "model", source_run_id=run).model_id
                state = {"begun": wanted, "id": model_id}
                self._keep(model=state)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model"
                save_pyfunc(fit, path, wanted["class_names"], run_id=run, model_id=state["id"])
                client.log_model_artifacts(state["id"], str(path))
            client.finalize_logged_model(state["id"], "READY")
            client.log_outputs(run, [LoggedModelOutput(state["id"], step=0)])
        metrics = read_json(self._folder / METRICS) or {}
        self._send_points(run, _points(metrics, _mtime_ms(self._folder / METRICS), 0), state["id"])
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


def _by_parents(run_folder: Path) -> list[tuple[Path, str | None]]:
    """Folders of all records with their parents' ids, parents before children."""
    folders = {path.parent.name: path.parent for path in sorted((run_folder / RECORDS).glob(f"*/{META}"))}
    parents = {id: (read_json(folder / META) or {}).get("parent") for id, folder in folders.items()}
    ordered: dict[str, None] = {}

    def visit(id: str) -> None:
        parent = parents[id]
        if parent in folders and parent not in ordered and parent != id:
            visit(parent)
        ordered.setdefault(id)

    for id in folders:
        visit(id)
    return [(folders[id], parents[id]) for id in ordered]


@contextmanager
def _only_publisher(run_folder: Path) -> Iterator[None]:
    """Let one thread or process at a time publish a run folder.

    Raises:
        TrackingError: another one takes very long.
    """
    with storage_errors(run_folder / _LOCK):
        file = (run_folder / _LOCK).open("w")
    with file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrackingError(
                        f"{run_folder} is being published by another process: try again later."
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield


def _points(metrics: Mapping[str, float | str], time_ms: int, step: int) -> list[Point]:
    """Finite values as MLflow takes them."""
    return [
        (_key(name), float(value), time_ms, step)
        for name, value in metrics.items()
        if not isinstance(value, str) and math.isfinite(value)
    ]


def _key(name: str) -> str:
    """A name that MLflow accepts: other characters become underscores."""
    return _FORBIDDEN.sub("_", name)[:_MAX_KEY]


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _mtime_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000 if path.exists() else 0


def _stamp(folder: Path) -> str:
    """Changes whenever a file of a record does."""
    files = sorted(
        (str(p.relative_to(folder)), p.stat()) for p in folder.rglob("*") if p.suffix != ".tmp" and p.is_file()
    )
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
