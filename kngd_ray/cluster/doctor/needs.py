"""What a command needs of the machines that it runs on: files to read, folders to write, a tracking store."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from kngd_ray._run_layout import CONFIG, IN_MEMORY, SUBMITTED
from kngd_ray.config import Config
from kngd_ray.data import EMBEDDED, data_files
from kngd_ray.errors import UsageError
from kngd_ray.experiment import run_folder

_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
_LOCAL_MODEL = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a command needs.

    Attributes:
        config: its configuration; None if it takes none.
        inputs: the setting or argument that names each path that it reads.
        outputs: paths that it writes besides its run, by the option that names them; None where a default puts them
            into the current folder.
        writes_runs: it writes to ``trainer.storage_path``.
        logs: it logs to the tracking store.
    """

    config: Config | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, Path | None] = field(default_factory=dict)
    writes_runs: bool = False
    logs: bool = False

    def check_kept(self) -> None:
        """Refuse results that a submitted job would lose.

        Raises:
            UsageError: they would be written to the job's working folder.
        """
        if os.environ.get(SUBMITTED) and (lost := [*self._lost()]):
            raise UsageError(
                f"{' and '.join(lost)} would be written to the job's working folder, which the cluster deletes: give "
                f"{'absolute paths' if len(lost) > 1 else 'an absolute path'} on storage that all nodes share."
            )

    def _lost(self) -> Sequence[str]:
        found = [
            f"the output of {option}" if path is None else f"{option} {path}"
            for option, path in self.outputs.items()
            if path is None or not path.expanduser().is_absolute()
        ]
        if self.config is None:
            return found
        storage, tracking = self.config.trainer.storage_path, self.config.tracking
        if self.writes_runs and not Path(storage).expanduser().is_absolute():
            found.append(f"trainer.storage_path={storage} (or $KNGD_STORAGE_PATH on the cluster)")
        if self.logs and tracking.enabled and _is_relative_database(tracking.uri):
            found.append(f"tracking.uri={tracking.uri} (or $MLFLOW_TRACKING_URI on the cluster)")
        return found


def needs_of_run(config: Config, *, resumed: bool = False, writes: bool = True) -> Needs:
    """What a run needs.

    Args:
        config: of the run.
        resumed: it is continued, and has its prior in its folder.
        writes: it writes and logs a run.

    Returns:
        Its needs.
    """
    sources = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    inputs = dict.fromkeys(_files(sources), "data.path") | dict.fromkeys(_files(config.targets), "targets")
    model = config.model
    if model.pretrained is not None and Path(model.pretrained).suffix in _CHECKPOINTS:
        inputs[model.pretrained] = "model.pretrained"
    if model.name.startswith(_LOCAL_MODEL):
        inputs[model.name.removeprefix(_LOCAL_MODEL)] = "model.name"
    if model.class_embeddings is not None:
        inputs[model.class_embeddings] = "model.class_embeddings"
    if config.prior is not None and not resumed:
        inputs[str(run_folder.locate(config.prior, config.trainer.storage_path))] = "prior"
    for name in (EMBEDDED, IN_MEMORY):
        inputs.pop(name, None)
    return Needs(config=config, inputs=inputs, writes_runs=writes, logs=writes)


def _files(sources: Sequence[str]) -> Iterator[str]:
    """The files that patterns match here; every other source unchanged."""
    for source in sources:
        yield from map(str, data_files(source)) if has_magic(source) else [source]


def config_of_fit(target: str, storage_path: str, overrides: Sequence[str] = (), file: Path | None = None) -> Config:
    """The configuration that a fit was made with.

    Args:
        target: name or folder of a run, or the folder of a fit or a checkpoint.
        storage_path: where runs are stored.
        overrides: settings over it.
        file: configuration file over it.

    Returns:
        The configuration.
    """
    fit = run_folder.find_fit(target, storage_path)
    run = next(folder for folder in (fit, *fit.parents) if (folder / CONFIG).is_file())
    return run_folder.read_config(run, overrides, file)


def _is_relative_database(uri: str) -> bool:
    scheme, _, path = uri.partition("///")
    return scheme.startswith("sqlite") and not path.startswith("/")
