"""The settings of a search: those of ``kngd-ray train``, and also ``search`` and ``space``.

A search file is a configuration file with two more keys. On the command line ``search.num_samples=60`` sets an option
of the search, and ``space.epochs={low: 1, high: 8, integer: true}`` a dimension; ``space.epochs=null`` drops one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kngd_ray import configs
from kngd_ray._layered import plain
from kngd_ray._run_layout import SEARCH
from kngd_ray.config import Config, load_config, parse, parse_override, to_yaml
from kngd_ray.errors import CheckpointError, UsageError, nearest
from kngd_ray.experiment import run_folder
from kngd_ray.storage import write_text
from kngd_ray.tuning import SearchOptions, Space, Value, parse_space, plain_space

_POINTS = "points"  # of the first trials, in the file of a search that was begun
# What may change when a search is continued: how long and where it runs, not what it does.
_CONTINUED = ("num_samples", "max_failures", "concurrency", "cpus_per_trial")


@dataclass(frozen=True)
class SearchConfig:
    """A search.

    Attributes:
        config: what trials start from, and how the winner is fitted.
        options: objectives, sampler, trials.
        space: what is searched.
        points: values of the first trials, by dotted key.
        notes: what is to be said of first trials that are not quite the presets that they start from, in sentences.
    """

    config: Config
    options: SearchOptions
    space: Space
    points: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()


def load_search(file: str | Path, overrides: Sequence[str]) -> SearchConfig:
    """Read a search.

    Args:
        file: name of a shipped search, or a YAML file.
        overrides: ``key=value`` settings over it.

    Returns:
        The search, checked as far as that goes without its data.

    Raises:
        UsageError: unknown key, bad value, empty range, or an objective that the method does not have.
    """
    raw = _read(str(file))
    options, space = _mapping(raw, "search", file), _mapping(raw, "space", file)
    if not space and not any(text.startswith("space.") for text in overrides):
        raise UsageError(f"{file} has no space: name the settings to search, as the shipped noise_priors does.")
    rest = []
    for text in overrides:
        key, value = parse_override(text)
        head, _, name = key.partition(".")
        if head not in ("search", "space"):
            rest.append(text)
            continue
        if not name:
            raise UsageError(f"{text!r} changes the whole of {head}: name one of its settings, as {head}.KEY=VALUE.")
        if head == "search":
            options[name] = value
        elif value is not None:
            space[name] = value
        elif space.pop(name, None) is None:
            raise UsageError(f"{text!r} drops what the space does not have{nearest(name, list(space))}.")
    config = load_config({key: value for key, value in raw.items() if key not in ("search", "space", _POINTS)}, rest)
    return _checked(config, _options(options), parse_space(space))


def save_search(folder: Path, search: SearchConfig) -> None:
    """Save a search in its folder, beside its configuration.

    Args:
        folder: of the search.
        search: the search.
    """
    points = to_yaml({_POINTS: [dict(point) for point in search.points]})  # their presets may change, or go
    write_text(folder / SEARCH, search_yaml(search) + points)


def search_yaml(search: SearchConfig) -> str:
    """Options and space of a search as YAML."""
    return to_yaml({"search": plain(search.options), "space": plain_space(search.space)})


def resumed_search(name: str, overrides: Sequence[str]) -> SearchConfig:
    """A search to continue.

    Args:
        name: name or folder of the search.
        overrides: ``key=value`` settings; only how long and where it runs, and where it is logged, may change.

    Returns:
        The search.

    Raises:
        CheckpointError: there is no such search.
        UsageError: a setting that would make it another search.
    """
    own = tuple(f"search.{key}=" for key in _CONTINUED)
    fixed = [text for text in overrides if not text.startswith(("trainer.", "tracking.", *own))]
    if fixed:
        raise UsageError(
            f"a continued search keeps its settings: leave out {fixed[0]!r}, or start a new search with it "
            f"(search.{', search.'.join(_CONTINUED)}, trainer.* and tracking.* may change)."
        )
    about_run = [text for text in overrides if not text.startswith("search.")]
    folder = run_folder.find(name, load_config(overrides=about_run).trainer.storage_path)
    if not (folder / SEARCH).is_file():
        raise CheckpointError(f"{folder.name} is not a search: continue it with kngd-ray train --resume {folder.name}.")
    raw = configs.read_yaml(folder / SEARCH)
    options = _mapping(raw, "search", folder / SEARCH)
    given = dict(map(parse_override, overrides))
    options |= {key.removeprefix("search."): value for key, value in given.items() if key.startswith("search.")}
    config = run_folder.read_config(folder, about_run)
    config = replace(config, trainer=replace(config.trainer, storage_path=str(folder.parent), name=folder.name))
    space, asked = parse_space(_mapping(raw, "space", folder / SEARCH)), _options(options)
    points = raw.get(_POINTS)
    if not isinstance(points, list) or not all(isinstance(point, Mapping) for point in points):
        return _checked(config, asked, space, begun=True)  # of an earlier version, which kept none
    found = _checked(config, replace(asked, start=None), space, begun=True)
    return replace(found, options=asked, points=points)


def _read(name: str) -> dict[str, Any]:
    """Read a shipped search by name, or a YAML file by path.

    Raises:
        UsageError: there is none.
    """
    shipped = configs.names("searches")
    if name in shipped and not Path(name).is_file():
        return configs.parse_yaml(configs.text("searches", name), f"search {name}")
    if name.endswith((".yaml", ".yml")) or Path(name).exists():
        return configs.read_yaml(Path(name))
    raise UsageError(f"there is no search {name!r}{nearest(name, shipped)}; name one of these or a YAML file.")


def _checked(config: Config, options: SearchOptions, space: Space, *, begun: bool = False) -> SearchConfig:
    if config.protocol == "stream" and options.cross_validated:
        raise UsageError(
            "search.objective names held-out shots, and protocol=stream is scored as it arrives: use evidence."
        )
    if config.method != "kalman" and "evidence" in options.objective and config.protocol != "stream":
        raise UsageError(
            f"search.objective is evidence, which {config.method} does not have: use held_out_nll or held_out_accuracy."
        )
    if options.cross_validated and config.posterior.folds < 2:
        raise UsageError("search.objective needs held-out shots, and posterior.folds is 0: set posterior.folds=4.")
    if config.prior is not None:
        raise UsageError("prior is set, and every trial of a search starts from CLIP's own weights: leave it out.")
    if options.trial == "train" and not config.trainer.num_workers:
        raise UsageError("search.trial is train, and trainer.num_workers is 0: give its jobs at least one worker.")
    if options.scheduler == "asha" and not config.trainer.num_workers:
        raise UsageError(
            "search.scheduler is asha, which needs Ray, and trainer.num_workers is 0: set it to 1 or more."
        )
    space.check(config, begun=begun)
    _check_dimensions(config, options, space)
    presets = _presets(config, options)
    points = [space.point(preset) for preset in presets]
    notes = [] if begun else _notes(space, presets, points)
    if options.start is not None:  # the same presets from whatever folder the search is continued
        start = tuple(name if name in configs.names("presets") else str(Path(name).resolve()) for name in options.start)
        options = replace(options, start=start)
    return SearchConfig(config, options, space, points, notes)


def _check_dimensions(config: Config, options: SearchOptions, space: Space) -> None:
    """Refuse dimensions that the objectives cannot judge.

    Raises:
        UsageError: one that they do not look at, or that changes what they are taken from or what is learned from.
    """
    streams = config.protocol == "stream"  # judged by all that is predicted, tau included, whatever the batches are
    for key in (dimension.key for dimension in space.dimensions):
        if key == "tune.parameters":
            raise UsageError(
                "space.tune.parameters would have trials learn from features and from pictures: a search keeps "
                "tune.parameters; set it for all trials, or run a search for each."
            )
        if key.startswith(("posterior", "tune.alpha")) and not options.cross_validated and not streams:
            raise UsageError(
                f"space.{key} has no effect with search.objective=evidence: take held_out_nll, or leave it out."
            )
        if key == "batch_size" and "evidence" in options.objective and not streams:
            raise UsageError(
                "space.batch_size would score trials on different shots, as evidence counts the later half of "
                "the batches: take search.objective=held_out_nll, or leave it out."
            )


def _presets(config: Config, options: SearchOptions) -> list[Config]:
    """What a search starts from.

    Raises:
        UsageError: there is no such preset.
    """
    if options.start is None:
        return [config]
    try:
        return [load_config(forced={"method": config.method, "preset": name}) for name in options.start]
    except UsageError as error:
        raise UsageError(f"search.start: {error}") from error


def _notes(space: Space, presets: Sequence[Config], points: Sequence[Mapping[str, Value]]) -> list[str]:
    notes = []
    for number, (preset, point) in enumerate(zip(presets, points, strict=True)):
        named = f"trial {number} is not quite the preset {Path(str(preset.preset)).stem}"
        if moved := space.moved(preset, point):
            told = ", ".join(f"{key}={point[key]} for {before}" for key, before in moved.items())
            notes.append(f"{named}: it has {told}, the nearest in the space")
        if left := space.open_at(point):
            notes.append(f"{named}, which has no value of the space for {', '.join(left)}: the sampler chooses one")
    return notes


def _options(raw: Mapping[str, Any]) -> SearchOptions:
    # `search.seeds=` is null, as all that is empty in YAML: of a list, that it names nothing
    given = {key: [] if value is None and key in ("objective", "seeds") else value for key, value in raw.items()}
    try:
        return parse(SearchOptions, given)
    except UsageError as error:
        raise UsageError(f"search: {error}") from error


def _mapping(raw: Mapping[str, Any], key: str, place: str | Path) -> dict[str, Any]:
    value = {} if raw.get(key) is None else raw[key]
    if not isinstance(value, Mapping):
        raise UsageError(f"{place}: {key} must hold `key: value` settings, and is {value!r}.")
    return dict(value)
