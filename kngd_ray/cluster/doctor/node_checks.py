"""What ``kngd-ray doctor`` asks of a node; the functions run there, so they import nothing heavy.

What they write they take away again: files of a name that is the doctor's own, and folders that were not there.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

PACKAGES = ("kngd_ray", "ray", "torch", "torchvision", "open_clip_torch", "mlflow", "pyarrow")

_GPU_SECONDS = 90
_ASK_CUDA = """
import json, torch
names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
for n in range(len(names)):
    torch.cuda.get_device_properties(n), torch.empty(1, device=f"cuda:{n}")
print(json.dumps(names))
"""


@dataclass(frozen=True)
class NodeAnswer:
    """What one node answered.

    Attributes:
        node: its address, with a number if several nodes share one; ``here`` for this process.
        answer: what the question returned there; None if it failed.
        error: why it failed, in one line; None if it did not.
        resources: what the node offers Ray, such as CPU and GPU.
    """

    node: str
    answer: Any = None
    error: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)


def describe(folders: Mapping[str, str], gpus: bool) -> dict[str, Any]:
    """Versions, token file, disks and GPUs of a node.

    Args:
        folders: those whose disks matter, by their name in the report.
        gpus: ask torch whether it can use the GPUs, which takes seconds.

    Returns:
        Plain data.
    """
    disks = {name: free_bytes(Path(folder)) for name, folder in folders.items()}
    return {
        "versions": versions(),
        "token": token_file(),
        "free": disks,
        "shm": free_bytes(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,  # noqa: S108 - shared memory
        "gpus": usable_gpus() if gpus else [],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that nodes must share; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def token_file() -> dict[str, Any]:
    """Ray's token on this machine: its place, and any fault.

    Returns:
        ``mode`` (``token``, ``disabled``, empty where it is not set), ``place`` and ``fault``, empty where all is well.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if os.environ.get("RAY_AUTH_TOKEN"):
        return {"mode": mode, "place": "$RAY_AUTH_TOKEN", "fault": ""}
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        path = Path(named) if named else Path.home() / ".ray" / "auth_token"
        status = path.stat()
        if not path.read_text().strip():
            fault = f"{path} is empty: write the token of the cluster's head into it"
        elif status.st_uid not in (os.getuid(), 0):
            fault = f"{path} belongs to another user (id {status.st_uid}): make a token of your own"
        elif status.st_mode & 0o077:
            fault = f"{path} can be read by others (mode {status.st_mode & 0o777:03o}): run chmod 600 {path}"
        else:
            fault = ""
    except FileNotFoundError:
        fault = f"there is no {path}: run `ray get-auth-token --generate`, then chmod 600 {path}"
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        path, fault = Path(named or "~/.ray/auth_token"), f"the token cannot be read ({error}): check its file"
    return {"mode": mode, "place": str(path), "fault": fault}


def free_bytes(folder: Path) -> int | None:
    """Bytes free on the disk of a folder, which need not exist yet; None if unknown."""
    for place in (folder, *folder.parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def usable_gpus() -> list[str] | str:
    """Names of the GPUs that torch can use here, or why it cannot.

    Another process is asked: Ray hides GPUs from work that reserved none, and a context would keep memory on them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        asked = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, "-P", "-c", _ASK_CUDA],  # of a torch.py in the current folder we ask nothing
            capture_output=True,
            text=True,
            timeout=_GPU_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"torch gave no answer within {_GPU_SECONDS} s"
    if asked.returncode:
        return (asked.stderr.strip().splitlines() or ["torch fails without a word"])[-1]
    names: list[str] = json.loads(asked.stdout.splitlines()[-1])
    return names


def unreadable(paths: Sequence[str]) -> dict[str, str]:
    """Try to read files and folders.

    Args:
        paths: of the files and folders.

    Returns:
        Why each that cannot be read cannot.
    """
    reasons = {}
    for name in paths:
        path = Path(name).expanduser()
        try:
            if path.is_dir():
                next(os.scandir(path), None)
            else:
                with path.open("rb") as file:
                    file.read(1)
        except OSError as error:
            reasons[name] = error.strerror or type(error).__name__
    return reasons


def write(folder: str, name: str, text: str) -> dict[str, Any]:
    """Write a file, read it back, and leave it for the other nodes to see.

    Args:
        folder: made if need be.
        name: of the file, to which each node adds something of its own.
        text: its content.

    Returns:
        ``name`` of the file and the folders that were ``made``.

    Raises:
        OSError: the folder cannot be made or written.
    """
    place = Path(folder)
    missing = [str(p) for p in (place, *place.parents) if not p.exists()]
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"{name}-{uuid4().hex[:8]}"
    try:
        with file.open("x") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        if file.read_text() != text:
            raise OSError(f"{file} does not hold what was written to it")
    except OSError:
        remove(folder, [file.name], missing)
        raise
    return {"name": file.name, "made": missing}


def unseen(folder: str, names: Sequence[str], text: str, seconds: float) -> list[str]:
    """Which of other nodes' files do not come into sight.

    Args:
        folder: the shared folder.
        names: files in it.
        text: the content of each.
        seconds: how long to look: network file systems remember for a while what was not there.

    Returns:
        Names of the files that are not there or hold something else.
    """
    until = time.monotonic() + seconds
    left = list(names)
    while left:
        with suppress(OSError):
            os.listdir(folder)  # makes NFS look again
        left = [name for name in left if not _holds(Path(folder) / name, text)]
        if not left or time.monotonic() > until:
            break
        time.sleep(0.25)
    return left


def remove(folder: str, names: Sequence[str], made: Sequence[str]) -> None:
    """Take away what :func:`write` has left; folders only while they are empty.

    Args:
        folder: where the files are.
        names: the files.
        made: folders that were not there, the deepest first.
    """
    for name in names:
        with suppress(OSError):
            (Path(folder) / name).unlink()
    for place in made:
        with suppress(OSError):
            Path(place).rmdir()


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_text() == text
    except (OSError, UnicodeDecodeError):
        return False
