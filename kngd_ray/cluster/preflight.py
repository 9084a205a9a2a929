"""``doctor`` as a short job on the cluster, before a command is submitted there."""

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from kngd_ray import __version__
from kngd_ray.cluster.bundle import Bundle
from kngd_ray.console import Display
from kngd_ray.errors import KngdError, UsageError

if TYPE_CHECKING:
    from kngd_ray.cluster.submission import Cluster, JobState

_SECONDS = 300.0
_USAGE = 2
_SENTENCE = "kngd-ray: "  # how the command line begins its last line
_ACCESS = ("access", "dashboard", "token")  # who else is let in: the job runs all the same


def new_id(command: str) -> str:
    """A job id that sorts by time and does not repeat."""
    return f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"


def shell_line(*words: str) -> str:
    """A command line of this package as the cluster's shell runs it."""
    return shlex.join(["python", "-m", "kngd_ray.cli", *words])


def preflight(cluster: "Cluster", command: Sequence[str], bundle: Bundle, archive: Path, display: Display) -> None:
    """Run ``doctor -- COMMAND`` on the cluster.

    Args:
        cluster: that will run the command.
        command: its name and arguments.
        bundle: the files that are sent with it.
        archive: the same as an archive.
        display: where warnings and failures are shown.

    Raises:
        KngdError: a check failed, or doctor did not end.
    """  # noqa: DOC501
    display.say("running doctor on the cluster")
    job_id = new_id("check")
    cluster.submit(job_id, shell_line("doctor", "--json", "--", *command), archive, {"kngd_ray": __version__})
    state = None
    try:
        state = cluster.wait(job_id, _SECONDS)
    finally:
        if state is None or not state.ended:
            cluster.stop(job_id)
    lines = cluster.log(job_id)
    if not state.ended:
        failed = [f" ({' '.join(line.split())})" for line in lines if line.startswith("failed ")]
        raise KngdError(
            f"the check {job_id} did not end within {_SECONDS:.0f} s and was stopped{''.join(failed[:1])}: see its log "
            f"with kngd-ray submit logs={job_id}, or submit without it, check=false."
        )
    report = _report(lines)
    if report is None:
        raise _failure(job_id, state, lines)
    there = report["versions"]
    installed = there.get("kngd_ray")
    if installed != __version__ and not bundle.brings_kngd_ray:
        found = f"has kngd_ray {installed}" if installed else "has no kngd_ray installed"
        raise KngdError(
            f"the cluster {found} and this machine has {__version__}: install the same version there, or send this one "
            "with working_dir=CHECKOUT."
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if there["python"].split(".")[:2] != python.split("."):
        display.say(f"the cluster runs Python {there['python']}, this machine {python}")
    _refuse(report["checks"], display)


def _report(lines: Sequence[str]) -> dict[str, Any] | None:
    """What doctor printed on standard output, among the lines of the job's log."""
    for line in reversed(lines):
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "checks" in found:
                return found
    return None


def _refuse(checks: Sequence[Mapping[str, Any]], display: Display) -> None:
    """Show warnings, and refuse to go on if a check failed.

    Raises:
        KngdError: a check failed.
    """
    nodes: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        sentence = ": ".join(filter(None, (check["found"], check["advice"])))
        stops = check["state"] == "failed" and check["check"] not in _ACCESS
        if stops or check["state"] in ("warning", "failed"):
            nodes.setdefault(("failed" if stops else "warning", sentence), []).append(check["where"])
    failed = []
    for (state, sentence), places in nodes.items():
        where = ", ".join(place for place in places if place != "here")
        said = f"{where}: {sentence}" if where else sentence
        if state == "warning":
            display.say(f"warning: {said}")
        else:
            failed.append(f"{said.rstrip('.')}.")
    if not failed:
        return
    if len(failed) > 1:
        for sentence in failed:
            display.say(f"- {sentence}")
        raise KngdError(f"the job was not submitted: {len(failed)} checks failed, see above.")
    raise KngdError(failed[0])


def _failure(job_id: str, state: "JobState", lines: Sequence[str]) -> KngdError:
    """The reason why doctor printed no report."""
    text = "\n".join(lines)
    if "No module named kngd_ray.cli" in text:  # as `python -m` says it
        return KngdError(f"the cluster has an older kngd_ray than this machine's {__version__}: install that there.")
    if "No module named 'kngd_ray" in text or "No module named kngd_ray" in text:
        return KngdError(
            f"the cluster has no kngd_ray: install version {__version__} there, as cluster.yaml does, or send it with "
            "working_dir=CHECKOUT."
        )
    if "No module named" in text:
        missing = text.rpartition("No module named")[2].splitlines()[0].strip(" '\"")
        return KngdError(f"the cluster's Python has no {missing}: install kngd_ray with its dependencies there.")
    if "not found" in text and state.exit_code == 127:
        return KngdError("there is no `python` on the PATH of the cluster's head: start Ray in its environment.")
    if lines and lines[-1].startswith(_SENTENCE):  # doctor's own refusal, as of a wrong setting
        kind = UsageError if state.exit_code == _USAGE else KngdError
        return kind(lines[-1].removeprefix(_SENTENCE))
    last = (lines or state.message.splitlines()[:1] or ["nothing"])[-1].strip().rstrip(".")
    return KngdError(
        f"the check {job_id} failed on the cluster; its last line is: {last}. See kngd-ray submit logs={job_id}."
    )
