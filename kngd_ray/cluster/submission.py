"""Jobs on a Ray cluster by its dashboard: submit, follow and stop them, each failure in one sentence."""

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from kngd_ray._run_layout import SUBMITTED
from kngd_ray.cluster import _ray_private
from kngd_ray.errors import KngdError, UsageError, nearest

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_TIMEOUTS = (10, 300)  # seconds to connect, and between bytes: an upload or a busy dashboard takes its time
_RECONNECT_SECONDS = 60.0
_SILENT_SECONDS = 60.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0
_AGENT_SECONDS = 60.0
_RECENT = 5
# A job that is stopped ends as by Ctrl-C, so that its run is closed in MLflow; Ray's default is SIGTERM, then 3 s.
_ENVIRONMENT = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30", SUBMITTED: "1"}
_NOISE = re.compile(r"^(\d{4}-\d\d-\d\d [\d:,]+\s+INFO \S+\.py:\d+ -- |Running entrypoint for job )")
_EPILOGUE = "Job supervisor actor died: "  # for every job that has ended, in many lines
_NO_AGENT = "No available agent"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_HOW_TO_SHOW_IT = (
    "set RAY_AUTH_MODE=token and put the head's token into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"
)


@dataclass(frozen=True)
class JobState:
    """A job as the cluster knows it.

    Attributes:
        id: of the job.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        entrypoint: its command line.
        exit_code: of its process, 128 and the signal's number where one ended it; None while there is none.
        message: what Ray has to say.
        seconds: that it ran, up to now; None before it starts.
    """

    id: str
    status: str
    entrypoint: str
    exit_code: int | None
    message: str
    seconds: float | None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in _ENDED


def package_limit() -> int:
    """Bytes above which a cluster refuses a package."""
    return _ray_private.package_limit()


def dashboard_address(given: str | None) -> str:
    """The address of the dashboard that is asked.

    Args:
        given: on the command line; None takes $RAY_API_SERVER_ADDRESS, a web address in $RAY_ADDRESS, or this machine.

    Returns:
        Its URL.

    Raises:
        UsageError: it is another kind of address.
    """
    ray_address = os.environ.get("RAY_ADDRESS", "")
    address = (
        given
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or (ray_address if ray_address.startswith(("http://", "https://")) else DEFAULT_ADDRESS)
    )
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(address)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none
        fits = False
    if not fits:
        raise UsageError(f"{address!r} is not the address of a Ray dashboard: give http://HOST:8265.")
    return address


class Cluster:
    """A cluster's dashboard.

    Args:
        address: its URL, from :func:`dashboard_address`.

    Attributes:
        address: its URL.
        ray_version: of the cluster.

    Raises:
        KngdError: nobody listens there, it is something else, or it does not accept the token.
    """

    def __init__(self, address: str) -> None:
        for name in _ray_private.LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        self.address = address
        if urlsplit(address).hostname in _LOOPBACK:
            # a head of this user's, or a tunnel to one; elsewhere Ray sends its token only where it is told to
            _ray_private.use_token_if_there()
        with self._refusals(), _no_addresses():
            self._client = _Client(address)
            self.ray_version: str = self._client.ask("/api/version")["ray_version"]

    def check_version(self) -> None:
        """Refuse another Ray than this machine's.

        Raises:
            KngdError: the versions differ.
        """
        if self.ray_version != ray.__version__:
            raise KngdError(
                f"the cluster at {self.address} runs Ray {self.ray_version} and this machine has {ray.__version__}: "
                "install the same version here, or submit anyway with check=false."
            )

    def submit(self, job_id: str, entrypoint: str, package: Path, metadata: Mapping[str, str]) -> None:
        """Send a job.

        Args:
            job_id: what it is to be called.
            entrypoint: its command line, for a shell.
            package: archive of its working folder.
            metadata: kept with it.

        Raises:
            KngdError: the cluster does not take it.
        """  # noqa: DOC501
        asked_until = time.monotonic() + _AGENT_SECONDS
        with self._refusals():
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job_id,
                        runtime_env={"working_dir": str(package), "env_vars": _ENVIRONMENT},
                        metadata=dict(metadata),
                    )
                except RuntimeError as error:  # of a head that has just been started, or is busy
                    if _NO_AGENT not in str(error) or time.monotonic() > asked_until:
                        raise
                    time.sleep(_POLL_SECONDS)
                else:
                    return

    def job(self, job_id: str) -> JobState:
        """Look at a job.

        Args:
            job_id: of the job.

        Returns:
            Its state.
        """
        with self._refusals(job_id):
            found = self._client.get_job_info(job_id)
        code = found.driver_exit_code
        end = found.end_time or time.time() * 1000
        return JobState(
            found.submission_id or job_id,
            str(getattr(found.status, "value", found.status)),
            found.entrypoint,
            code if code is None or code >= 0 else 128 - code,
            (found.message or "").strip(),
            max(0.0, (end - found.start_time) / 1000) if found.start_time else None,
        )

    def wait(self, job_id: str, seconds: float = _STOP_SECONDS) -> JobState:
        """Wait for the end of a job.

        Args:
            job_id: of the job.
            seconds: for how long at most.

        Returns:
            Its state then.
        """
        deadline = time.monotonic() + seconds
        while not (state := self.job(job_id)).ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return state

    def stop(self, job_id: str) -> JobState:
        """Stop a job, and wait until it has.

        Args:
            job_id: of the job.

        Returns:
            Its state then.

        Raises:
            KngdError: it still runs.
        """
        with self._refusals(job_id):
            self._client.stop_job(job_id)
        state = self.wait(job_id)
        if not state.ended:
            raise KngdError(f"job {job_id} was told to stop and is still {state.status}: see status={job_id}.")
        return state

    def log(self, job_id: str) -> list[str]:
        """The lines of a job's log so far, without Ray's own."""
        with self._refusals(job_id):
            return list(_without_noise(self._client.get_job_logs(job_id).splitlines()))

    def follow(self, job_id: str) -> Iterator[str]:
        """The lines of a job's log from its beginning, as they come, without Ray's own.

        A connection that is lost is made anew; what was seen is not repeated.

        Args:
            job_id: of the job.

        Returns:
            Lines, until the job has ended; of a cluster that cannot be reached any more a KngdError, of Ctrl-C a
            KeyboardInterrupt.
        """
        self.job(job_id)  # a job that is not there is said so
        return _without_noise(self._lines(job_id))

    def _lines(self, job_id: str) -> Iterator[str]:
        seen, rest, lost_since = 0, "", None
        with asyncio.Runner() as runner:
            runner.get_loop().set_exception_handler(lambda *_: None)  # connections that were left without a farewell
            while True:
                position = 0
                try:
                    stream = self._client.tail_job_logs(job_id)
                    with suppress(TimeoutError):  # silence: the job has nothing to say, or the connection is dead
                        while (chunk := runner.run(_next(stream))) is not None:
                            fresh = chunk[max(0, seen - position) :]
                            position += len(chunk)
                            seen, lost_since = max(seen, position), None
                            *lines, rest = (rest + fresh).split("\n")
                            yield from lines
                    ended = self.wait(job_id, 2 * _POLL_SECONDS).ended  # the log's end comes a moment before the job's
                except asyncio.CancelledError:  # by Ctrl-C alone, at a moment at which asyncio takes it for another's
                    raise KeyboardInterrupt from None
                except (aiohttp.ClientError, OSError, RuntimeError, KngdError) as error:
                    lost_since = lost_since or time.monotonic()
                    if time.monotonic() - lost_since > _RECONNECT_SECONDS:
                        raise KngdError(
                            f"the connection to {self.address} is lost and the job may go on: "
                            f"kngd-ray submit logs={job_id} follows it again."
                        ) from error
                    ended = False
                    time.sleep(2 * _POLL_SECONDS)
                if ended:
                    yield from [rest] if rest else []
                    return

    @contextmanager
    def _refusals(self, job_id: str | None = None) -> Iterator[None]:
        """Turn whatever goes wrong between here and the cluster into one sentence.

        Raises:
            KngdError: it went wrong.
        """  # noqa: DOC501
        try:
            yield
        except KngdError:
            raise
        except AuthenticationError as error:
            missing = str(error).startswith("Authentication required")
            what = "requires a token, and none was sent" if missing else "does not accept this token"
            raise KngdError(f"the cluster at {self.address} {what}: {_HOW_TO_SHOW_IT}.") from error
        except (requests.JSONDecodeError, requests.HTTPError, KeyError) as error:
            raise KngdError(f"the server at {self.address} is not a Ray dashboard: give http://HOST:8265.") from error
        except (OSError, requests.RequestException) as error:  # a ConnectionError of Python's is an OSError
            raise KngdError(self._unreachable(error)) from error
        except (RuntimeError, ValueError) as error:
            if job_id is not None and "status code 404" in str(error):
                raise UsageError(self._unknown(job_id)) from error
            if "404" in str(error):
                raise KngdError(
                    f"the server at {self.address} is not a Ray dashboard: give http://HOST:8265."
                ) from error
            if _NO_AGENT in str(error):
                raise KngdError(
                    f"the cluster at {self.address} has no agent on its head to start jobs with: another Ray on that "
                    "machine may hold its port (52365), then start this one with --dashboard-agent-listen-port."
                ) from error
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise KngdError(f"the cluster at {self.address} refuses: {line}") from error

    def _unreachable(self, error: Exception) -> str:
        parts = urlsplit(self.address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((str(parts.hostname), port), timeout=_TIMEOUTS[0]).close()
        except OSError as refused:
            reason = refused.strerror or str(refused) or type(refused).__name__
            return (
                f"nothing responds at {self.address} ({reason}): start the cluster or the tunnel to it "
                "(`ray dashboard cluster.yaml`), or give the dashboard's address, address=http://HOST:8265."
            )
        if isinstance(error, requests.exceptions.SSLError):
            return f"{self.address} does not speak TLS properly ({error}): check its certificate, or give http://."
        return (
            f"what listens at {self.address} is not a web server: give the dashboard's address, port 8265 by default, "
            "not Ray's own port (6379) or that of its client (10001)."
        )

    def _unknown(self, job_id: str) -> str:
        jobs = sorted(self._client.list_jobs(), key=lambda job: job.start_time or 0)
        known = [job.submission_id for job in jobs if job.submission_id]
        if not known:
            return f"there is no job {job_id} at {self.address}, which has run none yet."
        return f"there is no job {job_id} at {self.address}{nearest(job_id, known[-_RECENT:])}."


def _without_noise(lines: Iterable[str]) -> Iterator[str]:
    """Leave out the lines that Ray adds before and after a job's own."""
    return (line for line in takewhile(lambda line: not line.startswith(_EPILOGUE), lines) if not _NOISE.match(line))


class _Client(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which would wait for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        options.setdefault("timeout", _TIMEOUTS)
        return super()._do_request(method, endpoint, **options)

    def ask(self, endpoint: str) -> dict[str, Any]:
        """What the dashboard says there."""
        answer: dict[str, Any] = self._do_request("GET", endpoint).json()
        return answer


@contextmanager
def _no_addresses() -> Iterator[None]:
    """Without the environment variables that Ray's client prefers to the given address."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


async def _next(stream: AsyncIterator[str]) -> str | None:
    """The next piece of a log, None at its end."""
    async with asyncio.timeout(_SILENT_SECONDS):
        return await anext(stream, None)
