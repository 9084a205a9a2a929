"""A Ray head that outlives the commands that join it, with token authentication, as a cluster has one."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_SECONDS = 180.0


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: that commands join.
        environment: that they need for it.
        mark: in the environment of all its processes.
    """

    address: str
    environment: dict[str, str]
    mark: str

    def processes(self) -> list[psutil.Process]:
        """All that it has started, whoever their parent is now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("KNGD_TEST_HEAD") == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Its processes that run a Ray Train worker."""
        found = []
        for process in self.processes():
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to everything, as when the machine is switched off."""
        for _ in range(5):  # what was being started while we looked
            processes = self.processes()
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=10)
            if not processes:
                return


def free_port() -> int:
    """A port that nobody had a moment ago; Ray's own default for its clients is one for all instances of a machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@contextmanager
def ray_head(
    token: Path, *, cpus: int = 2, mode: str = "token", changed: Mapping[str, str] | None = None
) -> Iterator[Head]:
    """Start a head on free ports of this machine.

    Args:
        token: file of the token; made if there is none.
        cpus: cores that it offers.
        mode: `RAY_AUTH_MODE` of its processes.
        changed: variables of its processes alone.

    Yields:
        The head; it is killed at the end.
    """
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    # a short path: it is part of the names of sockets
    with tempfile.TemporaryDirectory(prefix="kr", ignore_cleanup_errors=True) as name:
        own = {
            "RAY_AUTH_MODE": mode,
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
        }
        inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "KNGD_TEST_HEAD")}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--num-cpus={cpus}"]
        # ports of workers from a range (10002 on) would be those of another instance on this machine, too
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={free_port()}"]
        command += ["--port=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={name}/r"]
        environment = {**inherited, **own}
        log = Path(name) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                env={**environment, **(changed or {}), "KNGD_TEST_HEAD": name},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        head = Head("", environment, name)
        try:
            current = Path(name) / "r" / "ray_current_cluster"
            deadline = time.monotonic() + _START_SECONDS
            while "Ray runtime started" not in log.read_text() or not current.is_file():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield Head(current.read_text().strip(), environment, name)
        finally:
            head.kill()
            process.wait(timeout=60)
