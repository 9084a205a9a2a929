"""One Ray session for a command: joins a cluster if there is one, else starts an instance on this machine."""

import logging
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import RayError

from kngd_ray.cluster import _ray_private
from kngd_ray.cluster.auth_token import VARIABLE, ensure_token, restore_token
from kngd_ray.cluster.connection import explain, find_cluster, join, start
from kngd_ray.cluster.same_code import refuse_other_code
from kngd_ray.errors import KngdError

# Read by Ray when it starts; what the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints would come twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a fit of seconds should not wait 2 s for its end
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of a rank that waits for one that raised; 30 by default
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the core's errors reach us as exceptions; its log says them again
}

_FILES, _LEAST_FILES = 4096, 256  # that a process may open; a raylet has dozens of connections, more with each worker


@contextmanager
def ray_session(
    address: str | None,
    *,
    cpus: float = 0.0,
    gpus: float = 0.0,
    dashboard: bool = False,
    temp_dir: Path | None = None,
    leave_token: bool = True,
) -> Iterator[None]:
    """Make Ray available; an instance that was already up is used and left up.

    Args:
        address: cluster to join; None joins $RAY_ADDRESS, or the cluster that this user runs on this machine, or
            starts an instance here, as ``local`` always does.
        cpus: CPU cores that the work needs at once.
        gpus: GPUs that the work needs at once.
        dashboard: start it, on loopback, with an instance of our own.
        temp_dir: where an instance of our own keeps its logs and sockets; a short path. None is Ray's default.
        leave_token: if this user has no token yet, keep the one of an instance of our own in the user's file, for later
            instances.

    Yields:
        Nothing.

    Raises:
        KngdError: the cluster cannot be reached, refuses, is of another version or is too small.
    """
    owned = not ray.is_initialized()
    if owned:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        for library in ("ray.data", "ray.train", *_ray_private.LOGGERS):
            logging.getLogger(library).setLevel(logging.ERROR)
        _allow_files()
        joined = find_cluster(address)
        token = os.environ.get(VARIABLE)
        try:
            with _silent_stderr():
                if joined is None:
                    ensure_token(leave=leave_token)
                    start(dashboard, temp_dir)
                else:
                    join(joined)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            with suppress(Exception):  # what has come up of it
                ray.shutdown()
            restore_token(token)
            raise KngdError(explain(error, joined, address)) from error
    try:
        _check_size(cpus, gpus)
        if owned:
            refuse_other_code()
        yield
    finally:
        if owned:
            ray.shutdown()
            restore_token(token)


def _allow_files() -> None:
    """Let this process and those that it starts open as many files as Ray needs: its sockets are files.

    Raises:
        KngdError: they may not.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _FILES:
        return
    if most == resource.RLIM_INFINITY or most >= _FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, most))
    elif most < _LEAST_FILES:
        raise KngdError(
            f"a process may open {most} files here and Ray needs {_LEAST_FILES}: raise the limit (ulimit -n "
            f"{_FILES}, or LimitNOFILE of the service), or set trainer.num_workers=0 to run without Ray."
        )
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep the core's banner, which is written past Python, off the terminal; errors come as exceptions."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _check_size(cpus: float, gpus: float) -> None:
    """See that the work fits at all.

    Raises:
        KngdError: it does not.
    """
    resources = ray.cluster_resources()
    most = _ray_private.most_resources()
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        there = max(resources.get(name, 0.0), most.get(name, 0.0))
        if needed > there:
            raise KngdError(
                f"the run needs {needed:g} {name}s at once and Ray has {there:g}: lower trainer.num_workers "
                "(0 runs without Ray), or join a larger cluster with trainer.address."
            )


def gpus_of_cluster() -> float:
    """How many GPUs Ray has, used or not, on the nodes that are up."""
    return float(ray.cluster_resources().get("GPU", 0.0))
