"""Reading runs back from MLflow, without creating anything there."""

import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kngd_ray.errors import TrackingError, closest
from kngd_ray.tracking._quiet import quiet
from kngd_ray.tracking._reason import _LATER
from kngd_ray.tracking._server import Server, digest_of
from kngd_ray.tracking._uri import sqlite_file

_PAGE = 1000  # runs of one answer
_NAMED = 8  # experiments that a message lists at most
_TABLES = {"experiments", "runs"}  # without which a database is none of MLflow's


@dataclass(frozen=True)
class LoggedRun:
    """A run as MLflow keeps it.

    Attributes:
        id: MLflow's id.
        name: of the run.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        start: ms since 1970.
        parent: id of the parent run.
        params: name to value.
        metrics: name to latest value; those that are not finite are left out.
        tags: name to value.
        data: digest of the data set that it learns from; None where it did not say.
    """

    id: str
    name: str
    status: str
    start: int = 0
    parent: str | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None


def read_runs(uri: str, experiment: str) -> list[LoggedRun]:
    """All runs of an experiment that were not deleted, the oldest first.

    Args:
        uri: the tracking store.
        experiment: name of the experiment.

    Returns:
        The runs; none of an experiment without runs. A TrackingError tells of a store that does not answer or is no
        store, and of an experiment that is not there, with the nearest name.
    """
    with quiet():
        reader = _Reader(uri, experiment)
        return list(reader.runs())


class _Reader(Server):
    """A connected store and one experiment in it, both left as they are."""

    def runs(self) -> Iterator[LoggedRun]:
        """The experiment's runs by their start, page by page."""
        token = None
        while True:
            with self.refusals():
                page = self.client.search_runs(
                    [self.experiment_id],
                    max_results=_PAGE,
                    order_by=["attributes.start_time ASC"],
                    page_token=token,
                )
            yield from map(_logged, page)
            token = page.token
            if not token:
                return

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn whatever goes wrong with the store into one sentence, which is not about results to be sent.

        Raises:
            TrackingError: the store does not answer or refuses.
        """
        try:
            with super().refusals():
                yield
        except TrackingError as error:
            raise TrackingError(str(error).replace(f"; {_LATER}", "")) from error.__cause__

    def _probe(self) -> None:
        """See that a database is there and is MLflow's of this version: MLflow would make or migrate its tables.

        Raises:
            TrackingError: it is not there, or not MLflow's.
        """
        path = sqlite_file(self.uri)
        if path is not None and not path.is_file():
            raise TrackingError(f"there is no tracking database {path}: check the folder you are in, or give --uri.")
        if path is None:
            super()._probe()
        tables = self._tables()
        if not tables >= _TABLES:
            raise TrackingError(f"the tracking store {self.shown} holds no MLflow runs: give another --uri.")
        if not tables >= _expected_tables():
            raise TrackingError(
                f"the tracking store {self.shown} was made by another version of MLflow: back it up, then run "
                "`mlflow db upgrade` with its address."
            )

    def _tables(self) -> set[str]:
        """Names of the tables of a database."""
        path = sqlite_file(self.uri)
        if path is not None:
            connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
            try:
                return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            finally:
                connection.close()
        import sqlalchemy

        engine = sqlalchemy.create_engine(self.uri)
        try:
            return set(sqlalchemy.inspect(engine).get_table_names())
        finally:
            engine.dispose()

    def _experiment(self, name: str) -> Any:
        """Find the experiment.

        Raises:
            TrackingError: it is not there or was deleted.
        """
        found = self.client.get_experiment_by_name(name)
        if found is None:
            known = sorted(experiment.name for experiment in self.client.search_experiments())
            guess = "".join(f"; did you mean {match!r}?" for match in closest(name, known))
            more = ", ..." if len(known) > _NAMED else ""
            listed = f" (experiments there: {', '.join(known[:_NAMED])}{more})" if known else ""
            raise TrackingError(f"there is no experiment {name!r} in {self.shown}{guess}{listed}.")
        if found.lifecycle_stage != "active":
            raise TrackingError(f"experiment {name!r} was deleted in {self.shown}: restore it there.")
        return found


def _expected_tables() -> set[str]:
    """Tables whose absence makes MLflow migrate a database as soon as it opens it."""
    try:
        from mlflow.store.db.base_sql_model import Base
        from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - declares the tables
    except ImportError:  # MLflow keeps them elsewhere now
        return _TABLES
    return set(Base.metadata.tables)


def _logged(run: Any) -> LoggedRun:
    return LoggedRun(
        run.info.run_id,
        run.info.run_name or run.info.run_id,
        run.info.status,
        run.info.start_time or 0,
        run.data.tags.get("mlflow.parentRunId"),
        dict(run.data.params),
        {name: value for name, value in run.data.metrics.items() if math.isfinite(value)},
        dict(run.data.tags),
        digest_of(run),
    )
