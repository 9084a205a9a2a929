"""All uses of Ray's private interfaces: they are here and nowhere else.

Another minor version of Ray may rename any of it, so `pyproject.toml` admits the minor version that was tried alone.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.job_config import JobConfig

from kngd_ray.errors import KngdError

try:
    from ray._common.utils import get_ray_address_file
    from ray._private import ray_constants
    from ray._private.authentication.authentication_token_setup import (
        ensure_token_if_auth_enabled,
        maybe_enable_token_auth_if_token_available,
    )
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE
    from ray._private.services import get_node_ip_address
    from ray._private.state import state
    from ray._private.worker import get_dashboard_url
    from ray._raylet import AuthenticationTokenLoader, GcsClient  # type: ignore[attr-defined] # its stub lacks them

    _CLUSTERS_VARIABLE: str = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    _PACKAGE_LIMITS = (ray_constants.DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE)
    JobConfig()._py_driver_sys_path.extend(())
except (ImportError, AttributeError) as lacking:
    raise KngdError(
        f"Ray {ray.__version__} lacks what this version of kngd_ray uses of it ({lacking}): install ray>=2.60,<2.61."
    ) from lacking

# Loggers of Ray's own that say again what comes as an exception.
LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.authentication",
)


def address_file() -> Path:
    """Where `ray start` leaves word of its cluster on this machine."""
    return Path(get_ray_address_file(None))


def own_address() -> str:
    """The address that Ray takes for this machine's."""
    return str(get_node_ip_address())


def dashboard_url() -> str:
    """Host and port of the dashboard of the cluster that was joined; empty without one."""
    return get_dashboard_url() or ""


def most_resources() -> dict[str, float]:
    """What the cluster's autoscaler may bring up; empty without one. Ray must be up."""
    with suppress(Exception):  # a head without an autoscaler has nothing to say
        return dict(state.get_max_resources_from_cluster_config() or {})
    return {}


def package_limit() -> int:
    """Bytes above which a cluster refuses a package: the limit of the dashboard, or of its store."""
    return int(min(_PACKAGE_LIMITS))


def use_token_if_there() -> None:
    """Send the token of this machine, if it has one, as Ray does to a cluster that it found by itself."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def require_token() -> None:
    """Fail as Ray would where a token is asked for and there is none, and end nothing."""
    ensure_token_if_auth_enabled(create_token_if_missing=False)


def forget_token() -> None:
    """Have the token read again."""
    AuthenticationTokenLoader.instance().reset_cache()


def ask_head(address: str, seconds: float) -> None:
    """Ask a head something, and raise what it answers."""
    GcsClient(address=address).internal_kv_exists(b"CLUSTER_METADATA", namespace=b"cluster", timeout=seconds)


@contextmanager
def loopback() -> Iterator[None]:
    """Let Ray take 127.0.0.1 for this machine's address, as it does by default on macOS and Windows."""
    constant, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(_CLUSTERS_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[_CLUSTERS_VARIABLE] = "0"  # for the processes of the instance
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        if variable is None:
            os.environ.pop(_CLUSTERS_VARIABLE, None)
        else:
            os.environ[_CLUSTERS_VARIABLE] = variable


class _Folders(list[str]):
    """Folders to which Ray can add none: it would put the current one before all that its workers import."""

    def extend(self, folders: Iterable[str]) -> None:
        """Leave the list unchanged."""


def job_config(folders: Iterable[str]) -> Any:
    """The settings of a job whose workers import from where their Python does, and from no folder of the driver's.

    Args:
        folders: that come before all others in the workers' search path.

    Returns:
        What `ray.init` takes.
    """
    config = JobConfig()
    config._py_driver_sys_path = _Folders(folders)
    return config
