"""Arguments of the public functions, turned into configurations, folders and consoles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kngd_ray._keywords import names_setting
from kngd_ray._layered import flat
from kngd_ray._option import option
from kngd_ray._run_layout import DEFAULT_STORAGE
from kngd_ray.config import Config, load_config, parse_override
from kngd_ray.configs import names, read_yaml
from kngd_ray.console import Display
from kngd_ray.errors import UsageError
from kngd_ray.training.effect import ignored

if TYPE_CHECKING:
    from kngd_ray.tuning.file import SearchConfig

Named = str | os.PathLike[str]

_LOCAL = "trainer.num_workers=0"


def configured(
    preset: Named | Mapping[str, Any] | None, overrides: Sequence[str] = (), resume: Named | None = None
) -> Config:
    """The configuration of a run, new or continued, as :func:`train` takes it.

    Args:
        preset: name of a preset or a method, YAML file, or mapping of settings.
        overrides: ``key=value`` settings over it.
        resume: a run that is to be continued.

    Returns:
        The configuration.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
    """
    preset, overrides = split(preset, overrides)
    if resume is not None:
        if preset is not None:
            raise UsageError(f"a resumed run keeps its settings: leave out {preset}.")
        from kngd_ray.experiment.run_folder import resumed_config

        return resumed_config(os.fspath(resume), overrides)
    return load_config(source_of(preset), overrides)


def configured_search(
    search: Named | None, overrides: Sequence[str] = (), resume: Named | None = None
) -> "SearchConfig":
    """The search, new or continued, as :func:`tune` takes it.

    Args:
        search: name of a shipped search, or YAML file.
        overrides: ``key=value`` settings over it.
        resume: a search that is to be continued.

    Returns:
        The search.

    Raises:
        UsageError: a setting is unknown or has a wrong value, or no search is named.
    """
    from kngd_ray.tuning.file import load_search, resumed_search

    search, overrides = split(search, overrides)
    if resume is not None:
        if search is not None:
            raise UsageError(f"a continued search keeps its settings: leave out {search}.")
        return resumed_search(os.fspath(resume), overrides)
    if not isinstance(search, (str, os.PathLike)):
        raise UsageError(f"name a search, such as noise_priors or a YAML file, or {option('resume', 'SEARCH')}.")
    return load_search(os.fspath(search), overrides)


def configured_encoding(data: Named, preset: Named | Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of :func:`kngd_ray.encode`.

    Args:
        data: what is encoded; ``data.path=`` may be before it, as in the settings of other commands.
        preset: name of a preset, YAML file or mapping of settings.
        overrides: ``key=value`` settings over it.

    Returns:
        The configuration.
    """
    return load_config(
        source_of(preset), overrides, forced={"data": {"path": os.fspath(data).removeprefix("data.path=")}}
    )


@overload
def split(given: Named | None, overrides: Sequence[str]) -> tuple[Named | None, list[str]]: ...


@overload
def split(
    given: Named | Mapping[str, Any] | None, overrides: Sequence[str]
) -> tuple[Named | Mapping[str, Any] | None, list[str]]: ...


def split(
    given: Named | Mapping[str, Any] | None, overrides: Sequence[str]
) -> tuple[Named | Mapping[str, Any] | None, list[str]]:
    """Separate a preset or a file from the settings; it may be the first of them."""
    if isinstance(given, str) and "=" in given:
        return None, [given, *overrides]
    if given is None and overrides and "=" not in overrides[0]:
        return overrides[0], list(overrides[1:])
    return given, list(overrides)


def source_of(preset: Named | Mapping[str, Any] | None) -> Path | Mapping[str, Any] | None:
    """What a configuration is built from: a file, a mapping, or the name of a preset."""
    if preset is None or isinstance(preset, Mapping):
        return preset
    path = Path(preset)
    shipped = preset in names("presets") and not path.is_file()
    if not shipped and (isinstance(preset, os.PathLike) or path.suffix in {".yaml", ".yml"} or path.exists()):
        return path
    return {"preset": os.fspath(preset)}


def in_process(settings: list[str], source: Any, *, ray: bool) -> list[str]:
    """Add ``trainer.num_workers=0``, unless Ray is asked for or the settings or a file set the workers."""
    if ray or names_setting(settings, "trainer.num_workers"):
        return settings
    layer = _content(source)
    trainer = layer.get("trainer")
    if "trainer.num_workers" in layer or (isinstance(trainer, Mapping) and "num_workers" in trainer):
        return settings
    return [_LOCAL, *settings]


def _content(source: Any) -> Mapping[str, Any]:
    """The settings of a file or a mapping."""
    layer = source_of(source)
    return (read_yaml(layer) if isinstance(layer, Path) else layer) or {}


def notes_of_ignored(config: Config, settings: Sequence[str], source: Any = None) -> list[str]:
    """What to say of settings that change nothing.

    Args:
        config: that they are a part of.
        settings: as they were given.
        source: of the settings below them. Those may be meant for runs of other methods, unless such methods are
            baselines here, which do not take them.

    Returns:
        A sentence for each, without its full stop.
    """
    given = [key for text in settings for key, _ in flat(dict([parse_override(text)]), "")]
    shared = [key for key, _ in flat(_content(source), "") if key] if config.baselines else []
    notes = []
    found = ignored(
        config.fit_options, config.posterior, [*shared, *given], protocol=config.protocol, prior=config.prior
    )
    for key, cause in found.items():
        of_method = cause.startswith("method")
        others = ", and baselines keep their own presets" if config.baselines and of_method else ""
        if key in given or of_method:
            notes.append(f"{key} has no effect with {cause}{others}")
    return notes


def target_of(run: Any) -> str:
    """The folder of a result, or the name of a run.

    Raises:
        UsageError: it is neither.
    """
    named = getattr(run, "folder", run)
    if not isinstance(named, (str, os.PathLike)):
        raise UsageError(
            f"a run is needed, and what was given is of type {type(run).__name__}: give the name or folder of a run, or"
            " a result."
        )
    return os.fspath(named)


def storage_of(given: Named | None) -> str:
    """The folder of all runs; None is the default of ``trainer.storage_path``."""
    return os.environ.get("KNGD_STORAGE_PATH") or DEFAULT_STORAGE if given is None else os.fspath(given)


def console_of(console: Display | None, quiet: bool) -> Display:
    """The console that was given, or a new one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return Display(quiet=quiet) if console is None else console
