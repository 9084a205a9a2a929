"""A comparison as one HTML page that needs nothing else: styles, script and drawings are in it."""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from markupsafe import Markup

from kngd_ray.comparison.metrics import Metric
from kngd_ray.comparison.plots import READABLE, scatter
from kngd_ray.comparison.tables import Figure, Line, Table
from kngd_ray.experiment.html import read_asset, render

_BAR, _BAR_HEIGHT = 88, 12  # pixels of a difference's drawing
_FAR = 3  # times the median: a difference that far is drawn at the edge, so that the others can be told apart
_CLOSE = 0.25  # of an axis: where the front fills less of it, the plot shows the front


def page(title: str, about: str, tables: Sequence[Table]) -> str:
    """Write the page; every text from outside is escaped, and the page allows no script but its own.

    Args:
        title: of the page.
        about: one line below it.
        tables: the groups of comparable rows.

    Returns:
        HTML.
    """
    script = read_asset("compare.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        "compare.html",
        title=title,
        about=about,
        sections=[_section(table) for table in tables],
        script=Markup(script),  # noqa: S704 - the package's own file
        script_hash=f"sha256-{digest}",
    )


def _section(table: Table) -> dict[str, Any]:
    """What the template shows of a group."""
    reach = {metric.name: _reach(table, metric) for metric in table.metrics}
    seeds = sorted({seed for line in table.lines for seed in line.row.seeds})
    return {
        "title": table.title,
        "headlines": table.headlines,
        "legend": _legend(table),
        "paired": table.baseline is not None,
        "columns": [
            {
                "label": metric.label,
                "first": "descending" if metric.direction > 0 else "ascending",
                "better": metric.better,
            }
            for metric in table.metrics
        ],
        "rows": [_row(table, line, reach) for line in table.lines],
        "plots": [drawing for x, y in combinations(table.front, 2) for drawing in _scatters(table, x, y)],
        "plots_first": len(table.lines) > READABLE,  # above a table so long that nobody would find them
        "seeds": seeds,
        "by_seed": [
            {
                "metric": metric.label,
                "parts": _parts(line.row.name),
                "values": [metric.show(figure.values[seed]) if seed in figure.values else "–" for seed in seeds],
            }
            for metric in table.metrics
            for line in table.lines
            if (figure := line.figures.get(metric.name)) is not None
        ],
    }


def _legend(table: Table) -> list[str]:
    if table.baseline is None:
        return list(table.notes)
    front = ", ".join(metric.label.removesuffix(" %") for metric in table.front)
    return [
        "mean ± half its 95 % interval over seeds (Student's t); both ends if the interval reaches 0 or 100 %",
        f"below the mean: the difference from {table.baseline.name}, paired by seed, with its own 95 % interval "
        "(Student's t) and the seeds won–tied–lost; coloured if it is significant after Holm's correction over the "
        "rows of the table",
        *([f"Pareto front: no other row is at least as good in all of {front} and better in one"] if front else []),
        *table.notes,
    ]


def _row(table: Table, line: Line, reach: dict[str, float]) -> dict[str, Any]:
    row = line.row
    return {
        "name": row.name,
        "parts": _parts(row.name),
        "front": line.front,
        "is_baseline": row is table.baseline,
        "run": row.run,
        "id": row.id[:8],
        "seeds": len(row.seeds),
        "unfinished": sum(row.unfinished.values()),
        "cells": [_cell(line.figures.get(metric.name), metric, reach[metric.name]) for metric in table.metrics],
    }


def _parts(name: str) -> list[str]:
    """Parts of a name between which a line may break: after the dots and equal signs of its settings."""
    return re.split(r"(?<=[.=])(?=[a-z])", name)


def _cell(figure: Figure | None, metric: Metric, reach: float) -> dict[str, Any] | None:
    if figure is None:
        return None
    cell: dict[str, Any] = {"sort": repr(figure.mean), "mean": metric.show(figure.mean), "spread": "", "difference": ""}
    if figure.low is not None and figure.high is not None:
        cell["spread"] = metric.spread(figure.low, figure.mean, figure.high).strip()
    difference = figure.difference
    if difference is not None:
        ends = ""
        if difference.low is not None and difference.high is not None:
            ends = f" [{metric.show(difference.low, '+')}, {metric.show(difference.high, '+')}]"
        cell |= {
            "difference": f"{metric.show(difference.mean, '+')}{ends}",
            "verdict": _verdict(figure, metric),
            "count": f"{difference.wins}–{difference.ties}–{difference.losses}" if metric.direction else "",
            "bar": _bar(figure, metric, reach),
        }
    return cell


def _verdict(figure: Figure, metric: Metric) -> str:
    """``good`` or ``bad`` if the difference is significant."""
    if figure.difference is None or not figure.difference.decided or not metric.direction:
        return ""
    return "good" if figure.difference.mean * metric.direction > 0 else "bad"


def _reach(table: Table, metric: Metric) -> float:
    """The half width of the drawings of a column's differences: as far as they go, without those far off."""
    found = [line.figures[metric.name].difference for line in table.lines if metric.name in line.figures]
    ends = [max(abs(end) for end in (d.mean, d.low, d.high) if end is not None) for d in found if d is not None]
    return min(max(ends), _FAR * float(np.median(ends)) or max(ends)) if ends else 0.0


def _bar(figure: Figure, metric: Metric, reach: float) -> dict[str, Any] | None:
    """Where a difference and its interval lie around 0, in pixels on the scale of its column."""
    difference = figure.difference
    if difference is None or not reach:
        return None

    def at(value: float) -> str:
        return f"{_BAR / 2 + max(-1.0, min(1.0, value / reach)) * (_BAR / 2 - 5):.1f}"

    middle, arrow = _BAR_HEIGHT / 2, ""
    if abs(difference.mean) > reach:  # an arrow head: it is farther off
        tip = _BAR / 2 + math.copysign(_BAR / 2, difference.mean)
        arrow = f"M{tip} {middle}L{tip - math.copysign(7, difference.mean)} {middle - 4}v8z"
    known = difference.low is not None and difference.high is not None
    return {
        "width": _BAR,
        "height": _BAR_HEIGHT,
        "zero": _BAR / 2,
        "middle": middle,
        "verdict": _verdict(figure, metric),
        "mean": at(difference.mean),
        "ends": [at(end) for end in (difference.low, difference.high) if end is not None] if known else [],
        "arrow": arrow,
    }


def _scatters(table: Table, x: Metric, y: Metric) -> list[dict[str, Any]]:
    """Rows by two metrics; where the front would be pressed into a dot, its neighbourhood, of many rows after all."""
    shown = [
        (number, line)
        for number, line in enumerate(table.lines, start=1)
        if x.name in line.figures and y.name in line.figures
    ]
    points = np.array([[line.figures[m.name].mean * m.factor for m in (x, y)] for _, line in shown])
    wanted = np.array([line.front or line.row is table.baseline for _, line in shown])
    if not wanted.any():
        return []

    def drawn(kept: Any, remark: str) -> dict[str, Any]:
        caption = f"{y.label} against {x.label}; filled: on the Pareto front{remark}"
        chosen = [point for point, keep in zip(shown, kept, strict=True) if keep]
        return {"caption": caption, "svg": scatter(chosen, points[kept], x, y)}

    everything = np.ones(len(shown), bool)
    extent, whole = np.ptp(points[wanted], axis=0), np.ptp(points, axis=0)
    if not (extent < _CLOSE * whole).any() or not (extent > 0).all():
        return [drawn(everything, "")]
    low, high = points[wanted].min(0) - extent / 2, points[wanted].max(0) + extent / 2
    near = ((points >= low) & (points <= high)).all(1)
    if len(shown) > READABLE:
        return [drawn(everything, ""), drawn(near, "; close to the front")]
    outside = ", ".join(str(number) for (number, _), kept in zip(shown, near, strict=True) if not kept)
    return [drawn(near, f"; too far away to be drawn: {outside}" if outside else "")]
