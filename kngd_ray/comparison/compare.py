"""``kngd-ray compare``: the runs of an experiment side by side, as tables, as JSON and as one HTML page."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from kngd_ray._option import option
from kngd_ray.comparison.metrics import Metric
from kngd_ray.comparison.page import page
from kngd_ray.comparison.rows import Found, find_rows
from kngd_ray.comparison.tables import Figure, Line, Table, build_tables
from kngd_ray.config import TrackingConfig
from kngd_ray.console import Display
from kngd_ray.errors import TrackingError
from kngd_ray.experiment.html import check_path
from kngd_ray.storage import write_text
from kngd_ray.tracking import read_runs, redact

_SHOWN_TRIALS = 20
_NAME = 25  # characters that a row's name may need


def compare(
    experiment: str,
    display: Display,
    *,
    parent: str | None = None,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    uri: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare the finished runs of an experiment that were scored on the same thing.

    Args:
        experiment: name of the MLflow experiment.
        display: where the tables are shown.
        parent: only the runs below this one; of a search, its trials.
        metrics: columns; none are accuracy, NLL and ECE.
        baseline: run, row or method that differences are from; None is AdamW, else CLIP as it is.
        uri: tracking store; None is the default of ``kngd-ray train``.
        out: the page; None is ``compare-<experiment>.html`` in the current folder.

    Returns:
        The object that ``--json`` prints.

    Raises:
        TrackingError: nothing in the experiment can be compared.
    """
    path = out or Path(f"compare-{re.sub(r'[^A-Za-z0-9._-]+', '_', experiment)}.html")
    check_path(path, option("out"))
    uri = uri or TrackingConfig().uri
    runs = read_runs(uri, experiment)
    if not runs:
        raise TrackingError(f"experiment {experiment!r} has no runs yet: log some with `kngd-ray train`.")
    found = find_rows(runs, parent)
    left_out = ", ".join(f"{reason}: {count}" for reason, count in sorted(found.left_out.items()))
    if not found.rows:
        below = f" below {parent!r}" if parent is not None else ""
        why = f" (left out are {left_out})" if left_out else ""
        raise TrackingError(f"experiment {experiment!r} has no finished run{below} to compare{why}.")
    tables = build_tables(found, runs, metrics, baseline)
    count = f"{len(runs)} MLflow run{'s' if len(runs) != 1 else ''}"
    about = f"{count} in {redact(uri)}, read {time.strftime('%Y-%m-%d %H:%M')}"
    about += f"; left out are {left_out}" if left_out else ""
    write_text(path, page(f"{experiment}: runs compared", about, tables))
    for table in tables:
        _show(table, found, display)
    if left_out:
        display.say(f"left out are {left_out}")
    display.say(f"page: {path}")
    return {
        "experiment": experiment,
        "page": str(path),
        "left_out": dict(found.left_out),
        "groups": [_plain(table) for table in tables],
    }


def _show(table: Table, found: Found, display: Display) -> None:
    lines = table.lines
    if found.search is not None:  # the first of them, and whoever else is on the front
        lines = tuple(line for place, line in enumerate(lines) if place < _SHOWN_TRIALS or line.front)
    display.out.print(f"\n{table.title}", highlight=False, markup=False)
    for metrics in _blocks(table.metrics, display.out.width - _NAME - 16, 15):
        display.out.print(_means(table, lines, metrics))
    if table.baseline is not None and len(table.lines) > 1:
        title = (
            f"difference from {table.baseline.name} on the same seeds: mean, seeds won-tied-lost, [95 % interval of it "
            "alone]; ! is significant (Holm over the rows)"
        )
        display.out.print(title, highlight=False, markup=False)
        for metrics in _blocks(table.metrics, display.out.width - _NAME, 19):
            display.out.print(_differences(table, metrics))
    notes = list(table.notes)
    if table.front:
        measures = ", ".join(metric.label.removesuffix(" %") for metric in table.front)
        notes.insert(0, f"* on the Pareto front of {measures}")
    if len(lines) < len(table.lines):
        notes.insert(0, f"{len(table.lines) - len(lines)} more trials are on the page")
    for sentence in [*table.headlines, *notes]:
        display.out.print(sentence, highlight=False, markup=False)


def _blocks(metrics: Sequence[Metric], width: int, each: int) -> list[Sequence[Metric]]:
    """Columns that fit side by side; at least one."""
    number = max(1, width // each)
    return [metrics[start : start + number] for start in range(0, len(metrics), number)]


def _grid(*heads: str) -> RichTable:
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", overflow="fold", min_width=12)
    for head in heads:
        grid.add_column(escape(head), justify="right", no_wrap=True)
    return grid


def _means(table: Table, lines: Sequence[Line], metrics: Sequence[Metric]) -> RichTable:
    paired = table.baseline is not None
    heads = [*(["seeds"] if paired else []), *(metric.label for metric in metrics), *(["front"] if table.front else [])]
    grid = _grid(*heads)
    for line in lines:
        cells = [_mean(line.figures.get(metric.name), metric) for metric in metrics]
        seeds = [str(len(line.row.seeds))] if paired else []
        front = ["*" if line.front else ""] if table.front else []
        grid.add_row(escape(line.row.name), *seeds, *cells, *front)
    return grid


def _differences(table: Table, metrics: Sequence[Metric]) -> RichTable:
    grid = _grid(*(metric.label for metric in metrics))
    for line in table.lines:
        if line.row is not table.baseline:
            cells = [_difference(line.figures.get(metric.name), metric) for metric in metrics]
            grid.add_row(escape(line.row.name), *cells)
    return grid


def _mean(figure: Figure | None, metric: Metric) -> str:
    if figure is None:
        return "-"
    if figure.low is None or figure.high is None:
        return metric.show(figure.mean)
    return metric.show(figure.mean) + metric.spread(figure.low, figure.mean, figure.high)


def _difference(figure: Figure | None, metric: Metric) -> str:
    difference = figure.difference if figure is not None else None
    if difference is None:
        return "-"
    text = metric.show(difference.mean, "+")
    if metric.direction:
        text += f"  {difference.wins}-{difference.ties}-{difference.losses}"
    if difference.low is not None and difference.high is not None:
        mark = "!" if difference.decided else " "
        text += f"\n\\[{metric.show(difference.low, '+')}, {metric.show(difference.high, '+')}]{mark}"
    return text


def _plain(table: Table) -> dict[str, Any]:
    """A table as JSON."""
    return {
        "title": table.title,
        "metrics": {metric.name: {1: "more", -1: "less"}.get(metric.direction) for metric in table.metrics},
        "front": [metric.name for metric in table.front],
        "baseline": table.baseline.name if table.baseline is not None else None,
        "ranked_on_seeds": list(table.seeds),
        "headlines": table.headlines,
        "notes": list(table.notes),
        "rows": [
            {
                "name": line.row.name,
                "run_id": line.row.id or None,
                "run": line.row.run,
                "method": line.row.method,
                "preset": line.row.preset,
                "seeds": sorted(line.row.seeds) if table.baseline is not None else None,
                "unfinished": dict(line.row.unfinished),
                "front": line.front,
                "figures": {name: asdict(figure) for name, figure in line.figures.items()},
            }
            for line in table.lines
        ],
    }
