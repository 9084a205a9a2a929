"""One Ray instance for a command: joined where there is a cluster, started where not, with nobody else let in.

An instance of our own listens on loopback only and asks for Ray's token. Ray of itself would do neither wholly: on
Linux it turns a loopback address that it is given into the machine's outward one, and it writes the token that it
makes for everybody to read.
"""

import logging
import os
import re
import resource
import secrets
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from kngd_ray.cluster import _ray_private
from kngd_ray.cluster.same_code import folders_to_pass, refuse_other_code
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

_KNOCK_SECONDS = 5.0
_TOKEN = "RAY_AUTH_TOKEN"  # noqa: S105 - the name of a variable
_FILES, _LEAST_FILES = 4096, 256  # that a process may open; a raylet has dozens of connections, more with each worker
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
        leave_token: where this user has no token yet, write the one that an instance of our own asks for, for those to
            come; else it is this instance's alone.

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
        joins = _to_join(address)
        token = os.environ.get(_TOKEN)
        try:
            with _silent_stderr():
                if joins is None:
                    _ensure_token(leave=leave_token)
                    _start(dashboard, temp_dir)
                else:
                    _join(joins)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            with suppress(Exception):  # what has come up of it
                ray.shutdown()
            _restore_token(token)
            raise KngdError(_refusal(joins, _named_by(address), error)) from error
    try:
        _check_size(cpus, gpus)
        if owned:
            refuse_other_code()
        yield
    finally:
        if owned:
            ray.shutdown()
            _restore_token(token)


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


def _to_join(address: str | None) -> str | None:
    """Where a cluster is to be joined; None where there is none and one is started."""
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    if asked != "auto":
        return None if asked == "local" else asked
    found = _running_here()
    return found or (address or os.environ.get("RAY_ADDRESS")) or None


def _named_by(address: str | None) -> str:
    """What has led to a cluster that was to be joined."""
    if address and address != "auto":
        return "trainer.address"
    if os.environ.get("RAY_ADDRESS", "auto") not in ("", "auto"):
        return "$RAY_ADDRESS, which names it,"
    return f"{_ray_private.address_file()}, which names it,"


def _running_here() -> str | None:
    """Address of the cluster that `ray start` left word of on this machine.

    Only word of this user or of root is taken: the folder is one that everybody may write to. A cluster that was
    killed leaves its word behind, and Ray would go on calling it for a minute.
    """
    word = _ray_private.address_file()
    try:
        if word.stat().st_uid not in (os.getuid(), 0):
            return None
        found = word.read_text().strip()
        _knock(found)
    except (OSError, UnicodeDecodeError):
        return None
    return found


def _start(dashboard: bool, temp_dir: Path | None) -> None:
    with _ray_private.loopback():
        ray.init(
            "local",
            job_config=_ray_private.job_config(folders_to_pass()),
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            _temp_dir=None if temp_dir is None else str(temp_dir),
            **_QUIET,
        )


def _join(address: str) -> None:
    _knock(address)
    here = _host(address) in _LOOPBACK
    plain = ":" in address and "://" not in address
    ours = here or _host(address) in {_ray_private.own_address(), ""}
    if ours and "RAY_AUTH_MODE" not in os.environ and not (plain and _lets_in(address)):
        # Ray sends its token only where it is told to or found the cluster itself, lest a stranger gets it: so may we.
        # But not to a cluster that asks for none: we would then ask its workers for one, and hear from none of them.
        _ray_private.use_token_if_there()
    if plain:
        # says within a second that a token is wrong, for which ray.init takes 20; without a token it ends the process
        _ray_private.require_token()
        _ray_private.ask_head(address, _KNOCK_SECONDS)
    own = {} if "://" in address else {"job_config": _ray_private.job_config(folders_to_pass())}
    with _ray_private.loopback() if here else nullcontext():
        ray.init(address, **own, **_QUIET)


def _lets_in(address: str) -> bool:
    """Whether a head answers as this process is now."""
    try:
        _ray_private.ask_head(address, _KNOCK_SECONDS)
    except (RuntimeError, RayError):
        return False
    return True


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def _ensure_token(*, leave: bool = True) -> None:
    """See that there is a token which nobody but this user can read; where the user named one, it is the user's.

    Args:
        leave: write or narrow the user's file; else one that is there is used as it is, or a token of this process.

    Raises:
        KngdError: the file that the user named is not there.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get(_TOKEN):
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named:
        if not Path(named).is_file():  # Ray would end the process
            raise KngdError(
                f"RAY_AUTH_TOKEN_PATH names {named}, which is not there: write Ray's token into it, or unset it."
            )
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        if not leave:
            if not path.exists():
                os.environ[_TOKEN] = secrets.token_hex(32)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write_token(path)
        elif path.stat().st_uid == os.getuid() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)  # Ray made it, for everybody to read
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a token for this instance alone
        os.environ[_TOKEN] = secrets.token_hex(32)
    finally:
        _ray_private.forget_token()


def _restore_token(token: str | None) -> None:
    """Take a token of this process back; another instance, or a cluster, has another one."""
    if os.environ.get(_TOKEN) != token:
        os.environ.pop(_TOKEN, None)
        _ray_private.forget_token()


def _write_token(path: Path) -> None:
    """In one move and only if there is none yet: of two processes that start at once, both get the same."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink()


def _refusal(joins: str | None, named_by: str, error: Exception) -> str:
    """What is wrong with a cluster, and what to do about it."""
    text = str(error)
    if joins is None:
        return (
            f"cannot start Ray on this machine ({_first_line(text)}): see what kngd-ray doctor finds, or set "
            "trainer.num_workers=0 to run without Ray."
        )
    versions = re.findall(r"^\s*(?:Ray|Python): (\S+)", text, re.MULTILINE)
    if "ersion mismatch" in text and len(versions) == 4:
        return (
            f"the Ray cluster at {joins} runs Ray {versions[0]} on Python {versions[1]}, and this process Ray "
            f"{versions[2]} on Python {versions[3]}: install the cluster's versions here, or send the command there "
            "with kngd-ray submit."
        )
    if isinstance(error, AuthenticationError) or "nauthenticated" in text or "UNAUTHENTICATED" in text:
        return (
            f"the Ray cluster at {joins} refuses access: set RAY_AUTH_MODE=token and put the token of its head into "
            "~/.ray/auth_token, or name the file that holds it in RAY_AUTH_TOKEN_PATH."
        )
    return (
        f"cannot reach the Ray cluster at {joins} ({_first_line(text)}): check {named_by} and the cluster, or set "
        "trainer.num_workers=0 to run without Ray."
    )


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), "no reason given")


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


def _host(address: str) -> str:
    return address.removeprefix("ray://").rpartition(":")[0].strip("[]")


def _knock(address: str) -> None:
    """Fail within seconds where nobody listens; Ray itself would go on trying for minutes."""
    host, port = _host(address), address.rpartition(":")[2]
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


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
