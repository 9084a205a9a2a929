"""From the run folder to MLflow: whatever has not been sent yet, and nothing twice.

``<run folder>/tracking.json`` remembers what each store has. It is saved after every batch, so
an interrupted publish goes on where it stopped; what was sent but not yet remembered is
recognised by the record's uid (runs) or dropped by MLflow as the same point (metrics).
"""

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kngd_ray.errors import TrackingError
from kngd_ray.storage import storage_errors
from kngd_ray.tracking._files import META, RECORDS, read_json, write_json
from kngd_ray.tracking._quiet import quiet
from kngd_ray.tracking._sender import Sender
from kngd_ray.tracking._server import Server
from kngd_ray.tracking._uri import resolve_uri

logger = logging.getLogger(__name__)

TRACKING = "tracking.json"
_LOCK = "tracking.lock"
_LOCK_SECONDS = 60.0


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
            sender = Sender(server, folder, memory.of(folder.name), memory.save)
            with _damage(folder):
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
        try:
            self._all = read_json(path) or {}
        except ValueError:
            logger.warning("%s is damaged: the store is asked what it has", path)
            self._all = {}
        self._all |= {"uri": server.shown, "experiment": experiment}
        stores = self._all.get("stores")
        if not isinstance(stores, dict):
            stores = self._all["stores"] = {}
        key = f"{server.shown} {experiment}"
        made = [server.experiment_id, server.experiment_created]
        known = stores.get(key)
        if not (isinstance(known, dict) and known.get("made") == made and isinstance(known.get("runs"), dict)):
            stores[key] = {"made": made, "runs": {}}  # a new store, or a database that was deleted and begun again
        self._runs: dict[str, dict[str, Any]] = stores[key]["runs"]

    def of(self, id: str) -> dict[str, Any]:
        """What the store has of a record, to be changed in place."""
        return self._runs.setdefault(id, {})

    def save(self) -> None:
        """Put it on disk."""
        write_json(self._path, self._all)


def _by_parents(run_folder: Path) -> list[tuple[Path, str | None]]:
    """Folders of all records with their parents' ids, parents before children."""
    folders = {path.parent.name: path.parent for path in sorted((run_folder / RECORDS).glob(f"*/{META}"))}
    parents: dict[str, str | None] = {}
    for id, folder in folders.items():
        with _damage(folder):
            parents[id] = (read_json(folder / META) or {}).get("parent")
    ordered: dict[str, None] = {}
    for id in folders:
        line: dict[str, None] = {}  # the record, its parent and so on, as far as none was met before
        above: str | None = id
        while isinstance(above, str) and above in folders and above not in ordered and above not in line:
            line[above] = None
            above = parents[above]
        ordered |= dict.fromkeys(reversed(line))
    return [(folders[id], parents[id]) for id in ordered]


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Name the record whose files are not as a record writes them.

    Raises:
        TrackingError: they are not.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise TrackingError(
            f"the record {folder} is damaged ({error}): restore its files, or move it away to send the others."
        ) from error


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
