"""One tracking store: connected within seconds or not at all, and spoken to without MLflow's global state."""

import getpass
import json
import logging
import socket
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from kngd_ray.errors import KngdError, TrackingError, printable, redact
from kngd_ray.tracking._quiet import FIRST_CONTACT, environment
from kngd_ray.tracking._reason import reason
from kngd_ray.tracking._uri import is_database, resolve_uri, sqlite_file, without_stray_folder

_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5.0
_EVIDENCE = "calibration/held_out_nll"
_TASK = ("data.", "model.", "protocol", "seeds")  # settings that decide what held-out shots are
_NOT_TASK = ("data.cache_dir", "data.on_bad_image")
_CONTEXT = "mlflow.data.context"
_LEARNED = "training"  # what of a run's inputs it learns from
# settings that say where data is and how it is read: runs whose data has one digest may differ in them
_READING = ("data.path", "data.columns.", "data.layout", "data.val", "data.test_fraction", "data.classes")

logger = logging.getLogger(__name__)


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
        with self.refusals(), environment(FIRST_CONTACT):
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

    def register(self, name: str, model_id: str, run_id: str) -> None:
        """Make a logged model the newest version of a registered one, and its champion if it is known to be better.

        Args:
            name: of the registered model, created if need be.
            model_id: of the logged model.
            run_id: of the run that it is of.

        Raises:
            TrackingError: the store does not answer or refuses.
        """  # noqa: DOC501
        from mlflow.exceptions import MlflowException

        with self.refusals():
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # an attempt that was cut short may have made the version already
            made = [v for v in self.client.search_model_versions(f"name = '{name}'") if v.model_id == model_id]
            if made:
                version = made[0]
            else:  # by its place: MLflow looks for models:/ID in the store of its global tracking URI, not in this one
                place = self.client.get_logged_model(model_id).artifact_location
                version = self.client.create_model_version(name, place, run_id, model_id=model_id)
            self._crown(name, version)

    def _crown(self, name: str, version: Any) -> None:
        """Give a version the alias ``champion``, unless the one that has it may be better."""  # noqa: DOC501
        from mlflow.exceptions import MlflowException

        try:
            champion = self.client.get_model_version_by_alias(name, "champion")
            reigning = self.client.get_run(champion.run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            # nobody has it, or its run is gone
            self.client.set_registered_model_alias(name, "champion", version.version)
            return
        if champion.version == version.version:
            return
        why = _no_better(self.client.get_run(version.run_id), reigning)
        if why is None:
            self.client.set_registered_model_alias(name, "champion", version.version)
            return
        logger.warning(
            "version %s of the model %s is registered, and version %s stays its champion: %s",
            version.version,
            name,
            champion.version,
            why,
        )

    def stage(self, run_id: str) -> str | None:
        """Where a run is in its life: ``active``, ``deleted``, or None if the store has never heard of it."""  # noqa: DOC501
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

    def log_input(self, run_id: str, data: Mapping[str, Any]) -> None:
        """Say what a run learns from; saying it again changes nothing.

        Args:
            run_id: the run.
            data: ``name``, ``digest``, ``source`` and ``profile`` of a data set.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        found = Dataset(
            name=printable(data["name"]),
            digest=data["digest"],
            source_type="local",
            source=json.dumps({"uri": data["source"]}),
            profile=json.dumps(data["profile"]),
        )
        with self.refusals():
            self.client.log_inputs(run_id, [DatasetInput(found, [InputTag(_CONTEXT, _LEARNED)])])

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn whatever goes wrong with the store into one sentence.

        Raises:
            TrackingError: the store does not answer or refuses.
        """  # noqa: DOC501
        try:
            with without_stray_folder(self.uri):
                yield
        except KngdError:
            raise
        except Exception as error:  # clients of object stores and databases raise types of their own
            raise TrackingError(f"the tracking store {self.shown} {reason(error)}") from error

    def _probe(self) -> None:
        """Ask a database once, since MLflow asks for 100 s before it gives up.

        Raises:
            sqlite3.Error: a file that is locked or no database.
        """
        path = sqlite_file(self.uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=_PROBE_SECONDS)
            try:
                connection.execute("BEGIN IMMEDIATE")  # fails where another process holds the file
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
        """  # noqa: DOC501
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


def digest_of(run: Any) -> str | None:
    """The digest of the data set that a run learns from.

    Args:
        run: as MLflow returns it.

    Returns:
        The digest; of several data sets, all of theirs. None of a run that logged none, as those of earlier versions.
    """
    logged = run.inputs.dataset_inputs if run.inputs is not None else []
    learned = {each.dataset.digest for each in logged if _LEARNED in {t.value for t in each.tags if t.key == _CONTEXT}}
    return " ".join(sorted(learned)) or None


def without_reading(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings without those that say where data is and how it is read, which its digest stands for.

    Args:
        settings: by dotted key.

    Returns:
        The others.
    """
    return {key: value for key, value in settings.items() if not key.startswith(_READING)}


def _no_better(new: Any, reigning: Any) -> str | None:
    """Why a run is not known to be better than the champion's; None if it is.

    Only what was held out of the training shots counts, and only on the same task: a search of two trials, or fewer
    shots, dethrone nobody. Nor does a run on other data, wherever it is. Of runs that held nothing out the newer one
    is taken for better.

    Args:
        new: its run, as MLflow returns it.
        reigning: the champion's.

    Returns:
        The end of a sentence.
    """
    tasks = [
        {key: value for key, value in run.data.params.items() if key.startswith(_TASK) and key not in _NOT_TASK}
        for run in (new, reigning)
    ]
    digests = [digest_of(run) for run in (new, reigning)]
    if None not in digests and digests[0] == digests[1]:
        tasks = [without_reading(task) for task in tasks]
    if tasks[0] != tasks[1]:
        keys = sorted(key for key in tasks[0].keys() | tasks[1].keys() if tasks[0].get(key) != tasks[1].get(key))
        return f"it was trained on another task ({', '.join(keys[:3])}); move the alias in MLflow if you want it"
    if None not in digests and digests[0] != digests[1]:
        return "it was trained on other data, as its digest in MLflow says; move the alias there if you want it"
    scores = [run.data.metrics.get(_EVIDENCE) for run in (new, reigning)]
    if scores[0] is None and scores[1] is not None:
        return "nothing was held out to judge the new one by (posterior.folds)"
    if scores[0] is not None and scores[1] is not None and scores[0] >= scores[1]:
        return f"its NLL of held-out shots is {scores[1]:.4f}, and that of the new one {scores[0]:.4f}"
    return None
