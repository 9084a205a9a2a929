"""The checks of ``kngd-ray doctor`` and their findings."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from uuid import uuid4

from huggingface_hub import constants as hub_settings

from kngd_ray._run_layout import SUBMITTED
from kngd_ray.clip import ModelConfig, load_model, read_class_embeddings
from kngd_ray.cluster.doctor import node_checks
from kngd_ray.config import Config, TrackingConfig
from kngd_ray.errors import ModelError
from kngd_ray.tracking import check_store

State = Literal["ok", "warning", "failed", "skipped"]
Ask = Callable[..., Sequence[node_checks.NodeAnswer]]  # kngd_ray.cluster.nodes.ask_nodes, or for this process alone

HERE = "here"

_GIB = 1 << 30
_LOW_DISK = 5 * _GIB
_LOW_SHARED_MEMORY = _GIB
_NODE_SECONDS = 120.0  # a question to the nodes: worker processes have to start first
_UNSEEN_SECONDS = 5.0
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - not a temporary file


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: what was looked at.
        where: a node, or ``here`` for this process.
        state: ok, warning, failed or skipped; only failed counts in the exit code.
        found: what was seen.
        advice: what to do about it, where it is not ok and `found` does not say it.
    """

    check: str
    where: str
    state: State
    found: str
    advice: str = ""


def token(where: str, seen: Mapping[str, str]) -> Finding:
    """Ray's token on one machine.

    Args:
        where: the machine.
        seen: what :func:`kngd_ray.cluster.doctor.node_checks.token_file` saw there.

    Returns:
        What to think of it.
    """
    if seen["mode"] == "disabled":
        return Finding("token", where, "warning", "disabled by RAY_AUTH_MODE=disabled", "unset it, or set it to token")
    if not seen["fault"]:
        return Finding("token", where, "ok", f"{seen['place']}, for its owner only")
    found, _, advice = seen["fault"].partition(": ")
    if found.startswith("there is no") and not seen["mode"]:
        return Finding("token", where, "ok", "none yet; the first Ray instance that is started here creates it")
    return Finding("token", where, "failed", found, advice)


def nodes(config: Config, ask: Ask, *, cluster: bool, gpus: bool) -> list[Finding]:
    """Versions, GPUs, token, disks and shared memory of every node.

    Args:
        config: of the run.
        ask: puts a question to the nodes.
        cluster: Ray is up, and they may be others than this process's machine.
        gpus: somebody offers or wants GPUs.

    Returns:
        Several findings for each node.
    """
    folders = {
        "storage": str(_absolute(config.trainer.storage_path)),
        "temp": os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(),
        "cache": str(config.data.cache_root),
    }
    here = node_checks.versions()
    findings = []
    for said in ask(node_checks.describe, folders, gpus, timeout_s=_NODE_SECONDS):
        if said.error is not None:
            lacks = "No module named 'kngd_ray'" in said.error
            advice = f"install kngd_ray {here.get('kngd_ray', '')} there" if lacks else "see the node's logs"
            findings.append(Finding("node", said.node, "failed", said.error, advice))
            continue
        found = said.answer
        if cluster:
            findings.append(_versions(said.node, here, found["versions"]))
            if found["token"]["mode"] and found["token"]["fault"]:
                findings.append(token(said.node, found["token"]))
            findings.append(_shared_memory(said.node, found["shm"]))
        if gpus:
            findings.append(_gpus(said.node, found["gpus"], said.resources.get("GPU", 0)))
        findings.append(_disks(said.node, folders, found["free"]))
    return findings


def _versions(node: str, here: Mapping[str, str], there: Mapping[str, str]) -> Finding:
    """A node's versions against this process's: code pickled here runs there."""
    differ = []
    for name, version in here.items():
        other = there.get(name, "missing")
        if name == "python":
            same = version.split(".")[:2] == other.split(".")[:2]
        else:
            same = version.split("+")[0] == other.split("+")[0]
        if not same:
            differ.append(f"{name} {other} (here {version})")
    if differ:
        return Finding("versions", node, "failed", ", ".join(differ), "install the same versions on all nodes")
    return Finding("versions", node, "ok", "the same as here")


def _gpus(node: str, names: list[str] | str, claimed: float) -> Finding:
    """What torch can use of the GPUs that a node offers."""
    if isinstance(names, str):
        state: State = "failed" if claimed else "ok"
        found = f"{claimed:g} offered, and torch cannot use them: {names}" if claimed else "none"
        return Finding("gpus", node, state, found, "check driver and CUDA build of torch" if claimed else "")
    if len(names) < claimed:
        found = f"{claimed:g} offered, and torch sees {len(names)}"
        return Finding("gpus", node, "failed", found, "check driver, container runtime and CUDA build of torch")
    return Finding("gpus", node, "ok", ", ".join(names) or "none")


def _disks(node: str, folders: Mapping[str, str], free: Mapping[str, int | None]) -> Finding:
    known = {name: left for name, left in free.items() if left is not None}
    found = ", ".join(f"{name} {left / _GIB:.1f} GiB" for name, left in known.items()) + " free"
    low = [f"{name} ({folders[name]})" for name, left in known.items() if left < _LOW_DISK]
    if low:
        advice = f"less than {_LOW_DISK // _GIB} GiB for {', '.join(low)}: free some, or choose another folder"
        return Finding("disk", node, "warning", found, advice)
    return Finding("disk", node, "ok", found)


def _shared_memory(node: str, free: int | None) -> Finding:
    if free is None:
        return Finding(_SHARED_MEMORY, node, "ok", "none on this system")
    found = f"{free / _GIB:.1f} GiB free"
    if free < _LOW_SHARED_MEMORY:
        advice = "Ray keeps its objects there: start the container with --shm-size of a third of its memory"
        return Finding(_SHARED_MEMORY, node, "warning", found, advice)
    return Finding(_SHARED_MEMORY, node, "ok", found)


def _absolute(storage_path: str) -> Path:
    return Path(storage_path).expanduser().resolve()


def storage(storage_path: str, ask: Ask) -> list[Finding]:
    """Write, read and delete on every node, and check that each sees the others' files.

    Args:
        storage_path: where runs live.
        ask: puts a question to the nodes.

    Returns:
        A finding for each node.
    """
    if "://" in storage_path:
        advice = "mount it, and give the folder"
        return [Finding("storage", HERE, "failed", f"{storage_path} is an address, and runs need a folder", advice)]
    folder, mark, text = str(_absolute(storage_path)), f".kngd-doctor-{uuid4().hex[:12]}", uuid4().hex
    findings, written, made = [], {}, set()
    try:
        for said in ask(node_checks.write, folder, mark, text, timeout_s=_NODE_SECONDS):
            if said.error is None:
                written[said.node] = said.answer["name"]
                made |= set(said.answer["made"])
            else:
                advice = "check that the folder is mounted there and that Ray's user may write to it"
                findings.append(Finding("storage", said.node, "failed", f"{folder}: {said.error}", advice))
        looked = ask(node_checks.unseen, folder, list(written.values()), text, _UNSEEN_SECONDS, timeout_s=_NODE_SECONDS)
        for said in looked:
            if said.node not in written:
                continue
            blind = [node for node, name in written.items() if name in (said.answer or ())]
            if said.error is not None:
                findings.append(Finding("storage", said.node, "failed", f"{folder}: {said.error}", "check its mount"))
            elif blind:
                advice = "trainer.storage_path must be one folder that all nodes share, mounted at the same path"
                found = f"{folder}: written and read, but not what {', '.join(blind)} wrote there"
                findings.append(Finding("storage", said.node, "failed", found, advice))
            else:
                also = ", and what every other node wrote" if len(written) > 1 else ""
                findings.append(Finding("storage", said.node, "ok", f"{folder}: written, read{also}, deleted"))
    finally:
        if written:
            deepest_first = sorted(made, key=len, reverse=True)
            for folders in ([], deepest_first):  # folders once every node has taken its file away
                ask(node_checks.remove, folder, list(written.values()), folders, timeout_s=_NODE_SECONDS)
    return findings


def inputs(paths: Mapping[str, str], ask: Ask) -> list[Finding]:
    """Read a byte of every input on every node.

    Args:
        paths: the setting that names each path.
        ask: puts a question to the nodes.

    Returns:
        A finding for each path that cannot be read and each node that cannot read it; else one for each node.
    """
    findings = []
    for said in ask(node_checks.unreadable, list(paths), timeout_s=_NODE_SECONDS) if paths else ():
        if said.error is not None:
            findings.append(Finding("inputs", said.node, "failed", said.error, "see the node's logs"))
            continue
        for path, reason in said.answer.items():
            advice = "put it on storage that all nodes share"
            if said.node == HERE and not os.environ.get(SUBMITTED):
                advice = "correct the path"
            elif not Path(path).expanduser().is_absolute():
                advice += " and give its absolute path"
            found = f"{paths[path]}={path} cannot be read ({reason})"
            check = "model" if paths[path].startswith("model.") else "inputs"
            findings.append(Finding(check, said.node, "failed", found, advice))
        if not said.answer:
            named = ", ".join(dict.fromkeys(paths.values()))
            findings.append(Finding("inputs", said.node, "ok", f"{named}: can be read"))
    return findings


def cache(folder: Path, ask: Ask) -> list[Finding]:
    """Write to the feature cache.

    Args:
        folder: of the cache.
        ask: puts a question to this process.

    Returns:
        One finding.
    """
    (said,) = ask(node_checks.write, str(folder), f".kngd-doctor-{uuid4().hex[:12]}", "", timeout_s=_NODE_SECONDS)
    if said.error is not None:
        found = f"the feature cache {folder} cannot be written ({said.error})"
        return [Finding("cache", HERE, "failed", found, "set data.cache_dir to a folder that can be written")]
    ask(node_checks.remove, str(folder), [said.answer["name"]], said.answer["made"], timeout_s=_NODE_SECONDS)
    return [Finding("cache", HERE, "ok", f"{folder}: written, deleted")]


def tracking(config: TrackingConfig) -> list[Finding]:
    """Ask the tracking store for its experiments, if runs are logged at all."""
    if not config.enabled:
        return [Finding("tracking", HERE, "skipped", "tracking.enabled is false")]
    began = time.monotonic()
    return [Finding("tracking", HERE, "ok", f"{check_store(config.uri)} ({time.monotonic() - began:.1f} s)")]


def model(config: ModelConfig) -> list[Finding]:
    """Load the model from local files, without downloads.

    Args:
        config: the model.

    Returns:
        One finding.

    Raises:
        ModelError: it cannot be loaded, and there is nothing to wait for.
    """
    if config.precomputed:
        return [Finding("model", HERE, "ok", _class_embeddings(config))]
    offline = hub_settings.HF_HUB_OFFLINE
    hub = f"hub cache {_hub_cache()}, {'offline' if offline else 'online'}"
    named = config.name if config.pretrained is None else f"{config.name} {config.pretrained}"
    began = time.monotonic()
    try:
        with _without_hub():
            load_model(config)
    except ModelError as error:
        if offline or config.pretrained is None or Path(config.pretrained).suffix:
            raise
        return [Finding("model", HERE, "warning", f"{named} is not on this machine; {hub}", str(error))]
    return [Finding("model", HERE, "ok", f"{named} loads ({time.monotonic() - began:.1f} s); {hub}")]


@contextmanager
def _without_hub() -> Iterator[None]:
    """Let the hub's client, which reads its environment only when it is imported, fetch nothing for a while."""
    before, hub_settings.HF_HUB_OFFLINE = hub_settings.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        hub_settings.HF_HUB_OFFLINE = before


def _class_embeddings(config: ModelConfig) -> str:
    """What there is in the place of a model; a ModelError tells of a file that cannot be used."""
    if config.class_embeddings is None:
        return "features are given, without class embeddings"
    shape = read_class_embeddings(Path(config.class_embeddings).expanduser()).shape
    return f"features are given, {config.class_embeddings} has class embeddings of shape {shape}"


def _hub_cache() -> Path:
    """Where the hub's client keeps what it has fetched."""
    named = os.environ.get("HF_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"
