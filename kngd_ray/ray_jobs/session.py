"""One Ray instance for a command: joined where there is a cluster, started on loopback where not."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from kngd_ray.errors import KngdError

# Read by Ray when it starts; what the user has set stays. Token authentication stays at Ray's default, on.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # workers' prints would come twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a fit of seconds should not wait 2 s for its end
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of a rank that waits for one that raised; 30 by default
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the core's errors reach us as exceptions; its log says them again
}

_KNOCK_SECONDS = 5.0


@contextmanager
def ray_session(
    address: str | None, *, cpus: float = 0.0, gpus: float = 0.0, dashboard: bool = False
) -> Iterator[None]:
    """Make Ray available; an instance that was already up is used and left up.

    Args:
        address: cluster to join; None joins $RAY_ADDRESS or starts an instance on this machine.
        cpus: CPU cores that the work needs at once.
        gpus: GPUs that the work needs at once.
        dashboard: start it, on loopback, with an instance of our own.

    Yields:
        Nothing.

    Raises:
        KngdError: the cluster cannot be reached or is too small.
    """
    owned = not ray.is_initialized()
    if owned:
        for key, value in _ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        for library in ("ray.data", "ray.train"):
            logging.getLogger(library).setLevel(logging.ERROR)
        joins = address or os.environ.get("RAY_ADDRESS")
        try:
            if joins:
                _knock(joins)
            here = {"include_dashboard": dashboard, "dashboard_host": "127.0.0.1", "_node_ip_address": "127.0.0.1"}
            where_ray = {"address": joins} if joins else here
            with _silent_stderr():
                ray.init(**where_ray, log_to_driver=False, logging_level="ERROR")
        except (OSError, RuntimeError, ValueError) as error:
            where = f"the Ray cluster at {joins}" if joins else "a Ray instance on this machine"
            raise KngdError(
                f"cannot reach {where} ({str(error).splitlines()[0]}): check trainer.address and the cluster, or set "
                "trainer.num_workers=0 to run without Ray."
            ) from error
    try:
        _check_size(cpus, gpus)
        yield
    finally:
        if owned:
            ray.shutdown()


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


def _knock(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself would go on trying for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _check_size(cpus: float, gpus: float) -> None:
    resources = ray.cluster_resources()
    for name, needed in (("CPU", cpus), ("GPU", gpus)):
        there = resources.get(name, 0.0)
        if needed > there:
            raise KngdError(
                f"the run needs {needed:g} {name}s at once and Ray has {there:g}: lower trainer.num_workers "
                "(0 runs without Ray), or join a larger cluster with trainer.address."
            )
