"""MLflow runs: what a run has to say goes to its folder first, and from there to MLflow.

record = Record.open(run_folder, "seed-0", name="kalman seed 0", params=flat, tags={})
with Publisher(run_folder, "sqlite:///mlflow.db", "kngd_ray"):
    record.log_step(1, {"train/nll": 0.7})
    record.log_metrics({"id/accuracy": 0.9})
    record.finish()
publish(run_folder, "https://tracking.example.org", "kngd_ray")   # or later, or elsewhere

A server that is down loses nothing. This is the only package that imports MLflow, and only when
something is published.
"""

from kngd_ray.errors import redact
from kngd_ray.tracking._check import check_store
from kngd_ray.tracking._figures import ensemble_curve, learning_curve, reliability_diagram, stream_curve
from kngd_ray.tracking._plots import accuracy_plot, trial_plot
from kngd_ray.tracking._publish import publish
from kngd_ray.tracking._publisher import Publisher
from kngd_ray.tracking._pyfunc import save_pyfunc
from kngd_ray.tracking._record import Record, Status, artifacts_of, read_metrics
from kngd_ray.tracking._runs import LoggedRun, read_runs
from kngd_ray.tracking._server import without_reading
from kngd_ray.tracking._system import SystemMonitor
from kngd_ray.tracking._uri import resolve_uri

__all__ = [
    "LoggedRun",
    "Publisher",
    "Record",
    "Status",
    "SystemMonitor",
    "accuracy_plot",
    "artifacts_of",
    "check_store",
    "ensemble_curve",
    "learning_curve",
    "publish",
    "read_metrics",
    "read_runs",
    "redact",
    "reliability_diagram",
    "resolve_uri",
    "save_pyfunc",
    "stream_curve",
    "trial_plot",
    "without_reading",
]
