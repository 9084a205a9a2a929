"""Find, join or start a Ray cluster, and explain errors on the way.

An instance that is started here listens on loopback only and asks for Ray's token. By default Ray does neither: on
Linux it replaces a loopback address by the machine's outward one, and everybody can read the token that it writes.
"""

import os
import re
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from kngd_ray.cluster import _ray_private
from kngd_ray.cluster.same_code import folders_to_pass

_CONNECT_SECONDS = 5.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def find_cluster(address: str | None) -> str | None:
    """The address of the cluster to join.

    Args:
        address: as given; None takes $RAY_ADDRESS, then a cluster that runs on this machine.

    Returns:
        Its address; None if one is to be started here.
    """
    asked = address or os.environ.get("RAY_ADDRESS") or "auto"
    if asked != "auto":
        return None if asked == "local" else asked
    found = _running_here()
    return found or (address or os.environ.get("RAY_ADDRESS")) or None


def start(dashboard: bool, temp_dir: Path | None) -> None:
    """Start an instance on this machine.

    Args:
        dashboard: start its dashboard, on loopback.
        temp_dir: where it keeps logs and sockets; None is Ray's default.
    """
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


def join(address: str) -> None:
    """Join a cluster.

    Args:
        address: of its head, or of its client server, ``ray://``.
    """
    _check_port(address)
    here = _host(address) in _LOOPBACK
    plain = ":" in address and "://" not in address
    ours = here or _host(address) in {_ray_private.own_address(), ""}
    if ours and "RAY_AUTH_MODE" not in os.environ and not (plain and _accepts(address)):
        # Ray sends its token only where it is told to or found the cluster itself, lest a stranger gets it: so may we.
        # But not to a cluster that asks for none: we would then ask its workers for one, and hear from none of them.
        _ray_private.use_token_if_there()
    if plain:
        # says within a second that a token is wrong, for which ray.init takes 20; without a token it ends the process
        _ray_private.require_token()
        _ray_private.ask_head(address, _CONNECT_SECONDS)
    own = {} if "://" in address else {"job_config": _ray_private.job_config(folders_to_pass())}
    with _ray_private.loopback() if here else nullcontext():
        ray.init(address, **own, **_QUIET)


def explain(error: Exception, joined: str | None, address: str | None) -> str:
    """Explain why a cluster could not be joined or started.

    Args:
        error: that Ray raised.
        joined: what :func:`find_cluster` returned.
        address: what it was given.

    Returns:
        One sentence that says what to do.
    """
    text = str(error)
    if joined is None:
        return (
            f"cannot start Ray on this machine ({_first_line(text)}): run kngd-ray doctor, or set "
            "trainer.num_workers=0 to run without Ray."
        )
    versions = re.findall(r"^\s*(?:Ray|Python): (\S+)", text, re.MULTILINE)
    if "ersion mismatch" in text and len(versions) == 4:
        return (
            f"the Ray cluster at {joined} runs Ray {versions[0]} on Python {versions[1]}, and this process Ray "
            f"{versions[2]} on Python {versions[3]}: install the cluster's versions here, or send the command there "
            "with kngd-ray submit."
        )
    if isinstance(error, AuthenticationError) or "nauthenticated" in text or "UNAUTHENTICATED" in text:
        return (
            f"the Ray cluster at {joined} refuses access: set RAY_AUTH_MODE=token and put the token of its head into "
            "~/.ray/auth_token, or name the file that holds it in RAY_AUTH_TOKEN_PATH."
        )
    return (
        f"cannot reach the Ray cluster at {joined} ({_first_line(text)}): check {_source(address)} and the cluster, or "
        "set trainer.num_workers=0 to run without Ray."
    )


def _running_here() -> str | None:
    """The cluster that `ray start` runs on this machine, by the file in which it leaves its address.

    The file counts only if it belongs to this user or to root, since everybody can write to its folder. It outlives a
    cluster that was killed, and Ray would try to reach that for a minute.
    """
    file = _ray_private.address_file()
    try:
        if file.stat().st_uid not in (os.getuid(), 0):
            return None
        found = file.read_text().strip()
        _check_port(found)
    except (OSError, UnicodeDecodeError):
        return None
    return found


def _source(address: str | None) -> str:
    """What named the cluster."""
    if address and address != "auto":
        return "trainer.address"
    if os.environ.get("RAY_ADDRESS", "auto") not in ("", "auto"):
        return "$RAY_ADDRESS, which names it,"
    return f"{_ray_private.address_file()}, which names it,"


def _accepts(address: str) -> bool:
    """Whether a head answers with the token that this process sends now, or none."""
    try:
        _ray_private.ask_head(address, _CONNECT_SECONDS)
    except (RuntimeError, RayError):
        return False
    return True


def _host(address: str) -> str:
    return address.removeprefix("ray://").rpartition(":")[0].strip("[]")


def _check_port(address: str) -> None:
    """Fail within seconds if nothing listens; Ray itself would retry for minutes."""
    host, port = _host(address), address.rpartition(":")[2]
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _first_line(text: str) -> str:
    return next((line.strip().rstrip(".:") for line in text.splitlines() if line.strip()), "no reason given")
