"""``kngd-ray submit``: a command on a Ray cluster, checked before it is sent, followed to its end."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.prompt import Confirm

from kngd_ray import __version__, configs
from kngd_ray.cluster.bundle import RAYIGNORE, Bundle, collect, show_bytes, write_zip
from kngd_ray.cluster.preflight import new_id, preflight, shell_line
from kngd_ray.config import parse, parse_override
from kngd_ray.console import Display
from kngd_ray.errors import KngdError, UsageError, nearest
from kngd_ray.tracking import redact

if TYPE_CHECKING:
    from kngd_ray.cluster.submission import Cluster, JobState

_LARGEST, _NAMED = 5, 8
_INTERRUPTED = 130


class LeftRunningError(KngdError):
    """Following a job was interrupted, and the job goes on."""

    exit_code = _INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """How a command is submitted, or which job is looked at.

    Attributes:
        address: URL of the cluster's dashboard; None looks in the environment.
        working_dir: folder whose code and settings are sent.
        include: files, folders or patterns below it that are sent regardless of suffix and git.
        dry_run: show what would be sent, and contact nobody.
        follow: show the job's log until it ends.
        check: look at the command's settings here, and run ``doctor`` on the cluster first.
        status: job whose state is shown.
        logs: job whose log is followed.
        stop: job that is stopped.
    """

    address: str | None = None
    working_dir: str = "."
    include: tuple[str, ...] = ()
    dry_run: bool = False
    follow: bool = True
    check: bool = True
    status: str | None = None
    logs: str | None = None
    stop: str | None = None


def read_options(words: Sequence[str], command: Sequence[str]) -> SubmitOptions:
    """Read the settings of a submission.

    Args:
        words: ``key=value`` settings.
        command: that is submitted; empty if a job is looked at.

    Returns:
        The options.

    Raises:
        UsageError: a setting is wrong, or there is not exactly one of a command, ``status``, ``logs`` and ``stop``.
    """
    given: dict[str, Any] = {}
    include: list[Any] = []
    for word in words:
        key, value = parse_override(word)
        if "." in key:
            raise UsageError(f"{word} is a setting of a run: write it after the command, as in submit -- train {word}.")
        if key == "include":
            include += value if isinstance(value, list) else [] if value is None else [value]
        else:
            given[key] = value
    try:
        options = parse(SubmitOptions, {**given, "include": include})
    except UsageError as error:
        raise UsageError(f"submit: {error}") from error
    chosen = [f"{name}=" for name in ("status", "logs", "stop") if getattr(options, name) is not None]
    chosen += ["a command"] if command else []
    if len(chosen) != 1:
        found = f"there are {' and '.join(chosen)}" if chosen else "there is none"
        raise UsageError(f"submit takes one of -- COMMAND, status=JOB, logs=JOB and stop=JOB, and {found}.")
    return options


def submit(command: Sequence[str], settings: Sequence[str], options: SubmitOptions, display: Display) -> dict[str, Any]:
    """Run a command on a cluster.

    Args:
        command: its name and arguments.
        settings: those of its arguments that are settings, which may begin with a file.
        options: how it is submitted.
        display: where what is sent and the job's log are shown.

    Returns:
        The object that ``--json`` prints.

    Raises:
        UsageError: a secret is among its arguments, or a file that it names is not sent.
    """
    for argument in command:
        if redact(argument) != argument:
            raise UsageError(
                f"{redact(argument)!r} contains a user name or a secret, and the dashboard shows a job's command to "
                "everybody: leave it out and set MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD on the cluster."
            )
    bundle = collect(Path(options.working_dir), options.include)
    _check_file(command[0], settings, bundle)
    from kngd_ray.cluster.submission import Cluster, dashboard_address, package_limit

    entrypoint = shell_line(*command)
    _show(bundle, display)
    bundle.refuse_above(package_limit())
    address = dashboard_address(options.address)
    sent = {"files": len(bundle.sizes), "bytes": bundle.bytes}
    if options.dry_run:
        display.say(f"would run on {address}: {entrypoint}")
        unsent = {"job_id": None, "status": "NOT SENT", "exit_code": None}
        return {**unsent, **sent, "entrypoint": entrypoint, "sent": list(bundle.sizes)}
    cluster = Cluster(address)
    with TemporaryDirectory(prefix="kngd-submit-") as scratch:
        archive = Path(scratch) / "bundle.zip"
        write_zip(bundle, archive)
        if options.check:
            cluster.check_version()
            preflight(cluster, command, bundle, archive, display)
        job_id = new_id(command[0])
        cluster.submit(job_id, entrypoint, archive, {"kngd_ray": __version__})
    display.say(f"job {job_id} on {address}")
    if not options.follow:
        display.say(f"follow it with kngd-ray submit logs={job_id}")
        return {**_report(cluster.job(job_id)), **sent}
    return {**_report(_follow(cluster, job_id, display)), **sent}


def show_job(options: SubmitOptions, display: Display) -> dict[str, Any]:
    """Show the state or the log of a job, or stop it.

    Args:
        options: name the job.
        display: where it is shown.

    Returns:
        The object that ``--json`` prints.
    """
    from kngd_ray.cluster.submission import Cluster, dashboard_address

    cluster = Cluster(dashboard_address(options.address))
    if options.logs is not None:
        return _report(_follow(cluster, options.logs, display))
    if options.stop is not None:
        return _stop(cluster, options.stop, display)
    assert options.status is not None
    state = cluster.job(options.status)
    ran = "" if state.seconds is None else f", {state.seconds:.0f} s"
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    display.out.print(f"{state.id}: {state.status}{code}{ran}\n{state.entrypoint}", markup=False, highlight=False)
    if state.exit_code is None and state.message:
        display.out.print(state.message.splitlines()[0], markup=False, highlight=False)
    return {**_report(state), "entrypoint": state.entrypoint, "seconds": state.seconds}


def _stop(cluster: "Cluster", job_id: str, display: Display) -> dict[str, Any]:
    before = cluster.job(job_id)
    if before.ended:
        display.say(f"job {job_id} had already ended: {before.status}")
        return _report(before)
    state = cluster.stop(job_id)
    display.say(f"job {job_id}: {state.status}")
    return _report(state)


def _report(state: "JobState") -> dict[str, Any]:
    code = _INTERRUPTED if state.status == "STOPPED" else 1 if state.status == "FAILED" else None
    return {
        "job_id": state.id,
        "status": state.status,
        "exit_code": state.exit_code if state.exit_code is not None else code,
    }


def _check_file(command: str, settings: Sequence[str], bundle: Bundle) -> None:
    """Refuse a settings file that would not be on the cluster.

    Raises:
        UsageError: it is not sent.
    """
    if command not in ("train", "tune"):
        return
    first = next(iter(settings), "=")
    shipped = configs.names("presets" if command == "train" else "searches")
    if "=" in first or (first in shipped and not (bundle.root / first).is_file()):
        return
    if Path(first).is_absolute() or Path(first).as_posix() in bundle.sizes:
        return
    files = [sent for sent in bundle.sizes if sent.endswith((".yaml", ".yml"))]
    if not (bundle.root / first).is_file():
        raise UsageError(f"{first} is not among the files sent from {bundle.root}{nearest(first, files)}.")
    if first in bundle.secrets:
        raise UsageError(f"{first} is not sent because it seems to hold a credential: remove that from it.")
    raise UsageError(f"{first} is not sent because git or {RAYIGNORE} ignores it: add include={first}.")


def _show(bundle: Bundle, display: Display) -> None:
    """Say what is sent, and what is not."""
    display.say(f"{bundle.root}: {len(bundle.sizes)} files, {show_bytes(bundle.bytes)}")
    for name, size in bundle.largest(_LARGEST):
        display.say(f"  {show_bytes(size):>10}  {name}")
    for rule, names in bundle.ignored.items():
        display.say(f"left out by {rule}: {_some(names)}")
    if bundle.secrets:
        display.say(f"left out as possible credentials (rename false positives): {_some(bundle.secrets)}")
    if bundle.unfit:
        display.say(f"left out as links to elsewhere or special files: {_some(bundle.unfit)}")
    if bundle.shadowing:
        display.say(f"shadows what is installed on the cluster: {_some(bundle.shadowing)}")
    if bundle.brings_kngd_ray:
        display.say("kngd_ray is sent and takes precedence over the installed version")
    else:
        display.say(f"kngd_ray itself is not sent: the cluster needs version {__version__}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _follow(cluster: "Cluster", job_id: str, display: Display) -> "JobState":
    """Show a job's log until it ends, and its end.

    Raises:
        LeftRunningError: it was interrupted, and the job is to go on.
    """
    again = f"kngd-ray submit logs={job_id} shows its log again, stop={job_id} stops it"
    try:
        for line in cluster.follow(job_id):
            display.out.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        state = cluster.wait(job_id)
    except KeyboardInterrupt:
        try:
            if not _asked_to_stop(display):
                raise LeftRunningError(f"job {job_id} is still running: {again}.") from None
            state = cluster.stop(job_id)
        except KeyboardInterrupt:
            raise LeftRunningError(f"job {job_id} is left as it is: {again}.") from None
    if state.status == "SUCCEEDED":
        return state
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    why = f": {state.message.splitlines()[0]}" if state.exit_code is None and state.message else ""
    display.say(f"job {job_id} {state.status}{code}{why}")
    return state


def _asked_to_stop(display: Display) -> bool:
    """Whether who interrupted wants the job itself to end; nobody can be asked without a terminal."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    try:
        return Confirm.ask("\nstop the job?", default=False, console=display.console)
    except EOFError:
        return False
