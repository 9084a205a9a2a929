"""Ray's token: who has it may run code on the cluster, so nobody but its owner may read it."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from kngd_ray.cluster import _ray_private
from kngd_ray.errors import KngdError

VARIABLE = "RAY_AUTH_TOKEN"


def ensure_token(*, leave: bool = True) -> None:
    """Make sure that there is a token that nobody but this user can read; one that the user named is left as it is.

    Args:
        leave: write the user's file, or restrict its permissions; otherwise an existing file is used as it is, and
            without one this process gets a token of its own.

    Raises:
        KngdError: the file that the user named is not there.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get(VARIABLE):
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
                os.environ[VARIABLE] = secrets.token_hex(32)
            return
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write(path)
        elif path.stat().st_uid == os.getuid() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            path.chmod(0o600)  # Ray made it, for everybody to read
    except (OSError, RuntimeError):  # no home, or one that cannot be written: a token for this instance alone
        os.environ[VARIABLE] = secrets.token_hex(32)
    finally:
        _ray_private.forget_token()


def restore_token(token: str | None) -> None:
    """Set the token variable back to what it was; another instance, or a cluster, has another token.

    Args:
        token: value of :data:`VARIABLE` before the instance was started; None if it was not set.
    """
    if os.environ.get(VARIABLE) != token:
        os.environ.pop(VARIABLE, None)
        _ray_private.forget_token()


def _write(path: Path) -> None:
    """Write a new token atomically, and only if there is none: two processes that start at once get the same."""
    own = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(own, path)
    finally:
        own.unlink()
