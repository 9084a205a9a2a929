"""Whether a cluster has what a command needs, found out there before the command is sent.

``python -m kngd_ray.cluster.preflight ARGUMENTS``, these as JSON, runs as a job of its own, with the bundle that is to
be sent: it reads the settings with the cluster's files and environment, asks every node whether it can read the inputs
and write where results go, and prints one line of JSON for :mod:`kngd_ray.cluster.submit`.
"""

import json
import os
import platform
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from glob import has_magic
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kngd_ray import __version__
from kngd_ray._run_layout import CONFIG
from kngd_ray.cluster.doctor.node_checks import remove, unseen, write
from kngd_ray.errors import KngdError, UsageError

if TYPE_CHECKING:
    from kngd_ray.config import Config

MARK = "kngd_ray_preflight"  # the key by which the line is found in the job's log

_WRITTEN = ("--out", "--html")  # those that name what is written
_LOG = ("train", "tune")
_WRITE_RUNS = (*_LOG, "evaluate", "ensemble")
_OF_A_RUN = ("evaluate", "ensemble", "export", "predict")
_LOST = "lies in the job's own folder, which the cluster deletes"
_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
_TEXT = "written by the check of kngd-ray submit"
_SEEN_SECONDS = 15.0  # a network file system shows another machine's files with delay


@dataclass(frozen=True)
class Fault:
    """What would keep the command from its work.

    Attributes:
        sentence: what, where and what to do.
        usage: it is the settings that are wrong.
    """

    sentence: str
    usage: bool = False


@dataclass(frozen=True)
class Preflight:
    """What a cluster said.

    Attributes:
        kngd_ray: version there.
        ray: version there.
        python: its minor version there, ``3.11``.
        nodes: how many were asked.
        faults: what is wrong.
    """

    kngd_ray: str
    ray: str
    python: str
    nodes: int = 0
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Arguments:
    """A command line, as the command line itself has parsed it.

    Attributes:
        command: its name.
        plain: arguments that are no option.
        options: values of the options that were given and have one, by their long name.
    """

    command: str
    plain: list[str]
    options: dict[str, str]


def find_out(given: Arguments) -> Preflight:
    """Look for what a command needs, on the cluster that this process runs on.

    Args:
        given: the command line.

    Returns:
        What was found.
    """
    faults: list[Fault] = []
    nodes = 0
    with _attempt(faults):
        faults += _lost_output(given)
        config, inputs = _needs(given)
        faults += _lost_results(config) if config is not None and given.command in _LOG else []
        if config is not None and not faults:
            with ExitStack() as stack:
                nodes = _ask(given.command, config, inputs, faults, stack)
    python = ".".join(platform.python_version_tuple()[:2])
    return Preflight(__version__, version("ray"), python, nodes, faults)


def probe(reads: Mapping[str, str], folder: str | None, mark: str | None) -> dict[str, Any]:
    """The question to a node.

    Args:
        reads: path of a file or folder by what it is for.
        folder: where results go; None is nowhere.
        mark: file in it that the asking process has written.

    Returns:
        ``unreadable``, reasons by path; ``unwritable``, the reason or None; ``apart``: the folder is not the one of
        the asking process; ``kngd_ray``, the version there.
    """
    unreadable = {path: reason for path in reads if (reason := _unreadable(Path(path).expanduser())) is not None}
    answer: dict[str, Any] = {"unreadable": unreadable, "unwritable": None, "apart": False, "kngd_ray": __version__}
    if folder is None or mark is None:
        return answer
    if unseen(folder, [mark], _TEXT, _SEEN_SECONDS):
        return answer | {"apart": True}
    return answer | {"unwritable": _unwritable(Path(folder))}


def main() -> None:
    """Print what was found, as one line."""
    found = find_out(Arguments(**json.loads(sys.argv[1])))
    sys.stdout.write(json.dumps({MARK: asdict(found)}) + "\n")


def _needs(given: Arguments) -> "tuple[Config | None, dict[str, str]]":
    """The configuration of a command, and what setting names each path that it reads.

    Raises:
        UsageError: a search without its file.
    """
    from kngd_ray.config import load_config
    from kngd_ray.data import EMBEDDED
    from kngd_ray.experiment import run_folder
    from kngd_ray.tuning.file import load_search, resumed_search

    plain, resume = list(given.plain), given.options.get("--resume")
    target = plain.pop(0) if given.command in (*_OF_A_RUN, "encode") and plain else None
    file = Path(plain.pop(0)) if plain and "=" not in plain[0] and given.command != "predict" else None
    if given.command == "train":
        config = run_folder.resumed_config(resume, plain) if resume is not None else load_config(file, plain)
    elif given.command == "tune":
        if resume is None and file is None:
            raise UsageError("name a search, such as noise_priors or a YAML file, or --resume SEARCH.")
        config = (resumed_search(resume, plain) if file is None else load_search(file, plain)).config  # type: ignore[arg-type]
    elif given.command == "encode":
        config = load_config(file, plain, forced={"data": {"path": target}})
    elif target is not None:
        storage = given.options.get("--storage-path") or load_config().trainer.storage_path
        fit = run_folder.find_fit(target, storage)
        run = next(folder for folder in (fit, *fit.parents) if (folder / CONFIG).is_file())
        settings = plain if given.command == "evaluate" else []
        config = run_folder.read_config(run, settings, file if given.command == "evaluate" else None)
        if given.command == "predict":
            what = "features" if config.model.precomputed else "a picture"
            return config, dict.fromkeys(plain, f"{what} to predict")
    else:
        return None, {}
    sources = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    inputs = dict.fromkeys(_files(sources), "data.path") | dict.fromkeys(_files(config.targets), "targets")
    weights = config.model.pretrained
    if weights is not None and Path(weights).suffix in _CHECKPOINTS:
        inputs[weights] = "model.pretrained"
    if config.model.name.startswith("local-dir:"):
        inputs[config.model.name.removeprefix("local-dir:")] = "model.name"
    if config.model.class_embeddings is not None:
        inputs[config.model.class_embeddings] = "model.class_embeddings"
    if config.prior is not None and not resume:
        inputs[str(run_folder.locate(config.prior, config.trainer.storage_path))] = "prior"
    inputs.pop(EMBEDDED, None)
    return config, inputs


def _files(sources: Sequence[str]) -> Iterator[str]:
    """The files of patterns, as this process sees them; every other source as it is."""
    from kngd_ray.data import data_files

    for source in sources:
        yield from map(str, data_files(source)) if has_magic(source) else [source]


def _lost_output(given: Arguments) -> Iterator[Fault]:
    """What would be written to the job's own folder by an option of the command, or by its default."""
    whole = "give the whole path of a place on shared storage."
    for name in _WRITTEN:
        if name in given.options and not Path(given.options[name]).expanduser().is_absolute():
            yield Fault(f"{name} {given.options[name]} {_LOST}: {whole}", usage=True)
    if given.command == "compare" and "--out" not in given.options:
        yield Fault(f"what compare writes without --out {_LOST}: add --out, and {whole}", usage=True)


def _lost_results(config: "Config") -> Iterator[Fault]:
    """What would be written to the job's own folder by the settings."""
    storage, tracking = config.trainer.storage_path, config.tracking
    if not Path(storage).expanduser().is_absolute():
        yield Fault(
            f"trainer.storage_path={storage} {_LOST}: give a folder that all nodes share, as in "
            "trainer.storage_path=/shared/runs, or set KNGD_STORAGE_PATH on the cluster.",
            usage=True,
        )
    if tracking.enabled and _is_relative_database(tracking.uri):
        yield Fault(
            f"tracking.uri={tracking.uri} {_LOST}: give tracking.uri=http://HOST:5000, set MLFLOW_TRACKING_URI on the "
            "cluster, or leave MLflow out by tracking.enabled=false.",
            usage=True,
        )


def _is_relative_database(uri: str) -> bool:
    scheme, _, path = uri.partition("///")
    return scheme.startswith("sqlite") and not path.startswith("/")


def _ask(command: str, config: "Config", inputs: Mapping[str, str], faults: list[Fault], stack: ExitStack) -> int:
    """Put the question to every node, and to the tracking store; returns how many nodes there are."""
    from kngd_ray.cluster.backend import RayBackend
    from kngd_ray.tracking import check_store

    storage = Path(config.trainer.storage_path).expanduser()
    mark = None
    if command in _WRITE_RUNS and storage.is_absolute():
        with _attempt(faults):
            mark = stack.enter_context(_marked(storage))
    if config.trainer.least_workers:
        from kngd_ray.cluster.nodes import ask_nodes

        stack.enter_context(RayBackend().session(config.trainer))
        answers = [(a.node, a.answer, a.error) for a in ask_nodes(probe, inputs, str(storage), mark)]
    else:  # all of the work is done where the job's driver is
        answers = [("the node of the job", probe(inputs, str(storage), mark), None)]
    faults += _faults(answers, inputs, storage)
    cache = _unwritable(config.data.cache_root)
    if cache is not None:
        faults.append(
            Fault(f"the feature cache {config.data.cache_root} cannot be written there ({cache}): set data.cache_dir.")
        )
    if command in _LOG and config.tracking.enabled:
        with _attempt(faults):
            check_store(config.tracking.uri)
    return len(answers)


def _faults(
    answers: Sequence[tuple[str, Mapping[str, Any] | None, str | None]], inputs: Mapping[str, str], storage: Path
) -> Iterator[Fault]:
    """One sentence per thing that is wrong, whichever nodes it is wrong on."""

    def on(nodes: Sequence[str]) -> str:
        return "on any node" if len(nodes) == len(answers) > 1 else f"on {', '.join(nodes)}"

    silent = {node: error for node, _, error in answers if error is not None}
    for node, error in silent.items():
        if "No module named" in error:
            yield Fault(f"{node} cannot run kngd_ray ({error}): install the same packages on every node.")
        else:
            yield Fault(f"{node} did not answer ({error}): see it in Ray's dashboard.")
    given = {node: answer for node, answer, _ in answers if answer is not None}
    for node, answer in given.items():
        if answer["kngd_ray"] != __version__:
            yield Fault(
                f"{node} has kngd_ray {answer['kngd_ray']} and the job's driver {__version__}: install the same "
                "version on every node."
            )
    for path, setting in inputs.items():
        nodes = [node for node, answer in given.items() if path in answer["unreadable"]]
        if nodes:
            reason = given[nodes[0]]["unreadable"][path]
            advice = (
                "put it on storage that all nodes share"
                if Path(path).expanduser().is_absolute()
                else "data is not sent, so put it on storage that all nodes share and give its whole path"
            )
            yield Fault(f"{setting}: {path} cannot be read {on(nodes)} ({reason}): {advice}.")
    apart = [node for node, answer in given.items() if answer["apart"]]
    if apart:
        yield Fault(
            f"trainer.storage_path={storage} is another folder {on(apart)} than where the job runs: give one that all "
            "nodes share."
        )
    for node, answer in given.items():
        if answer["unwritable"] is not None:
            yield Fault(
                f"trainer.storage_path={storage} cannot be written on {node} ({answer['unwritable']}): check its "
                "permissions there."
            )


@contextmanager
def _attempt(faults: list[Fault]) -> Iterator[None]:
    """What is refused becomes a fault."""
    try:
        yield
    except KngdError as error:
        faults.append(Fault(f"{str(error).rstrip('.')}.", usage=isinstance(error, UsageError)))


@contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """A file in the folder of results that every node should see; what had to be made for it is taken away again.

    Raises:
        KngdError: it cannot be written.
    """
    try:
        written = write(str(folder), f".kngd-preflight-{uuid.uuid4().hex}", _TEXT)
    except OSError as error:
        raise KngdError(
            f"trainer.storage_path={folder} cannot be written where the job runs ({error.strerror}): give a folder "
            "that all nodes share and may write to."
        ) from error
    try:
        yield written["name"]
    finally:
        remove(str(folder), [written["name"]], written["made"])


def _unreadable(path: Path) -> str | None:
    """Why a file or folder cannot be read; None if it can."""
    try:
        if path.is_dir():
            next(os.scandir(path), None)
        else:
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be kept in a folder; None if it can: written, read back and deleted."""
    try:
        written = write(str(folder), f".kngd-preflight-{uuid.uuid4().hex}", _TEXT)
    except OSError as error:
        return error.strerror or str(error)
    remove(str(folder), [written["name"]], written["made"])
    return None


if __name__ == "__main__":
    # by its importable name, under which the nodes find it too
    from kngd_ray.cluster.preflight import main as run

    run()
