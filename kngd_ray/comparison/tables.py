"""The tables of a comparison: figures, paired differences, the Pareto front, and headlines in plain words."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kngd_ray._option import option
from kngd_ray.clip import EMBEDDED_MODEL, PRECOMPUTED
from kngd_ray.comparison.metrics import (
    FRONT,
    METRICS,
    OBJECTIVE,
    STREAM_FRONT,
    STREAM_METRICS,
    TEMPERATURE_SCALED,
    Metric,
)
from kngd_ray.comparison.rows import (
    Found,
    Row,
    by_name,
    group_rows,
    hint,
    name_rows,
)
from kngd_ray.comparison.statistics import Difference, better, holm, paired_difference, pareto_front
from kngd_ray.data import EMBEDDED
from kngd_ray.errors import UsageError, closest
from kngd_ray.experiment.aggregate import ZERO_SHOT, interval
from kngd_ray.tracking import LoggedRun

_NAMED = 8  # metrics that a message lists at most
_DIGITS = 8  # of a digest, enough to find it among the inputs that MLflow shows


@dataclass(frozen=True)
class Figure:
    """One metric of one row.

    Attributes:
        values: by seed.
        mean: over seeds.
        low: lower end of its 95 % interval over seeds, Student's t; None for a single seed, and for several with the
            same shots.
        high: its upper end.
        difference: from the baseline, paired by seed; None for the baseline itself, and without a common seed.
    """

    values: Mapping[int, float]
    mean: float
    low: float | None
    high: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Line:
    """One row of a table.

    Attributes:
        row: what it is of.
        figures: by metric; none of a metric that the row does not have.
        front: whether no other row dominates it.
    """

    row: Row
    figures: Mapping[str, Figure]
    front: bool


@dataclass(frozen=True)
class Table:
    """What can be compared with each other.

    Attributes:
        title: what the rows were scored on.
        metrics: the columns.
        front: metrics of the Pareto front.
        baseline: the row that differences are from; None where there are none.
        seeds: what rows are ranked on: the seeds that most of them have. A row without all of these is not ranked.
        lines: the rows; CLIP as it is first, then the best by the first metric first.
        notes: sentences below.
    """

    title: str
    metrics: tuple[Metric, ...]
    front: tuple[Metric, ...]
    baseline: Row | None
    seeds: tuple[int, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @property
    def headlines(self) -> list[str]:
        """Who is best on what, in a sentence per column."""
        return [sentence for m in self.metrics if m.direction and (sentence := self._headline(m))]

    def _headline(self, metric: Metric) -> str:
        ranked = sorted(
            (-metric.direction * mean, place)
            for place, line in enumerate(self.lines)
            if np.isfinite(mean := _mean(line.row.values(metric.name), self.seeds))
        )
        if not ranked:
            return ""
        best, *others = (self.lines[place] for _, place in ranked)
        shown = metric.show(_mean(best.row.values(metric.name), self.seeds))
        unit = " %" if metric.factor == 100 else ""
        said = f"Best {metric.label.removesuffix(' %')}: {best.row.name}, {shown}{unit}"
        if self.baseline is None:
            return f"{said}."
        if best.row is not self.baseline:
            return f"{said}, {self._against(metric, best, self.baseline.name)}."
        if not others:
            return f"{said}, the baseline."
        return f"{said}, the baseline; next is {others[0].row.name}, {self._against(metric, others[0], 'it')}."

    def _against(self, metric: Metric, line: Line, other: str) -> str:
        differences = [each.figures[metric.name].difference for each in self.lines if metric.name in each.figures]
        compared = sum(found is not None and found.p is not None for found in differences)
        return _against(metric, line.figures[metric.name].difference, other, compared)


def build_tables(found: Found, runs: Sequence[LoggedRun], metrics: Sequence[str], baseline: str | None) -> list[Table]:
    """Compare the rows of an experiment.

    Args:
        found: the rows.
        runs: all runs of the experiment, which `baseline` may name.
        metrics: the columns; none are the usual ones, or a search's objectives.
        baseline: run, method or row that differences are from; None is AdamW, else CLIP as it is, else the oldest.

    Returns:
        A table per group of comparable rows, the largest group first.

    Raises:
        UsageError: an unknown metric, a baseline that no group has, or one for a search.
    """
    objectives = _objectives(found)
    known = sorted({name for row in found.rows for figures in row.seeds.values() for name in figures})
    for name in metrics:
        if name not in known:
            raise UsageError(f"no finished run has a metric {name!r}{_like(name, known)}")
    if found.search is not None:
        if baseline is not None:
            raise UsageError(f"trials of a search cannot be paired by seed: leave out {option('baseline')}.")
        columns = [Metric(name, objectives.get(name, better(name))) for name in metrics or objectives]
        title = f"search {found.search.name}, {len(found.rows)} finished trials"
        return [_table(title, found.rows, columns, [m for m in columns if m.name in objectives], None, [])]
    groups = sorted(group_rows(found.rows), key=len, reverse=True)
    unsaid = [name_rows(group) for group in groups]
    bases = [_baseline(group, runs, baseline) for group in groups]
    if baseline is not None and not any(bases):
        names = sorted({row.name for group in groups for row in group} | {r.method for g in groups for r in g})
        raise UsageError(f"no group of comparable runs has a baseline {baseline!r}{hint(baseline, names)}.")
    tables = []
    for title, group, base, notes in zip(_titles(groups), groups, bases, unsaid, strict=True):
        chosen = base or _usual_baseline(group)
        other = [f"{baseline} is not in this group: differences are from {chosen.name}"] if base is None else []
        usual, best = (METRICS, FRONT) if group[0].stream is None else (STREAM_METRICS, STREAM_FRONT)
        columns = [Metric(name, better(name)) for name in dict.fromkeys(metrics or usual)]
        front = [Metric(name, better(name)) for name in best]
        tables.append(_table(title, group, columns, front, chosen, [*other, *notes]))
    return tables


def _objectives(found: Found) -> dict[str, int]:
    """A search's objectives, in the order that it states or of their names, and which way each is better."""
    if found.search is None:
        return {}
    names = sorted({name for row in found.rows for name in row.seeds[0] if name.startswith(OBJECTIVE)})
    stated = found.search.params.get("search.objective", "").split(",")
    order = {f"{OBJECTIVE}{name}": place for place, name in enumerate(stated)}
    return {name: better(name) for name in sorted(names, key=lambda name: order.get(name, len(order)))}


def _like(name: str, known: Sequence[str]) -> str:
    scores = [metric for metric in known if metric.startswith(("id/", "ood/", OBJECTIVE))]
    close = closest(name, scores) or closest(name, known)
    return f"; did you mean {close[0]}?" if close else f" (there: {', '.join(scores[:_NAMED])}, ...)."


def _baseline(group: Sequence[Row], runs: Sequence[LoggedRun], wanted: str | None) -> Row | None:
    """The row of a group with a given name; None if there is none.

    Raises:
        UsageError: the name fits several.
    """
    if wanted is None:
        return _usual_baseline(group)
    found = [row for row in group if wanted in {row.name, row.id}] or [row for row in group if row.method == wanted]
    if found:
        return _fullest(found)
    try:
        ids = set(by_name(runs, wanted))
    except UsageError:
        return None
    ids |= {str(run.parent) for run in runs if run.id in ids}
    found = [row for row in group if row.id in ids]
    if len(found) > 1:
        raise UsageError(
            f"the baseline {wanted!r} is several rows: name one of {', '.join(repr(row.name) for row in found)}."
        )
    return found[0] if found else None


def _usual_baseline(group: Sequence[Row]) -> Row:
    for method in ("adamw", ZERO_SHOT):
        found = [row for row in group if row.method == method]
        if found:
            return _fullest(found)
    return group[0]


def _fullest(rows: Sequence[Row]) -> Row:
    """The row with the most seeds; of several the oldest."""
    return max(rows, key=lambda row: len(row.seeds))


def _table(
    title: str,
    rows: Sequence[Row],
    columns: Sequence[Metric],
    front: Sequence[Metric],
    baseline: Row | None,
    notes: list[str],
) -> Table:
    columns = [metric for metric in columns if any(row.values(metric.name) for row in rows)]
    front = [m for m in front if m.direction and any(row.values(m.name) for row in rows)]
    figures = [
        {metric.name: figure for metric in (*columns, *front) if (figure := _figure(row, metric, baseline)) is not None}
        for row in rows
    ]
    for name in {metric.name for metric in (*columns, *front)}:
        _correct([found for found in figures if name in found], name)
    seeds = _usual_seeds(rows)
    points = [[_mean(row.values(metric.name), seeds) for metric in front] for row in rows]
    on_front = pareto_front(points, [metric.direction for metric in front])
    many = len(front) > 1 and len(rows) > 1
    lines = [Line(row, f, many and on) for row, f, on in zip(rows, figures, on_front, strict=True)]
    if columns:
        lines = _ranked(lines, columns[0])
    lines.sort(key=lambda line: line.row.method != ZERO_SHOT)
    unknown = [metric.name for metric in columns if not metric.direction]
    if unknown:
        notes = [f"the better direction is unknown for {', '.join(unknown)}: no wins or losses", *notes]
    notes = [*_explain(lines, baseline, seeds), *_lacking(lines, columns), *notes]
    return Table(
        title, tuple(columns), tuple(front) if many else (), baseline, tuple(seeds), tuple(lines), tuple(notes)
    )


def _figure(row: Row, metric: Metric, baseline: Row | None) -> Figure | None:
    values = row.values(metric.name)
    if not values:
        return None
    spread: dict[str, Any] = {"mean": _mean(values, values)}
    if len(values) > 1 and not row.one_support:
        spread = interval(list(values.values()), metric.name)
    difference = None
    if baseline is not None and row is not baseline:
        alike = row.one_support or baseline.one_support
        others = baseline.values(metric.name)
        difference = paired_difference(values, others, metric.direction, metric.name, one_support=alike)
    return Figure(values, spread["mean"], spread.get("low"), spread.get("high"), difference)


def _correct(rows: Sequence[dict[str, Figure]], metric: str) -> None:
    """Correct the verdicts on a metric's differences for their number, in place."""
    tested = [(row, d, d.p) for row in rows if (d := row[metric].difference) is not None and d.p is not None]
    for (row, difference, _), p in zip(tested, holm([p for *_, p in tested]), strict=True):
        row[metric] = replace(row[metric], difference=replace(difference, p_holm=p))


def _mean(values: Mapping[int, float], seeds: Iterable[int]) -> float:
    """Mean over some seeds; NaN where one is missing."""
    return float(np.mean([values.get(seed, math.nan) for seed in seeds]))


def _usual_seeds(rows: Sequence[Row]) -> list[int]:
    """The seeds that most rows have; of several such sets the largest."""
    sets = Counter(tuple(sorted(row.seeds)) for row in rows if row.method != ZERO_SHOT)
    _, _, seeds = max((count, len(seeds), seeds) for seeds, count in sets.items())
    return list(seeds)


def _ranked(lines: Sequence[Line], metric: Metric) -> list[Line]:
    """The best first; rows without the metric last."""
    sign = metric.direction or 1

    def rank(line: Line) -> tuple[bool, float]:
        figure = line.figures.get(metric.name)
        return (True, 0.0) if figure is None else (False, -sign * figure.mean)

    return sorted(lines, key=rank)


def _explain(lines: Sequence[Line], baseline: Row | None, seeds: Sequence[int]) -> list[str]:
    """What a reader must know of the numbers."""
    if baseline is None:
        return []
    notes = []
    unpaired = [
        line.row.name for line in lines if line.row is not baseline and not line.row.seeds.keys() & baseline.seeds
    ]
    if unpaired:
        notes.append(f"no seed in common with {baseline.name}, so no difference: {', '.join(unpaired)}")
    common = {len(line.row.seeds.keys() & baseline.seeds.keys()) for line in lines if line.row is not baseline}
    if 1 in common:
        notes.append("one common seed gives a difference without an interval")
    if any(_same_everywhere(figure.difference) for line in lines for figure in line.figures.values()):
        notes.append("a difference that is the same on all seeds has no interval, because its variation is unknown")
    if alike := [line.row.name for line in lines if line.row.one_support and line.row.method != ZERO_SHOT]:
        notes.append(f"all seeds learned from the same shots, so no interval: {', '.join(alike)}")
    if len({frozenset(line.row.seeds) for line in lines if line.row.method != ZERO_SHOT}) > 1:
        few_seeds = [line.row.name for line in lines if not line.row.seeds.keys() >= set(seeds)]
        left = f"; not ranked, as some seeds are missing: {', '.join(few_seeds)}" if few_seeds else ""
        notes.append(
            "not all rows have the same seeds: means are over each row's own, differences over common ones, best rows "
            f"and front over seeds {', '.join(map(str, seeds))}{left}"
        )
    unfinished = [f"{line.row.name} {sum(line.row.unfinished.values())}" for line in lines if line.row.unfinished]
    if unfinished:
        notes.append(f"unfinished fits left out: {', '.join(unfinished)}")
    return notes


def _lacking(lines: Sequence[Line], columns: Sequence[Metric]) -> list[str]:
    """Which figures are means over fewer seeds than their row has: those that are no numbers are not logged."""
    notes = []
    for row in (line.row for line in lines if line.row.method != ZERO_SHOT):
        for metric in columns:
            seeds = sorted(row.seeds.keys() - (values := row.values(metric.name)).keys())
            if seeds and values:
                named = f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
                notes.append(f"{row.name} has no {metric.label} of {named}, and its mean is over the others")
    return notes


def _same_everywhere(difference: Difference | None) -> bool:
    if difference is None or difference.one_support:
        return False
    return len(difference.seeds) > 1 and difference.p is None


def _against(metric: Metric, difference: Difference | None, other: str, compared: int) -> str:
    """``2.3 points higher than adamw (95 % interval +1.1 to +3.5, which excludes 0)``.

    Args:
        metric: of the difference.
        difference: what is told.
        other: what it is from.
        compared: rows of the table that have such a difference, which the verdict takes into account.

    Returns:
        Part of a sentence.
    """
    if difference is None:
        return f"which has no seed in common with {other}"
    unit = " points" if metric.factor == 100 else ""
    way = "higher" if difference.mean > 0 else "lower"
    said = (
        f"{metric.show(abs(difference.mean))}{unit} {way} than {other}" if difference.mean else f"the same as {other}"
    )
    if _same_everywhere(difference):
        return f"{said} on all {len(difference.seeds)} common seeds (no interval)"
    if difference.one_support:
        return f"{said}, over {len(difference.seeds)} seeds with the same shots (no interval)"
    if difference.low is None or difference.high is None:
        return f"{said} (one common seed, no interval)"
    alone = not difference.low <= 0 <= difference.high
    interval = f"95 % interval {metric.show(difference.low, '+')} to {metric.show(difference.high, '+')}"
    if compared == 1 or not alone:
        return f"{said} ({interval}, which {'excludes' if alone else 'includes'} 0)"
    among = f"of this comparison alone, and p = {difference.p_holm:.2g} among {compared} (Holm)"
    verdict = "significant" if difference.decided else "not significant"
    return f"{said} ({interval} {among}: {verdict})"


def _titles(groups: Sequence[Sequence[Row]]) -> list[str]:
    """What each group was scored on, with the settings that tell it from the others."""
    tasks = [group[0].task | _targets(group) for group in groups]
    plain = [_title(group, task) for group, task in zip(groups, tasks, strict=True)]
    titles = []
    for title, task in zip(plain, tasks, strict=True):
        twins = [other for other, t in zip(tasks, plain, strict=True) if t == title]
        differing = [key for key in task if len({twin.get(key) for twin in twins}) > 1]
        titles.append(", ".join([title, *(f"{key}={task[key]}" for key in differing)]))
    digests = [next((row.data for row in group if row.data is not None), None) for group in groups]
    shared = [
        {other for other, t in zip(digests, titles, strict=True) if t == title and other is not None}
        for title in titles
    ]
    titles = [
        # the same settings, and yet other data: files were replaced
        f"{title}, data {digest[:_DIGITS]}" if digest is not None and len(others) > 1 else title
        for title, digest, others in zip(titles, digests, shared, strict=True)
    ]
    return [
        # the same settings, and yet CLIP's own figures differ
        f"{title}, version {titles[:i].count(title) + 1} of these pictures or this model"
        if titles.count(title) > 1
        else title
        for i, title in enumerate(titles)
    ]


def _targets(group: Sequence[Row]) -> dict[str, str]:
    """The data sets that rows are tested on besides their own, as a setting."""
    return next(({"targets": row.targets} for row in group if row.targets is not None), {})


def _title(group: Sequence[Row], task: Mapping[str, str]) -> str:
    path = task.get("data.path", "unknown data")
    data = "emoji" if path == EMBEDDED else ", ".join(Path(part).stem for part in path.split(","))
    parts = [data]
    if group[0].stream is not None:
        order, time = group[0].stream
        parts.append(f"a stream in the order of {time}" if time not in {None, "None"} else f"a stream of {order}")
    if task.get("data.train_domain", "None") != "None":
        parts.append(f"trained on {task['data.train_domain']}")
    if group[0].stream is None or group[0].stream[1] in {None, "None"}:
        parts.append(f"{task.get('data.shots', '?')} shots per class")
    figures = next(iter(group[-1].seeds.values()))
    accuracies = [name for name in figures if name.startswith("ood/") and name.endswith("/accuracy")]
    domains = [name.removeprefix("ood/").removesuffix("/accuracy") for name in accuracies]
    others = sorted({domain for domain in domains if domain != "mean" and not domain.endswith(TEMPERATURE_SCALED)})
    parts.append(f"tested out of distribution on {', '.join(others)}" if others else "no other domains")
    model = task.get("model.name", "unknown model")
    weights = task.get("model.pretrained", "None")
    if model == PRECOMPUTED:
        classes = task.get("model.class_embeddings", "None")
        model, weights = "features", "without class embeddings" if classes == "None" else f"with {Path(classes).name}"
    parts.append(
        "the shipped CLIP" if model == EMBEDDED_MODEL else f"{model} {weights if weights != 'None' else ''}".strip()
    )
    return ", ".join(parts)
