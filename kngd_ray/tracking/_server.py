"""One tracking store: connected within seconds or not at all, quiet, and nothing global touched."""

import getpass
import logging
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from kngd_ray.errors import KngdError, TrackingError
from kngd_ray.tracking._uri import is_database, redact, resolve_uri, sqlite_file

_ENVIRONMENT = {  # MLflow's own switches while publishing; what the user has set stays
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a uv.lock that happens to lie here says nothing about the model
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}
_FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5.0
_LOGGERS = ("mlflow", "alembic")
_lock = threading.RLock()  # the environment and log levels are the whole process's


@contextmanager
def quiet() -> Iterator[None]:
    """MLflow with short timeouts and without telemetry, banners and progress bars; all is put back afterwards."""
    with _lock, _environment(_ENVIRONMENT):
        import mlflow  # noqa: F401 - its import sets the log levels

        before = {name: logging.getLogger(name).level for name in _LOGGERS}
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


class Server:
    """A connected store and one experiment in it; use within :func:`quiet`.

    Args:
        uri: the store.
        experiment: name of the experiment, created if need be.

    Raises:
        TrackingError: the store does not answer or refuses.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        from mlflow import MlflowClient

        self.uri = resolve_uri(uri)
        self.shown = redact(self.uri)
        with self.refusals(), _environment(_FIRST_CONTACT):
            if is_database(self.uri):
                self._probe()
            self.client = MlflowClient(tracking_uri=self.uri)
            found = self._experiment(experiment)
        self.experiment_id: str = found.experiment_id
        self.experiment_created: int = found.creation_time or 0

    def create_run(self, uid: str, name: str, tags: Mapping[str, str], start: int, parent: str | None) -> str:
        """Create a run, or find the one that an attempt cut short has created.

        Args:
            uid: identity of the record, kept as a tag.
            name: of the run.
            tags: name to value.
            start: ms since 1970.
            parent: id of the parent run.

        Returns:
            The id of the run.

        Raises:
            TrackingError: the store does not answer or refuses.
        """
        with self.refusals():
            found = self.client.search_runs([self.experiment_id], f"tags.`kngd_ray.record` = '{uid}'", max_results=1)
            if found:
                run_id: str = found[0].info.run_id
                return run_id
            marks = {"kngd_ray.record": uid, "mlflow.source.name": "kngd-ray", "mlflow.source.type": "LOCAL"}
            with suppress(KeyError, OSError):  # no name for this user id, as in a container
                marks["mlflow.user"] = getpass.getuser()
            if parent is not None:
                marks["mlflow.parentRunId"] = parent
            run = self.client.create_run(self.experiment_id, start_time=start, tags={**tags, **marks}, run_name=name)
            created: str = run.info.run_id
            return created

    def stage(self, run_id: str) -> str | None:
        """Where a run is in its life: ``active``, ``deleted``, or None if the store has never heard of it."""
        from mlflow.exceptions import MlflowException

        with self.refusals():
            try:
                stage: str = self.client.get_run(run_id).info.lifecycle_stage
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
            return stage

    def log(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        model_id: str | None = None,
    ) -> None:
        """Send one batch, within MLflow's limits of 1000 metrics, 100 params and 100 tags.

        Args:
            run_id: the run.
            metrics: (name, value, ms since 1970, step).
            params: name to value.
            tags: name to value.
            model_id: the logged model that the metrics are of, besides the run.
        """
        from mlflow.entities import Metric, Param, RunTag

        with self.refusals():
            self.client.log_batch(
                run_id,
                metrics=[Metric(*m, model_id=model_id) for m in metrics],
                params=[Param(*p) for p in (params or {}).items()],
                tags=[RunTag(*t) for t in (tags or {}).items()],
                synchronous=True,
            )

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn whatever goes wrong with the store into one sentence.

        Raises:
            TrackingError: the store does not answer or refuses.
        """
        try:
            yield
        except KngdError:
            raise
        except Exception as error:  # clients of object stores and databases raise types of their own
            raise TrackingError(f"the tracking store {self.shown} {_reason(error)}") from error

    def _probe(self) -> None:
        """Ask a database once, since MLflow asks for 100 s before it gives up.

        Raises:
            sqlite3.Error: a file that cannot be read or written.
        """
        path = sqlite_file(self.uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=_PROBE_SECONDS)
            try:
                connection.execute("BEGIN IMMEDIATE")  # finds a locked and a read-only file alike
                connection.rollback()
            finally:
                connection.close()
            return
        parts = urlsplit(self.uri)
        if parts.hostname:
            port = parts.port or _PORTS[parts.scheme.split("+")[0]]
            socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()

    def _experiment(self, name: str) -> Any:
        """Find or create the experiment.

        Raises:
            TrackingError: it was deleted.
        """
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                self.client.create_experiment(name, artifact_location=self._artifacts(name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                    raise
            found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"experiment {name!r} was deleted in {self.shown}: restore it there, or give tracking.experiment "
                "another name."
            )
        return found

    def _artifacts(self, experiment: str) -> str | None:
        """Beside a database file; MLflow's default is the folder that this process happens to run in."""
        path = sqlite_file(self.uri)
        return None if path is None else (Path(path.parent) / "mlruns" / quote(experiment, safe=" ")).as_uri()


def _reason(error: Exception) -> str:
    """What happened and what to do, as the end of a sentence."""
    text = redact(str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    status = getattr(error, "get_http_status_code", lambda: None)()
    later = "the results are in the run folder, send them with kngd-ray sync"
    if status in {401, 403} or "error code 401" in text or "error code 403" in text:
        return (
            "refuses access: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; "
            f"{later}."
        )
    if "database is locked" in text:
        return f"is locked by another process: end it or wait; {later}."
    if "readonly database" in text or "unable to open database" in text or isinstance(error, PermissionError):
        return f"cannot be written ({first}): check the file and its permissions; {later}."
    if "out-of-date database schema" in text:
        return "was made by another version of MLflow: back it up, then run `mlflow db upgrade` with its address."
    if isinstance(error, ImportError):
        return f"needs a package that is not installed ({first}): install it; {later}."
    unreachable = (
        "Max retries",
        "timed out",
        "Connection refused",
        "Connection aborted",
        "timeout exception",
    )
    if isinstance(error, OSError) or any(mark in text for mark in unreachable):
        return f"does not answer ({_root(error)}): check tracking.uri and that the server runs; {later}."
    return f"refuses ({first[:300]}): check tracking.uri; {later}."


def _root(error: BaseException) -> str:
    """The cause at the bottom of a chain, without the layers of HTTP clients around it."""
    text = redact(str(error))
    for mark in (
        "Connection refused",
        "Name or service not known",
        "Network is unreachable",
        "No route to host",
    ):
        if mark in text:
            return mark.lower()
    return "timed out" if "time" in text.lower() else text.splitlines()[0][-120:] if text else type(error).__name__


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that the user has not set himself, and put all back."""
    mine = {name: os.environ.get(name) for name in values}
    mine = {name: before for name, before in mine.items() if before in {None, _ENVIRONMENT[name]}}
    os.environ.update({name: values[name] for name in mine})
    try:
        yield
    finally:
        for name, before in mine.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
