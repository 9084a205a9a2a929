"""MLflow as a library: short timeouts, no telemetry, no banners, and the process left as it was."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "4", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_LOGGERS = ("mlflow", "alembic")
_lock = threading.RLock()  # the environment and log levels are the whole process's


@contextmanager
def quiet() -> Iterator[None]:
    """MLflow with short timeouts and without telemetry, banners and progress bars; all is put back afterwards."""
    with _lock, environment(_ENVIRONMENT):
        import mlflow  # noqa: F401 - its import sets the log levels

        before = {name: logging.getLogger(name).level for name in _LOGGERS}
        for name in _LOGGERS:
            # an error with its traceback too, as of a full disk: what is raised besides becomes a sentence of ours
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
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
