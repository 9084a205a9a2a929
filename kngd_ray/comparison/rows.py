"""From MLflow runs to the rows of a comparison: grouping by method, comparability, names.

A row is one method of one run: its parent run and a child per seed, or one run alone. Rows are put in one group
when they learned from the same data and were scored on the same thing. Of the data, the digest tells that a run logs
as its input; runs of earlier versions have none, and none to be held against. Of the rest, CLIP's own zero-shot
figures tell: every run logs them, and they agree on a seed only if model, prompts, shots and test pictures do. Runs
without a common seed, and those without class embeddings, have their settings for it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kngd_ray.clip import PRECOMPUTED
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import UsageError, closest
from kngd_ray.experiment.aggregate import CHANCE, ZERO_SHOT
from kngd_ray.tracking import LoggedRun, without_reading

_PREFIX = "zero_shot/"
_OF_STREAM, _BATCH = ("stream/accuracy", "stream/nll"), "stream/batch/"
_OF_TARGETS = "protocol/targets/"  # figures of other data sets, which a run may or may not be tested on besides
_SAME = 1e-4  # relative; the same pictures on another device give figures that differ in rounding
_NAMED = 8  # runs that a message lists at most
_WHERE = ("trainer.", "tracking.", "data.", "model.")  # settings that say where a run ran, or what its group is
_IDENTITY = {"method", "preset", "seeds", "baselines"}
_NOT_TASK = {"data.cache_dir", "data.on_bad_image"}
# which runs of earlier versions do not have
_LATER = {"model.class_embeddings", "model.logit_scale", "data.order", "data.time"}
_COLUMNS = "data.columns."  # which they do not have either; those that are called as they are by default say nothing


@dataclass
class Row:
    """One method of one run.

    Attributes:
        id: MLflow's id of the run; empty for CLIP as it is.
        run: its name in MLflow.
        method: the optimiser, or ``zero-shot``.
        preset: the preset that it started from.
        params: settings.
        seeds: metrics by seed, of the fits that came to their end.
        unfinished: fits that did not, by their status.
        name: what tells it from the other rows.
        data: digest of the data set that it learns from; None where it did not say.
        one_support: all its seeds learned from the same shots.
    """

    id: str
    run: str
    method: str
    preset: str
    params: Mapping[str, str]
    seeds: dict[int, Mapping[str, float]]
    unfinished: Counter[str] = field(default_factory=Counter)
    name: str = ""
    data: str | None = None
    one_support: bool = False

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed, where it was logged."""
        return {seed: metrics[metric] for seed, metrics in sorted(self.seeds.items()) if metric in metrics}

    @property
    def task(self) -> dict[str, str]:
        """Settings that decide which data a run is scored on."""
        task = {k: v for k, v in self.params.items() if k.startswith(("data.", "model.")) and k not in _NOT_TASK}
        task = {k: v for k, v in task.items() if k not in _LATER or v != "None"}
        task = {k: v for k, v in task.items() if not k.startswith(_COLUMNS) or v != k.removeprefix(_COLUMNS)}
        if task.get("data.path") == EMBEDDED and task.get("data.train_domain") == "None":
            task["data.train_domain"] = "noto"  # which None stands for there
        if self.params.get("protocol") in {"bng", "stream"}:
            task["protocol"] = self.params["protocol"]  # of half of the classes; of shots that come one after another
        return task

    @property
    def stream(self) -> tuple[str | None, str | None] | None:
        """What decides the order of a stream, which zero-shot figures ignore; None if the run is no stream."""
        if self.params.get("protocol") != "stream":
            return None
        return self.params.get("data.order"), self.params.get("data.time")

    @property
    def targets(self) -> str | None:
        """Data sets that it is tested on besides its own; None if there are none."""
        return self.params.get("targets") if self.params.get("protocol") == "cdg" else None

    @property
    def on_features(self) -> bool:
        """Whether it learned from precomputed features: their digest is not that of the pictures."""
        return self.params.get("model.name") == PRECOMPUTED

    @property
    def knows_nothing(self) -> bool:
        """Whether it started without class embeddings: then zero-shot figures say nothing of the data."""
        return self.on_features and self.params.get("model.class_embeddings", "None") == "None"


@dataclass(frozen=True)
class Found:
    """What an experiment holds.

    Attributes:
        rows: methods with at least one finished fit; of a search, its finished trials.
        search: the search that the rows are trials of, if they are.
        left_out: why runs are no part of the rows, and how many.
    """

    rows: list[Row]
    search: LoggedRun | None
    left_out: Counter[str]


def find_rows(runs: Sequence[LoggedRun], parent: str | None) -> Found:
    """Sort an experiment's runs into rows.

    Args:
        runs: all of them, the oldest first.
        parent: id or name of an MLflow run, or name of a run of ``kngd-ray train``: only what belongs to it. None is
            every method, without searches.

    Returns:
        The rows, the oldest first.

    Raises:
        UsageError: there is no such parent.
    """
    chosen = set(by_name(runs, parent)) if parent is not None else None
    searches = {run.id: run for run in runs if _kind(run) == "search"}
    for id in chosen or ():
        if id in searches:
            return _trials(runs, searches[id])
    owners = {run.id: run for run in runs if _owns(run)}
    rows: dict[str, Row] = {}
    left_out: Counter[str] = Counter()
    children: dict[str, list[LoggedRun]] = {}
    for run in runs:
        if not _owns(run):
            children.setdefault(str(run.parent), []).append(run)
    for id in dict.fromkeys([*owners, *children]):
        owner = owners.get(id)
        kind = _kind(owner) if owner else "fit"
        fits = children.get(id, [])
        wanted = chosen is None or id in chosen or any(fit.id in chosen for fit in fits)
        if kind in {"search", "trial"}:
            left_out["trials of searches"] += wanted and kind == "trial"
        elif not wanted:
            continue
        elif "kngd_ray.method" not in (owner or fits[0]).tags:
            left_out["runs that are not kngd-ray's"] += 1 + len(fits)
        else:
            row = _row(owner, fits or [owner or fits[0]])
            hidden = sum(len(_prequential(fit.metrics)) < len(fit.metrics) for fit in fits or [owner or fits[0]])
            left_out["prequential figures of fits of an earlier version, which were those of the last batch"] += hidden
            left_out.update({f"unfinished fits ({status})": n for status, n in row.unfinished.items()})
            if row.seeds:
                rows[id] = row
    return Found(list(rows.values()), None, +left_out)


def by_name(runs: Sequence[LoggedRun], name: str) -> list[str]:
    """Ids of the runs that a person means: by id, by MLflow's name, or by the name of the run that logged them.

    Args:
        runs: all of them.
        name: what was given.

    Returns:
        One or more ids.

    Raises:
        UsageError: there is none; names the nearest.
    """
    by_id = [run.id for run in runs if run.id == name]
    by_own = [run.id for run in runs if run.name == name]
    found = by_id or by_own or [run.id for run in runs if run.tags.get("kngd_ray.run") == name]
    if found:
        return found
    tops = [run for run in runs if _owns(run) and _kind(run) != "trial"]
    known = sorted({str(run.tags.get("kngd_ray.run", run.name)) for run in tops} | {run.name for run in tops})
    raise UsageError(f"there is no run {name!r} in the experiment{hint(name, known)}.")


def hint(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest names, and the first few that exist."""
    guess = "".join(f"; did you mean {match}?" for match in closest(name, known))
    more = ", ..." if len(known) > _NAMED else ""
    return f"{guess} (there: {', '.join(known[:_NAMED])}{more})" if known else guess


def group_rows(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that were scored on the same data, see above.

    Args:
        rows: the oldest first.

    Returns:
        The groups, each with CLIP as it is as its first row where it was logged.
    """
    groups: list[list[Row]] = []
    for row in rows:
        home = next((group for group in groups if all(_comparable(row, other) for other in group)), None)
        if home is None:
            groups.append([row])
        else:
            home.append(row)
    for group in groups:
        zero_shot: dict[int, Mapping[str, float]] = {}
        for row in group:
            for seed in row.seeds:
                if figures := _zero_shot(row, seed):  # of another row's targets too
                    zero_shot[seed] = {**zero_shot.get(seed, {}), **figures}
        if zero_shot:
            digest = next((row.data for row in group if row.data is not None), None)
            shown = Row("", ZERO_SHOT, ZERO_SHOT, ZERO_SHOT, group[0].params, zero_shot, data=digest)
            group.insert(0, shown)
        # they learned from the same shots by seed: what one knows of them holds for those of earlier versions
        alike = any(row.one_support for row in group)
        for row in group:
            row.one_support = alike
    return groups


def name_rows(rows: Sequence[Row]) -> list[str]:
    """Give every row of a group a unique name: method, preset, and the settings in which it differs.

    Args:
        rows: a group; their ``name`` is set.

    Returns:
        Per method and preset, the settings that a name leaves out because most of its rows have them.
    """
    families: dict[str, list[Row]] = {}
    for row in rows:
        preset = "" if row.preset in {row.method, "None"} else f" {Path(row.preset).stem}"
        method = CHANCE if row.method == ZERO_SHOT and row.knows_nothing else row.method
        families.setdefault(f"{method}{preset}", []).append(row)
    unsaid = []
    for family, members in families.items():
        usual = {key: Counter(row.params.get(key) for row in members).most_common(1)[0][0] for key in varied(members)}
        for row in members:
            row.name = " ".join([family, *settings(row, [key for key in usual if row.params.get(key) != usual[key]])])
        everywhere = [key for key in usual if all(key in row.params for row in members)]
        said = [f"{key}={_short(key, str(usual[key]))}" for key in everywhere]
        if said:
            unsaid.append(f"{family}: {', '.join(said)}, unless the name says otherwise")
    for attribute in ("run", "id"):
        often = Counter(row.name for row in rows)
        for row in rows:
            if often[row.name] > 1 and row.id:
                row.name = f"{row.name} ({getattr(row, attribute)})"
    return unsaid


def varied(rows: Sequence[Row]) -> list[str]:
    """Settings of methods that are not the same in all rows, in the order of the configuration."""
    keys = dict.fromkeys(key for row in rows for key in row.params)
    return [
        key
        for key in keys
        if key not in _IDENTITY and not key.startswith(_WHERE) and len({row.params.get(key) for row in rows}) > 1
    ]


def settings(row: Row, keys: Sequence[str]) -> list[str]:
    """Some settings of a row as ``key=value``, without those that it does not have."""
    return [f"{key}={_short(key, row.params[key])}" for key in keys if key in row.params]


def _kind(run: LoggedRun) -> str:
    """``search``, ``trial``, ``method`` or ``fit``; runs of earlier versions do not say."""
    said = run.tags.get("kngd_ray.kind")
    return said or ("method" if run.parent is None else "fit")


def _owns(run: LoggedRun) -> bool:
    return _kind(run) != "fit" or run.parent is None


def _row(owner: LoggedRun | None, fits: Sequence[LoggedRun]) -> Row:
    first = owner or fits[0]  # of a parent that was deleted, its children speak
    seeds: dict[int, Mapping[str, float]] = {}
    unfinished: Counter[str] = Counter()
    for fit in fits:
        seed = fit.params.get("seeds", "")
        if fit.status != "FINISHED":
            unfinished[fit.status.lower()] += 1
        elif not seed.isdigit():
            unfinished["without a seed"] += 1
        else:
            seeds[int(seed)] = _prequential(fit.metrics)
    tags = first.tags
    name = first.name if owner else first.name.rpartition("-seed")[0] or first.name
    method, preset = tags["kngd_ray.method"], tags.get("kngd_ray.preset", "None")
    digest = next((run.data for run in (first, *fits) if run.data is not None), None)
    return Row(
        first.id,
        name,
        method,
        preset,
        first.params,
        seeds,
        unfinished,
        data=digest,
        one_support="kngd_ray.one_support" in tags,
    )


def _prequential(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Metrics of a fit, without those of a stream that an earlier version logged: the last batch's took their names."""
    whole = [name for name in metrics if name in _OF_STREAM]
    if not whole or f"{_BATCH}size" in metrics:
        return metrics
    return {name: value for name, value in metrics.items() if name not in whole}


def _trials(runs: Sequence[LoggedRun], search: LoggedRun) -> Found:
    """The finished trials of a search as rows of one artificial seed: trials cannot be paired."""
    left_out: Counter[str] = Counter()
    rows = []
    for run in runs:
        if run.parent != search.id or _kind(run) not in {"trial", "fit"}:
            continue
        seeds: dict[int, Mapping[str, float]] = {0: run.metrics}
        if run.status == "FINISHED":
            rows.append(Row(run.id, run.name, run.tags.get("kngd_ray.method", ""), "", run.params, seeds))
        else:
            left_out[f"unfinished trials ({run.status.lower()})"] += 1
    keys = varied(rows)
    for row in rows:
        row.name = " ".join([row.run.rpartition("/")[2], *settings(row, keys)])
    return Found(rows, search, left_out)


def _comparable(row: Row, other: Row) -> bool:
    common = row.seeds.keys() & other.seeds.keys()
    figures = [(_zero_shot(row, seed), _zero_shot(other, seed)) for seed in common]
    known = [(a, b) for a, b in figures if a and b]
    shots = row.params.get("data.shots") == other.params.get("data.shots")
    same_data = _same_data(row, other)
    if row.stream != other.stream or same_data is False:
        return False
    if not known or row.knows_nothing or other.knows_nothing:
        tasks = [without_reading(each.task) if same_data else each.task for each in (row, other)]
        both = None not in (row.targets, other.targets)
        return tasks[0] == tasks[1] and (not both or row.targets == other.targets)
    return shots and all(_agree(a, b) for a, b in known)


def _agree(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether zero-shot figures are of the same thing; those of targets do not count where one row has none."""
    if not all(any(key.startswith(_OF_TARGETS) for key in figures) for figures in (a, b)):
        a, b = ({k: v for k, v in figures.items() if not k.startswith(_OF_TARGETS)} for figures in (a, b))
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=_SAME, abs_tol=_SAME) for k in a if _exact(k))


def _same_data(row: Row, other: Row) -> bool | None:
    """Whether two rows learned from the same data; None where their digests cannot tell."""
    if row.data is None or other.data is None or row.on_features != other.on_features:
        return None
    return row.data == other.data


def _exact(metric: str) -> bool:
    """Whether rounding cannot make a figure jump, as it does to one that counts pictures or bins."""
    return metric.endswith(("nll", "brier"))


def _zero_shot(row: Row, seed: int) -> dict[str, float]:
    metrics = row.seeds[seed]
    return {name.removeprefix(_PREFIX): value for name, value in metrics.items() if name.startswith(_PREFIX)}


def _short(key: str, value: str) -> str:
    """A setting's value in a name: of a path its end, of a drawn number four digits."""
    if key == "prior":
        return Path(value).name
    try:
        return f"{float(value):.4g}" if len(value) > 7 else value
    except ValueError:
        return value
