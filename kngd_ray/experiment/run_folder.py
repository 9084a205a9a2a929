"""The folder of a run: its lock, its name and its fits (:mod:`kngd_ray._run_layout`)."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from kngd_ray._option import option
from kngd_ray._run_layout import CONFIG, FITS, RESULTS, SEARCH, fit_name
from kngd_ray.config import Config, load_config, to_yaml
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import CheckpointError, StorageError, UsageError, closest
from kngd_ray.storage import read_json, storage_errors, take_lock, write_text
from kngd_ray.tracking import redact, resolve_uri

logger = logging.getLogger(__name__)

# what runs did that were kept before these settings were there
_BEFORE = {"data": {"draw": "first", "val": "test"}}


def new_name(method: str) -> str:
    """A run name that sorts by time and does not repeat."""
    return f"{method}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:4]}"


def create(config: Config) -> Path:
    """Make the folder of a new run and keep its configuration.

    Args:
        config: the run's configuration, its name set.

    Returns:
        The folder.

    Raises:
        UsageError: a run of that name exists.
        StorageError: the folder cannot be written.
    """
    assert config.trainer.name is not None
    folder = Path(config.trainer.storage_path).expanduser().resolve() / config.trainer.name
    try:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # created, not written: of two drivers with one name, one is told so
            (folder / CONFIG).touch(mode=0o600, exist_ok=False)
    except StorageError as error:
        if isinstance(error.__cause__, FileExistsError) and (folder / CONFIG).is_file():
            raise UsageError(
                f"the run {config.trainer.name} exists in {folder.parent}: continue it with "
                f"{option('resume', config.trainer.name)}, or give this one another trainer.name."
            ) from error
        raise
    write_text(folder / CONFIG, to_yaml(_settled(config)))
    (folder / CONFIG).chmod(0o600)  # a tracking uri may hold a password
    return folder


def read_config(folder: Path, overrides: Sequence[str] = (), file: Path | None = None) -> Config:
    """The configuration that a run keeps.

    Args:
        folder: of the run.
        overrides: ``key=value`` settings over it.
        file: configuration file over it, or None.

    Returns:
        The configuration.
    """
    return load_config([_BEFORE, folder / CONFIG, *([file] if file is not None else [])], overrides, complete=True)


def resumed_config(name: str, overrides: Sequence[str]) -> Config:
    """The configuration of a run to continue.

    Args:
        name: name or folder of the run.
        overrides: ``key=value`` settings; only where it runs and is logged may change.

    Returns:
        The run's configuration.

    Raises:
        UsageError: a setting that would make it another run, or a search.
    """
    fixed = [text for text in overrides if not text.startswith(("trainer.", "tracking."))]
    if fixed:
        raise UsageError(f"a resumed run keeps its settings: leave out {fixed[0]!r}, or start a new run with it.")
    folder = find(name, load_config(overrides=overrides).trainer.storage_path)
    if (folder / SEARCH).is_file():
        raise UsageError(f"{folder.name} is a search: continue it with kngd-ray tune --resume {folder.name}.")
    config = read_config(folder, overrides)
    return replace(config, trainer=replace(config.trainer, storage_path=str(folder.parent), name=folder.name))


def _settled(config: Config) -> Config:
    """The same configuration with absolute paths, valid in any folder."""
    paths = [config.data.path] if isinstance(config.data.path, str) else list(config.data.path)
    absolute = [_absolute(p) for p in paths]
    data = replace(config.data, path=absolute[0] if isinstance(config.data.path, str) else tuple(absolute))
    tracking = replace(config.tracking, uri=resolve_uri(config.tracking.uri))
    prior = None if config.prior is None else str(locate(config.prior, config.trainer.storage_path))
    targets = tuple(_absolute(p) for p in config.targets)
    model = config.model.absolute()
    return replace(config, prior=prior, data=data, model=model, tracking=tracking, targets=targets)


def _absolute(path: str) -> str:
    """A data set's path from the root on, links as they are: a cache's links have the names that tell splits."""
    return path if path == EMBEDDED else str(Path(path).expanduser().absolute())


def shown(config: Config) -> Config:
    """A configuration as it is logged, without secrets: more people read logs than may use the store."""
    return replace(config, tracking=replace(config.tracking, uri=redact(config.tracking.uri)))


def existing(config: Config) -> Path:
    """The folder of a run to continue.

    Args:
        config: the run's configuration.

    Returns:
        The folder.
    """
    return Path(config.trainer.storage_path) / str(config.trainer.name)


def find(name: str, storage_path: str) -> Path:
    """The folder of an existing run, by name or by path.

    Args:
        name: of the run, or its folder.
        storage_path: where runs live.

    Returns:
        The folder.

    Raises:
        CheckpointError: there is no such run; names the nearest.
    """
    root = Path(storage_path).expanduser()
    for folder in (root / name, Path(name).expanduser()):
        if (folder / CONFIG).is_file():
            return folder.resolve()
    runs = sorted(p.parent.name for p in root.glob(f"*/{CONFIG}"))
    close = closest(name, runs)
    guess = f"; did you mean {close[0]}?" if close else ""
    known = f" (runs there: {', '.join(runs[-8:])})" if runs else ""
    raise CheckpointError(f"there is no run {name} in {root}{guess}{known}.")


def locate(target: str, storage_path: str) -> Path:
    """The folder that a user means.

    Args:
        target: name or folder of a run, or of a search, which stands for its winner's run; folder of a fit or of a
            checkpoint.
        storage_path: where runs live.

    Returns:
        The folder of a run, a fit or a checkpoint.
    """
    from kngd_ray.training.checkpoint import MANIFEST  # which imports torch, that not every reader of a run needs

    path = Path(target).expanduser().resolve()
    inside = (path / MANIFEST).is_file() or path.parent.name == FITS
    if inside and any((parent / CONFIG).is_file() for parent in path.parents[:3]):
        return path
    return _winner(find(target, storage_path))


def _winner(folder: Path) -> Path:
    """The run of a search's winner, or the run itself.

    Raises:
        CheckpointError: a search that has fitted none.
    """
    if not (folder / SEARCH).is_file():
        return folder
    results = folder / RESULTS
    try:
        run = read_json(results)["run"] if results.is_file() else None
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{results} is damaged ({error}): delete it, then continue with kngd-ray tune --resume {folder.name}."
        ) from error
    if not isinstance(run, str):
        raise CheckpointError(
            f"{folder.name} is a search that has not fitted its winner: continue it with kngd-ray tune --resume "
            f"{folder.name}, or fit its champion.yaml with kngd-ray train."
        )
    return find(run, str(folder.parent))


def fit_of(run: Path, method: str, seed: int) -> Path:
    """The folder of a fit in a run.

    Args:
        run: folder of the run.
        method: of the fit.
        seed: of the fit.

    Returns:
        The folder.

    Raises:
        CheckpointError: it was not begun.
    """
    fit = run / FITS / fit_name(method, seed)
    if not fit.is_dir():
        how = option("resume", run.name)
        raise CheckpointError(f"the run {run.name} has no finished fit yet: continue it with {how}.")
    return fit


def check_place(key: str) -> None:
    """Refuse to look for a run where a setting says that others are written.

    Args:
        key: of a setting beside the name of a run.

    Raises:
        UsageError: it is the folder of all runs.
    """
    if key == "trainer.storage_path":
        raise UsageError(f"{key} is where runs are written: name the folder of the run with {option('storage_path')}.")


def find_fit(target: str, storage_path: str) -> Path:
    """The fit that a user means by a run, a fit's folder or a checkpoint's.

    Args:
        target: name or folder of a run (its first fit is taken), folder of a fit or of a checkpoint.
        storage_path: where runs live.

    Returns:
        The folder of the fit or checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    place = locate(target, storage_path)
    if not (place / CONFIG).is_file():
        return place
    config = read_config(place)
    return fit_of(place, config.method, config.seeds[0])


class DrivenElsewhereError(UsageError):
    """Another process drives the run."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run against a second driver until done; the lock goes with the process.

    Args:
        folder: of the run.

    Yields:
        Nothing.

    Raises:
        DrivenElsewhereError: another process drives the run.
    """
    with storage_errors(folder):
        file = (folder / ".lock").open("w")
    with file:
        try:
            ours = take_lock(file, folder)
        except StorageError as error:  # one driver needs none
            logger.warning("%s Until then see that nothing else drives this run", error)
            ours = True
        if not ours:
            raise DrivenElsewhereError(
                f"the run {folder.name} is being driven by another process: wait for it or stop it."
            )
        yield
