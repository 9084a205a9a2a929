"""A comparison as one HTML page that needs nothing else: styles, script and drawings are in it."""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from itertools import combinations
from string import Template

import numpy as np
from numpy.typing import NDArray

from kngd_ray.comparison.metrics import Metric
from kngd_ray.comparison.tables import Figure, Line, Table

MARK = '<meta name="generator" content="kngd-ray compare">'
"""What tells a page of ours from another file."""

_BAR, _BAR_HEIGHT = 88, 12  # pixels of a difference's drawing
_WIDTH, _HEIGHT, _LEFT, _BELOW, _ROOM = 425, 330, 52, 40, 14  # of a scatter plot
_FAR = 3  # times the median: a difference that far is drawn at the edge, so that the others can be told apart
_CLOSE = 0.25  # of an axis: where the front fills less of it, the plot shows the front
_READABLE = 60  # points that can all bear numbers; of more, none does


def page(title: str, about: str, tables: Sequence[Table]) -> str:
    """Write the page; every text from outside is escaped, and the page allows no script but its own.

    Args:
        title: of the page.
        about: one line below it.
        tables: the groups of comparable rows.

    Returns:
        HTML.
    """
    template = (resources.files("kngd_ray") / "assets" / "compare.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*)</script>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body = "\n".join(_section(table) for table in tables)
    return Template(template).substitute(hash=f"sha256-{digest}", title=escape(title), about=escape(about), body=body)


def _section(table: Table) -> str:
    parts = [f"<section><h2>{escape(table.title)}</h2>"]
    if table.headlines:
        parts.append(f'<ul class="headlines">{_items(table.headlines)}</ul>')
    below = [f'<div class="scroll">{_table(table)}</div>', f'<ul class="notes">{_items(_legend(table))}</ul>']
    plots = "".join(_scatters(table, x, y) for x, y in combinations(table.front, 2))
    if plots:  # above a table so long that nobody would find them
        below.insert(0 if len(table.lines) > _READABLE else 2, f'<div class="plots">{plots}</div>')
    parts += below
    if table.baseline is not None:
        parts.append(_by_seed(table))
    return "".join([*parts, "</section>"])


def _items(sentences: Sequence[str]) -> str:
    return "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)


def _legend(table: Table) -> list[str]:
    if table.baseline is None:
        return list(table.notes)
    front = ", ".join(metric.label.removesuffix(" %") for metric in table.front)
    return [
        "mean ± half of its 95 % interval over seeds (Student's t); both ends where it reaches 0 or 100 %",
        f"below it the difference from {table.baseline.name}, paired by seed: mean, 95 % interval of this comparison "
        "alone (Student's t), the seeds won – tied – lost; coloured where the difference is beyond the noise of seeds, "
        "with Holm's correction for the rows of the table",
        *([f"Pareto front: no other row is as good in all of {front} and better in one"] if front else []),
        *table.notes,
    ]


def _table(table: Table) -> str:
    reach = {metric.name: _reach(table, metric) for metric in table.metrics}
    heads = "".join(
        f'<th scope="col" data-first="{"descending" if metric.direction > 0 else "ascending"}">'
        f"<button>{escape(metric.label)}</button><small>{_arrow(metric)}</small></th>"
        for metric in table.metrics
    )
    rows = []
    for number, line in enumerate(table.lines, start=1):
        row, is_base = line.row, line.row is table.baseline
        tags = '<span class="tag front">Pareto front</span>' if line.front else ""
        tags += '<span class="tag base">baseline</span>' if is_base else ""
        seeds = len(row.seeds)
        unfinished = sum(row.unfinished.values())
        said = f"{seeds}<small>of {seeds + unfinished}</small>" if unfinished else str(seeds)
        count = f'<td data-sort="{seeds}">{said}</td>' if table.baseline is not None else ""
        cells = "".join(_cell(line.figures.get(metric.name), metric, reach[metric.name]) for metric in table.metrics)
        under = f"<small>{escape(row.run)} · {escape(row.id[:8])}</small>" if row.id else ""
        rows.append(
            f'<tr{" class=baseline" if is_base else ""}><td data-sort="{number}">{number}</td>'
            f'<th scope="row" class="name" data-sort="{escape(row.name)}">{_foldable(row.name)}{tags}{under}</th>'
            f"{count}{cells}</tr>"
        )
    count = '<th scope="col"><button>seeds</button></th>' if table.baseline is not None else ""
    return (
        f'<table><thead><tr><th scope="col"><button>#</button></th><th scope="col" class="name">'
        f"<button data-text=1>run</button></th>{count}{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _foldable(name: str) -> str:
    """A name that may be broken after the dots and equal signs of its settings."""
    return re.sub(r"([.=])(?=[a-z])", r"\1<wbr>", escape(name))


def _arrow(metric: Metric) -> str:
    return {1: "more is better", -1: "less is better"}.get(metric.direction, "&nbsp;")


def _cell(figure: Figure | None, metric: Metric, reach: float) -> str:
    if figure is None:
        return "<td>–</td>"
    half = ""
    if figure.low is not None and figure.high is not None:
        half = f' <span class="half">{metric.spread(figure.low, figure.mean, figure.high)}</span>'
    parts = [f'<td data-sort="{figure.mean!r}"><b>{metric.show(figure.mean)}</b>{half}']
    difference = figure.difference
    if difference is not None:
        ends = ""
        if difference.low is not None and difference.high is not None:
            ends = f" [{metric.show(difference.low, '+')}, {metric.show(difference.high, '+')}]"
        parts.append(f'<small class="{_verdict(figure, metric)}">{metric.show(difference.mean, "+")}{ends}</small>')
        count = f"{difference.wins}–{difference.ties}–{difference.losses} " if metric.direction else ""
        parts.append(f"<small>{count}{_bar(figure, metric, reach)}</small>")
    return "".join([*parts, "</td>"])


def _verdict(figure: Figure, metric: Metric) -> str:
    """``good`` or ``bad`` where the difference is beyond the noise of seeds."""
    if figure.difference is None or not figure.difference.decided or not metric.direction:
        return ""
    return "good" if figure.difference.mean * metric.direction > 0 else "bad"


def _reach(table: Table, metric: Metric) -> float:
    """The half width of the drawings of a column's differences: as far as they go, without those far off."""
    found = [line.figures[metric.name].difference for line in table.lines if metric.name in line.figures]
    ends = [max(abs(end) for end in (d.mean, d.low, d.high) if end is not None) for d in found if d is not None]
    return min(max(ends), _FAR * float(np.median(ends)) or max(ends)) if ends else 0.0


def _bar(figure: Figure, metric: Metric, reach: float) -> str:
    """A difference and its interval around 0, on the scale of its column."""
    difference = figure.difference
    if difference is None or not reach:
        return ""

    def at(value: float) -> str:
        return f"{_BAR / 2 + max(-1.0, min(1.0, value / reach)) * (_BAR / 2 - 5):.1f}"

    verdict, middle = _verdict(figure, metric), _BAR_HEIGHT / 2
    whisker = ""
    if difference.low is not None and difference.high is not None:
        ends = f'x1="{at(difference.low)}" x2="{at(difference.high)}" y1="{middle}" y2="{middle}"'
        whisker = f'<line class="{verdict} whisker" {ends}/>'
    mean, edge = difference.mean, abs(difference.mean) > reach
    if edge:  # an arrow head: it is farther off
        tip = _BAR / 2 + math.copysign(_BAR / 2, mean)
        back = tip - math.copysign(7, mean)
        dot = f'<path class="{verdict} point" d="M{tip} {middle}L{back} {middle - 4}v8z"/>'
    else:
        dot = f'<circle class="{verdict} point" cx="{at(mean)}" cy="{middle}" r="3.5"/>'
    return (
        f'<svg width="{_BAR}" height="{_BAR_HEIGHT}" viewBox="0 0 {_BAR} {_BAR_HEIGHT}" aria-hidden="true">'
        f'<line class="zero" x1="{_BAR / 2}" x2="{_BAR / 2}" y1="0" y2="{_BAR_HEIGHT}"/>{whisker}'
        f"{dot}</svg>"
    )


def _scatters(table: Table, x: Metric, y: Metric) -> str:
    """Rows by two metrics; where the front would be pressed into a dot, its neighbourhood, of many rows after all."""
    shown = [
        (number, line)
        for number, line in enumerate(table.lines, start=1)
        if x.name in line.figures and y.name in line.figures
    ]
    points = np.array([[line.figures[m.name].mean * m.factor for m in (x, y)] for _, line in shown])
    wanted = np.array([line.front or line.row is table.baseline for _, line in shown])
    if not wanted.any():
        return ""
    extent, whole = np.ptp(points[wanted], axis=0), np.ptp(points, axis=0)
    if not (extent < _CLOSE * whole).any() or not (extent > 0).all():
        return _scatter(shown, points, x, y, "")
    low, high = points[wanted].min(0) - extent / 2, points[wanted].max(0) + extent / 2
    near = ((points >= low) & (points <= high)).all(1)
    close = [point for point, kept in zip(shown, near, strict=True) if kept]
    if len(shown) > _READABLE:
        return _scatter(shown, points, x, y, "") + _scatter(close, points[near], x, y, "; close to the front")
    outside = ", ".join(str(number) for (number, _), kept in zip(shown, near, strict=True) if not kept)
    return _scatter(close, points[near], x, y, f"; far from it, not drawn: {outside}" if outside else "")


def _scatter(shown: Sequence[tuple[int, Line]], points: NDArray[np.float64], x: Metric, y: Metric, remark: str) -> str:
    """Rows at points (n, 2); their numbers are those of the table, filled on the Pareto front."""
    xs, ys = points.T
    ticks_x, ticks_y = _ticks(xs), _ticks(ys)

    def across(value: float) -> float:
        return _LEFT + _ROOM + _share(value, xs) * (_WIDTH - _LEFT - 2 * _ROOM)

    def up(value: float) -> float:
        return _HEIGHT - _BELOW - _ROOM - _share(value, ys) * (_HEIGHT - _BELOW - 2 * _ROOM)

    bottom = _HEIGHT - _BELOW
    parts = [
        f'<line class="grid" x1="{across(t):.1f}" x2="{across(t):.1f}" y1="0" y2="{bottom}"/>'
        f'<text class="soft" x="{across(t):.1f}" y="{bottom + 15}" text-anchor="middle">{t:g}</text>'
        for t in ticks_x
    ]
    parts += [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text class="soft" x="{_LEFT - 6}" y="{up(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks_y
    ]
    parts += [
        f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(_axis(x))}</text>',
        f'<text transform="translate(12 {bottom / 2}) rotate(-90)" text-anchor="middle">{escape(_axis(y))}</text>',
    ]
    few = len(shown) <= _READABLE
    # those on the front last, above the others
    for (number, line), px, py in sorted(zip(shown, xs, ys, strict=True), key=lambda point: point[0][1].front):
        parts.append(_dot(number, line, across(px), up(py), few))
    caption = f"{escape(y.label)} against {escape(x.label)}; filled: on the Pareto front{remark}"
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{caption}">{"".join(parts)}</svg><figcaption>{caption}</figcaption></figure>'
    )


def _dot(number: int, line: Line, x: float, y: float, numbered: bool) -> str:
    front = " front" if line.front else ""
    label = ""
    if numbered:
        inside = "on" if line.front else ""
        label = f'<text class="{inside}" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number}</text>'
    return (
        f'<g><title>{number}: {escape(line.row.name)}</title><circle class="dot{front}" cx="{x:.1f}" cy="{y:.1f}" '
        f'r="{9 if numbered else 4}"/>{label}</g>'
    )


def _axis(metric: Metric) -> str:
    return f"{metric.label} ({_arrow(metric)})"


def _share(value: float, values: NDArray[np.float64]) -> float:
    """Where a value lies between the least and the largest, 0 to 1; in the middle where they are one."""
    low, high = float(values.min()), float(values.max())
    return 0.5 if high == low else (value - low) / (high - low)


def _ticks(values: NDArray[np.float64]) -> list[float]:
    """Round numbers among the values, four to nine of them."""
    low, high = float(values.min()), float(values.max())
    if high == low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [float(round(k * step, 12)) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def _by_seed(table: Table) -> str:
    """Every figure by seed, folded away."""
    seeds = sorted({seed for line in table.lines for seed in line.row.seeds})
    rows = []
    for metric in table.metrics:
        for line in table.lines:
            figure = line.figures.get(metric.name)
            if figure is None:
                continue
            cells = "".join(
                f"<td>{metric.show(figure.values[seed]) if seed in figure.values else '–'}</td>" for seed in seeds
            )
            rows.append(
                f'<tr><th class="name">{escape(metric.label)}</th><th class="name">{_foldable(line.row.name)}</th>'
                f"{cells}</tr>"
            )
    heads = "".join(f"<th>seed {seed}</th>" for seed in seeds)
    return (
        f'<details><summary>figures by seed</summary><div class="scroll"><table><thead><tr><th class="name">metric</th>'
        f'<th class="name">run</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )
