"""Whether a tracking store answers, asked without creating anything there."""

import os
import sqlite3

from kngd_ray.errors import TrackingError, redact
from kngd_ray.tracking._quiet import FIRST_CONTACT, environment, quiet
from kngd_ray.tracking._runs import _Reader
from kngd_ray.tracking._server import Server
from kngd_ray.tracking._uri import is_database, resolve_uri, sqlite_file


def check_store(uri: str) -> str:
    """Ask a tracking store for its experiments.

    Args:
        uri: the store.

    Returns:
        What was found, without secrets. A TrackingError tells of a store that does not answer or refuses.
    """
    with quiet():
        return _Visitor(uri).found


class _Visitor(_Reader):
    """A store that is looked at and left as it is.

    Args:
        uri: the store.
    """

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri = resolve_uri(uri)
        self.shown = redact(self.uri)
        with self.refusals(), environment(FIRST_CONTACT):
            unused = self._unused() if is_database(self.uri) else None
            if unused is not None:
                self.found = unused
                return
            self.client = MlflowClient(tracking_uri=self.uri)
            experiments = len(self.client.search_experiments())
        self.found = f"{self.shown} answers, {experiments} experiments"

    def _unused(self) -> str | None:
        """Say so of a database in which MLflow has yet to make its tables; None of one that it has.

        Raises:
            TrackingError: a file that is not there cannot be made, or the database is not MLflow's of this version.
        """
        path = sqlite_file(self.uri)
        if path is not None and not path.exists():
            folder = next(place for place in path.parents if place.exists())
            if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise TrackingError(f"the tracking store {self.shown} cannot be made: check tracking.uri and {folder}.")
            return f"{self.shown} does not exist yet, the first run creates it"
        if path is None:
            Server._probe(self)
        else:
            connection = sqlite3.connect(path, timeout=1.0)
            try:
                connection.execute("BEGIN IMMEDIATE")  # fails where it is held by another process or cannot be written
                connection.rollback()
            finally:
                connection.close()
        if not self._tables():
            return f"{self.shown} is empty, the first run creates MLflow's tables"
        self._probe()
        return None
