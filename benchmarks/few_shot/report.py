"""Lines and pages of what is in a store."""

import html
import json
from collections.abc import Sequence
from math import isfinite, isinf, isnan
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.few_shot import plots
from benchmarks.few_shot.boot import PROBLEM, Interval, grids, over_problems, over_seeds
from benchmarks.few_shot.claims import OURS, Claim, claims, difference
from benchmarks.few_shot.figures import FIGURES
from benchmarks.few_shot.store import Store
from kngd_ray.commands.environment import describe_environment
from kngd_ray.storage import write_text

PAGE, SUMMARY = "report.html", "summary.json"
_PERCENT = ("accuracy",)
_SHOWN = [figure for figure in FIGURES if figure not in ("seconds_per_step",)]
_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:12px}td,th{padding:3px 8px;border-bottom:1px solid #ddd;
text-align:right}
td:first-child,th:first-child{text-align:left}.yes{color:#1b7f3b;font-weight:600}.no{color:#b3261e;font-weight:600}
img{max-width:100%}.wide{overflow-x:auto}small{color:#777}"""


def lines(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Mean, low and high of every figure, for each problem and method.

    Args:
        rows: of the store.

    Returns:
        JSON data: ``data, domain, shots, method, seeds, figures``; a figure that there is none of is None.
    """
    found = []
    for key, part in rows.groupby([*PROBLEM, "method"], sort=False):
        figures = {name: over_seeds(part[name].tolist()) for name in FIGURES}
        found.append({
            **dict(zip((*PROBLEM, "method"), key, strict=True)),
            "shots": int(key[2]),
            "seeds": len(part),
            "figures": {name: _plain(value) for name, value in figures.items()},
        })
    return found


def _plain(value: Interval) -> dict[str, float] | None:
    if isnan(value.mean):
        return None
    return {name: round(each, 5) if isfinite(each) else each for name, each in vars(value).items()}


def write_report(store: Store, methods: Sequence[str]) -> Path:
    """Write the page, its pictures and ``summary.json``.

    Args:
        store: the rows; the page lies in its folder.
        methods: what is shown, in this order.

    Returns:
        The page.
    """
    frame = store.all_rows(methods)
    if frame.empty:
        body = "<p>There are no rows yet.</p>"
        must: list[Claim] = []
    else:
        must = claims(frame)
        plots.reliability(frame, store.folder / plots.RELIABILITY)
        plots.curves(frame, store.folder / plots.CURVES)
        plots.shots(frame, store.folder / plots.SHOTS)
        body = _body(frame, [method for method in methods if method in set(frame["method"])], must)
    store.folder.mkdir(parents=True, exist_ok=True)
    page = store.folder / PAGE
    title = "Few-shot classification on frozen features"
    write_text(page, f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>{body}\n")
    summary = {
        "must_hold": [{**vars(claim), "value": vars(claim.value)} for claim in must],
        "environment": json.loads(describe_environment()),
        "lines": [] if frame.empty else lines(frame),
    }
    write_text(store.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return page


def _body(frame: pd.DataFrame, methods: Sequence[str], must: Sequence[Claim]) -> str:
    problems = frame[PROBLEM].drop_duplicates()
    counted = ", ".join(f"{data} {len(part)}" for data, part in problems.groupby("data"))
    seeds = frame.groupby([*PROBLEM, "method"]).size()
    parts = [
        "<h1>Few-shot classification on frozen features</h1>",
        f"<p>{len(problems)} problems (data, domain, shots): {html.escape(counted)}; {seeds.min()} to {seeds.max()} "
        "support sets each. Intervals are 95 % of the bootstrap over the problems of each data set and support sets; "
        "wins / ties / losses are problems, a tie where the interval over support sets contains 0.</p>",
        "<h2>What must hold</h2>",
        _must(must),
        "<h2>Against shots</h2>",
        f'<img src="{plots.SHOTS}" alt="accuracy and NLL against shots per class">',
        "<h2>Means over all problems</h2>",
        _means(frame, methods),
    ]
    for data, part in frame.groupby("data"):
        parts += [f"<h3>{html.escape(str(data))}</h3>", _means(part, methods)]
    if OURS in methods:
        parts += [f"<h2>Paired differences, {OURS} - other</h2>", _differences(frame, methods)]
    parts += [
        "<h2>Reliability</h2>",
        f'<img src="{plots.RELIABILITY}" alt="accuracy against confidence">',
        "<h2>Accuracy against steps</h2>",
        f'<img src="{plots.CURVES}" alt="accuracy against steps">',
        "<p><small>Curves are of the weights' mean. Seconds are of a step of a fit that runs alone; they are worth "
        "something on an idle machine.</small></p>",
    ]
    return "\n".join(parts)


def _must(must: Sequence[Claim]) -> str:
    rows = []
    for claim in must:
        verdict = {None: ("", "not measured"), True: ("yes", "holds"), False: ("no", "does not hold")}[claim.holds]
        value = f"{_cell(claim.value, 3 if claim.unit != 'points' else 2)} {claim.unit}"
        cells = [claim.text, value, claim.rule, str(claim.problems), claim.won]
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr>{shown}<td class="{verdict[0]}">{verdict[1]}</td></tr>')
    head = "".join(f"<th>{name}</th>" for name in ("", "value", "rule", "problems", "wins/ties/losses", "verdict"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _means(frame: pd.DataFrame, methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        own = frame[frame["method"] == method]
        cells = [_figure(over_problems(grids(own, name)), name) for name in _SHOWN]
        rows.append([method, *cells])
    return _table(["", *_SHOWN], rows)


def _differences(frame: pd.DataFrame, methods: Sequence[str]) -> str:
    rows = []
    for method in methods:
        if method == OURS:
            continue
        cells = []
        for name in _SHOWN:
            value, score, _ = difference(frame, (OURS, name), (method, name))
            cells.append(f"{_figure(value, name)} {score}" if not isnan(value.mean) else "")
        rows.append([method, *cells])
    return _table(["", *_SHOWN], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell.replace('_', ' '))}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def _figure(value: Interval, name: str) -> str:
    if name.endswith(_PERCENT):
        return _cell(value.scaled(100), 1)
    return _cell(value, 0 if name in ("steps", "steps_to_95") else 3)


def _cell(value: Interval, digits: int) -> str:
    if isnan(value.mean):
        return ""
    mean, low, high = ("∞" if isinf(each) else f"{each:.{digits}f}" for each in (value.mean, value.low, value.high))
    return f"{mean} [{low}, {high}]"
