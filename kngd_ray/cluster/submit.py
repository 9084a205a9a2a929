"""``kngd-ray submit``: a command on a Ray cluster, checked before it is sent, followed to its end."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from rich.prompt import Confirm

from kngd_ray import __version__, configs
from kngd_ray.cluster.bundle import RAYIGNORE, Bundle, collect, show_bytes, write_zip
from kngd_ray.cluster.preflight import MARK, Arguments
from kngd_ray.console import Display
from kngd_ray.errors import KngdError, UsageError, nearest
from kngd_ray.tracking import redact

if TYPE_CHECKING:
    from kngd_ray.cluster.submission import Cluster, JobState

_CHECK_SECONDS = 300.0
_LARGEST, _NAMED = 5, 8
_INTERRUPTED = 130


class LeftRunningError(KngdError):
    """Following a job was interrupted, and the job goes on."""

    exit_code = _INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """How a command is sent.

    Attributes:
        address: of the cluster's dashboard; None looks in the environment.
        working_dir: what is sent.
        include: files, folders or patterns in it that are sent whatever they are.
        dry_run: show what would be sent, and contact nobody.
        follow: show the job's log until it ends.
        check: look first whether the cluster has what the command needs.
    """

    address: str | None = None
    working_dir: Path = Path()
    include: Sequence[str] = ()
    dry_run: bool = False
    follow: bool = True
    check: bool = True


def submit(command: Sequence[str], given: Arguments, options: SubmitOptions, display: Display) -> dict[str, Any]:
    """Run a command on a cluster.

    Args:
        command: its name and arguments.
        given: the same, parsed.
        options: how it is sent.
        display: where what is sent and what the job says is shown.

    Returns:
        The object that ``--json`` prints.

    Raises:
        UsageError: a secret is among its arguments, or a file that it names is not sent.
    """
    for argument in command:
        if redact(argument) != argument:
            raise UsageError(
                f"{redact(argument)!r} holds a user name or a secret, and everybody who may see the dashboard sees a "
                "job's command: leave it out and set MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD on the cluster."
            )
    bundle = collect(options.working_dir, options.include)
    _check_file(given, bundle)
    from kngd_ray.cluster.submission import Cluster, dashboard_address, package_limit

    entrypoint = shlex.join(["python", "-m", "kngd_ray.cli", *command])
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
            _check(cluster, given, bundle, archive, display)
        job_id = _new_id(given.command)
        cluster.submit(job_id, entrypoint, archive, {"kngd_ray": __version__})
    display.say(f"job {job_id} on {address}")
    if not options.follow:
        display.say(f"follow it with kngd-ray submit --logs {job_id}")
        return {**_report(cluster.job(job_id)), **sent}
    return {**_report(_follow(cluster, job_id, display)), **sent}


def status(job_id: str, address: str | None, display: Display) -> dict[str, Any]:
    """How a job stands.

    Args:
        job_id: of the job.
        address: of the cluster's dashboard; None looks in the environment.
        display: where it is shown.

    Returns:
        The object that ``--json`` prints.
    """
    state = _cluster(address).job(job_id)
    ran = "" if state.seconds is None else f", {state.seconds:.0f} s"
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    display.out.print(f"{state.id}: {state.status}{code}{ran}\n{state.entrypoint}", markup=False, highlight=False)
    if state.exit_code is None and state.message:
        display.out.print(state.message.splitlines()[0], markup=False, highlight=False)
    return {**_report(state), "entrypoint": state.entrypoint, "seconds": state.seconds}


def logs(job_id: str, address: str | None, display: Display) -> dict[str, Any]:
    """Show what a job says, from its beginning to its end.

    Args:
        job_id: of the job.
        address: of the cluster's dashboard; None looks in the environment.
        display: where it is shown.

    Returns:
        The object that ``--json`` prints.
    """
    return _report(_follow(_cluster(address), job_id, display))


def stop(job_id: str, address: str | None, display: Display) -> dict[str, Any]:
    """End a job, and wait until it has.

    Args:
        job_id: of the job.
        address: of the cluster's dashboard; None looks in the environment.
        display: where it is shown.

    Returns:
        The object that ``--json`` prints.
    """
    cluster = _cluster(address)
    before = cluster.job(job_id)
    if before.ended:
        display.say(f"job {job_id} had ended: {before.status}")
        return _report(before)
    state = cluster.stop(job_id)
    display.say(f"job {job_id}: {state.status}")
    return _report(state)


def _cluster(address: str | None) -> "Cluster":
    from kngd_ray.cluster.submission import Cluster, dashboard_address

    return Cluster(dashboard_address(address))


def _new_id(command: str) -> str:
    return f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"


def _report(state: "JobState") -> dict[str, Any]:
    code = _INTERRUPTED if state.status == "STOPPED" else 1 if state.status == "FAILED" else None
    return {
        "job_id": state.id,
        "status": state.status,
        "exit_code": state.exit_code if state.exit_code is not None else code,
    }


def _check_file(given: Arguments, bundle: Bundle) -> None:
    """Refuse a settings file that would not be there.

    Raises:
        UsageError: it is not sent.
    """
    if given.command not in ("train", "tune"):
        return
    first = next(iter(given.plain), "=")
    shipped = configs.names("presets" if given.command == "train" else "searches")  # which come with the package
    if "=" in first or (first in shipped and not (bundle.root / first).is_file()):
        return
    if Path(first).is_absolute() or Path(first).as_posix() in bundle.sizes:
        return
    files = [sent for sent in bundle.sizes if sent.endswith((".yaml", ".yml"))]
    if not (bundle.root / first).is_file():
        raise UsageError(f"{first} is not among what {bundle.root} sends{nearest(first, files)}.")
    if first in bundle.secrets:
        raise UsageError(f"{first} is left out of what is sent, as it looks like a credential: take that out of it.")
    raise UsageError(f"{first} is left out of what is sent, by git's rules or {RAYIGNORE}: add --include {first}.")


def _show(bundle: Bundle, display: Display) -> None:
    """Say what is sent, and what is not."""
    display.say(f"{bundle.root}: {len(bundle.sizes)} files, {show_bytes(bundle.bytes)}")
    for name, size in bundle.largest(_LARGEST):
        display.say(f"  {show_bytes(size):>10}  {name}")
    for rule, names in bundle.ignored.items():
        display.say(f"left out by {rule}: {_some(names)}")
    if bundle.secrets:
        display.say(f"left out as credentials (rename what is none): {_some(bundle.secrets)}")
    if bundle.unfit:
        display.say(f"left out as links to elsewhere or special files: {_some(bundle.unfit)}")
    if bundle.shadowing:
        display.say(f"goes before what is installed there under that name: {_some(bundle.shadowing)}")
    if bundle.brings_kngd_ray:
        display.say("kngd_ray is sent, and the cluster runs that, whatever is installed there")
    else:
        display.say(f"kngd_ray itself is not sent: the cluster has to have version {__version__}")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _check(cluster: "Cluster", given: Arguments, bundle: Bundle, archive: Path, display: Display) -> None:
    """Ask the cluster for what the command needs.

    Raises:
        KngdError: it lacks something.
        UsageError: the settings are wrong.
    """
    display.say("checking what the cluster reaches")
    job_id = _new_id("check")
    entrypoint = shlex.join(["python", "-m", "kngd_ray.cluster.preflight", json.dumps(asdict(given))])
    cluster.submit(job_id, entrypoint, archive, {"kngd_ray": __version__})
    state = None
    try:
        state = cluster.wait(job_id, _CHECK_SECONDS)
    finally:
        if state is None or not state.ended:
            cluster.stop(job_id)
    if not state.ended:
        raise KngdError(
            f"the check {job_id} did not end within {_CHECK_SECONDS:.0f} s and was stopped: look at it with "
            f"--logs {job_id}, or send the job without it by --no-check."
        )
    lines = cluster.log(job_id)
    found = next((json.loads(line)[MARK] for line in reversed(lines) if line.startswith(f'{{"{MARK}"')), None)
    if found is None:
        raise KngdError(_why_silent(job_id, state, lines))
    if found["kngd_ray"] != __version__ and not bundle.brings_kngd_ray:
        raise KngdError(
            f"the cluster has kngd_ray {found['kngd_ray']} and this machine {__version__}: install the same version "
            "there, or send it along from its checkout with --working-dir."
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if found["python"] != python:
        display.say(f"the cluster runs Python {found['python']}, this machine {python}")
    _refuse(found["faults"], display)


def _refuse(faults: Sequence[dict[str, Any]], display: Display) -> None:
    """One sentence per fault.

    Raises:
        KngdError: there are faults.
        UsageError: the settings are among them.
    """
    if not faults:
        return
    kind = UsageError if any(fault["usage"] for fault in faults) else KngdError
    if len(faults) == 1:
        raise kind(faults[0]["sentence"])
    for fault in faults:
        display.say(f"- {fault['sentence']}")
    raise kind(f"the job was not sent: {len(faults)} things are wrong, as said above.")


def _why_silent(job_id: str, state: "JobState", lines: Sequence[str]) -> str:
    """Why a check has not come to its answer."""
    text = "\n".join(lines)
    if "No module named kngd_ray.cluster" in text:  # as `python -m` says it
        return f"the cluster has an older kngd_ray than this machine's {__version__}: install that there."
    if "No module named 'kngd_ray" in text or "No module named kngd_ray" in text:
        return (
            f"the cluster has no kngd_ray: install version {__version__} there, as cluster.yaml does, or send it along "
            "from its checkout with --working-dir."
        )
    if "No module named" in text:
        missing = text.rpartition("No module named")[2].splitlines()[0].strip(" '\"")
        return f"the cluster's Python has no {missing}: install kngd_ray with what it depends on there."
    if "not found" in text and state.exit_code == 127:
        return "the cluster's head finds no `python` on its PATH: start Ray there within its environment."
    said = (lines or state.message.splitlines()[:1] or ["nothing"])[-1].strip().rstrip(".")
    return f"the check {job_id} on the cluster failed and said last: {said}; see kngd-ray submit --logs {job_id}."


def _follow(cluster: "Cluster", job_id: str, display: Display) -> "JobState":
    """Show a job's log until it ends, and its end.

    Raises:
        LeftRunningError: it was interrupted, and the job is to go on.
    """
    again = f"kngd-ray submit --logs {job_id} shows it again, --stop {job_id} ends it"
    try:
        for line in cluster.follow(job_id):
            display.out.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
        state = cluster.wait(job_id)
    except KeyboardInterrupt:
        try:
            if not _asked_to_stop(display):
                raise LeftRunningError(f"job {job_id} goes on: {again}.") from None
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
