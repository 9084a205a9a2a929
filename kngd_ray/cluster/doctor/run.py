"""``kngd-ray doctor``: would a run with these settings work here and on the cluster, and is anybody else let in?

Each check stands alone: one that fails or hangs is a line of the table, and the others are still made.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from rich import box
from rich.markup import escape
from rich.table import Table

from kngd_ray.cluster.doctor import checks as doctor_checks
from kngd_ray.cluster.doctor import node_checks
from kngd_ray.cluster.doctor.checks import HERE, Ask, Finding, State
from kngd_ray.cluster.doctor.needs import Needs
from kngd_ray.cluster.doctor.node_checks import NodeAnswer
from kngd_ray.config import TrainerConfig
from kngd_ray.console import Display
from kngd_ray.errors import KngdError

_STORE_SECONDS = 30.0
_MODEL_SECONDS = 180.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


def doctor(needs: Needs, display: Display) -> dict[str, Any]:
    """Make all checks and show them.

    Args:
        needs: what a command needs.
        display: where the table is shown.

    Returns:
        ``ok``, false if a check failed; the ``versions`` of this process, and the ``checks``.
    """
    needs.check_kept()
    findings = []
    for finding in _checks(needs):
        findings.append(finding)
        if not display.out.is_terminal:  # a log: each line as soon as it is known
            display.out.print(_line(finding), markup=False, highlight=False, soft_wrap=True)
    if display.out.is_terminal:
        display.out.print(_table(findings))
    counts = {state: sum(finding.state == state for finding in findings) for state in ("ok", "warning", "failed")}
    display.say("doctor: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return {
        "ok": not counts["failed"],
        "versions": node_checks.versions(),
        "checks": [asdict(finding) for finding in findings],
    }


def _checks(needs: Needs) -> Iterator[Finding]:
    shown = ", ".join(f"{name} {version}" for name, version in node_checks.versions().items())
    yield Finding("versions", HERE, "ok", shown)
    if needs.config is None:
        return
    config, trainer = needs.config, needs.config.trainer
    token, own = node_checks.token_file(), os.environ.get("RAY_AUTH_TOKEN")  # before Ray is up
    with ExitStack() as stack:
        ask: Ask = _ask_here
        up, gpus = False, trainer.use_gpu is True
        if trainer.least_workers > 0:
            for finding in _isolated("ray", lambda: _ray(trainer, stack)):
                yield finding
                up = up or (finding.check == "ray" and finding.state == "ok")
        else:
            yield Finding("ray", HERE, "skipped", "trainer.num_workers=0: the run does not use it")
        if os.environ.get("RAY_AUTH_TOKEN") != own:  # the instance has one of its own, as there was none
            token["mode"] = ""
        yield from _isolated("token", lambda: [doctor_checks.token(HERE, token)])
        if up:
            from kngd_ray.cluster.nodes import ask_nodes, cluster_facts

            ask, gpus = ask_nodes, gpus or cluster_facts().resources.get("GPU", 0) > 0
        yield from _isolated("nodes", lambda: doctor_checks.nodes(config, ask, cluster=up, gpus=gpus))
        if needs.writes_runs:
            yield from _isolated("storage", lambda: doctor_checks.storage(trainer.storage_path, ask))
        read = _isolated("inputs", lambda: doctor_checks.inputs(needs.inputs, ask))
        yield from read
    if not config.model.precomputed:
        yield from _isolated("cache", lambda: doctor_checks.cache(config.data.cache_root, _ask_here))
    if needs.logs:
        yield from _isolated("tracking", lambda: doctor_checks.tracking(config.tracking), _STORE_SECONDS)
    if not any(finding.check == "model" for finding in read):  # else a file that it needs cannot be read
        yield from _isolated("model", lambda: doctor_checks.model(config.model), _MODEL_SECONDS)


def _isolated(check: str, look: Callable[[], list[Finding]], seconds: float | None = None) -> list[Finding]:
    """The findings of one check; its failure or timeout is a finding, too."""
    try:
        return look() if seconds is None else _within(seconds, look)
    except KngdError as error:
        return [Finding(check, HERE, "failed", str(error))]
    except TimeoutError:
        return [Finding(check, HERE, "failed", f"no answer within {seconds:g} s", "see what it waits for")]
    except Exception as error:  # whatever it is, the other checks are still wanted
        said = (str(error).strip().splitlines() or [""])[0]
        return [Finding(check, HERE, "failed", f"{type(error).__name__}: {said}", "the check itself failed")]


def _within(seconds: float, look: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a thread that is abandoned after a timeout: a call into a dead file system never returns.

    Raises:
        TimeoutError: it did take longer.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(look(*arguments))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TimeoutError
    return outcome[0]


def _ask_here(question: Callable[..., Any], *arguments: Any, timeout_s: float) -> list[NodeAnswer]:
    """Put a question to this process, where there is no cluster."""
    try:
        return [NodeAnswer(HERE, _within(timeout_s, question, *arguments))]
    except TimeoutError:
        return [NodeAnswer(HERE, error=f"no answer within {timeout_s:g} s")]
    except OSError as error:
        return [NodeAnswer(HERE, error=str(error))]


def _ray(trainer: TrainerConfig, stack: ExitStack) -> list[Finding]:
    """Bring Ray up as a run would, until the stack ends, and look at the cluster."""
    from kngd_ray.cluster import ray_session
    from kngd_ray.cluster.nodes import cluster_facts

    began = time.monotonic()
    # sockets are in there, whose paths may not be long
    temporary = tempfile.TemporaryDirectory(prefix="kr-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(temporary))
    stack.enter_context(ray_session(trainer.address, temp_dir=folder, leave_token=False))
    facts = cluster_facts()
    ours = any(folder.iterdir())
    place = "started here for this check" if ours else f"joined {facts.address}"
    counted = f"{facts.nodes} node{'s' if facts.nodes != 1 else ''}"
    offered = ", ".join(f"{facts.resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
    findings = [
        Finding("ray", HERE, "ok", f"{place} in {time.monotonic() - began:.1f} s: {counted}, {offered}"),
        *_isolated("access", lambda: _access(facts.dashboard, ours=ours)),
    ]
    ranks = trainer.least_workers
    for name, needed in {"CPU": ranks * trainer.cpus_per_worker, "GPU": ranks * (trainer.use_gpu is True)}.items():
        there, most = facts.resources.get(name, 0), facts.most.get(name, 0)
        if needed <= there:
            continue
        found = f"a run needs {needed:g} {name}s at once, Ray has {there:g}"
        if needed <= most:
            findings.append(Finding("size", HERE, "ok", f"{found} and can bring up {most:g}"))
        else:
            advice = "lower trainer.num_workers, or join a larger cluster with trainer.address"
            findings.append(Finding("size", HERE, "failed", found, advice))
    return findings


def _access(dashboard: str, *, ours: bool) -> list[Finding]:
    """Access control: where the dashboard listens, and whether the cluster requires a token."""
    asks = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    host = urlsplit(f"//{dashboard}").hostname if dashboard else None
    findings = []
    if ours:
        findings.append(Finding("dashboard", HERE, "ok", "none; Ray listens on loopback only"))
    elif host is None:
        findings.append(Finding("dashboard", HERE, "ok", "none"))
    elif host in _LOOPBACK:
        findings.append(Finding("dashboard", host, "ok", f"{dashboard}, on the head's loopback only"))
    else:
        advice = "start the head with --dashboard-host=127.0.0.1 and reach it through a tunnel: `ray dashboard`, ssh -L"
        findings.append(Finding("dashboard", host, "warning", f"{dashboard} can be reached over the network", advice))
    if asks and dashboard:  # it let us in with a token, and may do so without
        with suppress(OSError, ValueError), urlopen(f"http://{dashboard}/api/authentication_mode", timeout=5) as answer:
            asks = json.load(answer)["authentication_mode"] == "token"
    if asks:
        findings.append(Finding("access", HERE, "ok", "Ray requires the token"))
    else:
        advice = "start head and nodes with RAY_AUTH_MODE=token and the same token file, see docs/cluster.md"
        state: State = "warning" if ours or host in _LOOPBACK else "failed"
        findings.append(
            Finding("access", HERE, state, "Ray requires no token, so anyone who can reach it can run code", advice)
        )
    return findings


def _line(finding: Finding) -> str:
    advice = f": {finding.advice}" if finding.advice else ""
    return f"{finding.state:<8} {finding.check:<10} {finding.where:<14} {finding.found}{advice}"


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("check", "where", "", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.state]
        advice = f"\n[{colour}]{escape(finding.advice)}[/]" if finding.advice else ""
        state = f"[{colour}]{finding.state}[/]"
        table.add_row(escape(finding.check), escape(finding.where), state, escape(finding.found) + advice)
    return table
