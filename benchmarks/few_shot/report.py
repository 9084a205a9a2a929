"""Lines and pages of what is in the stores, group by group."""

import html
import json
from collections.abc import Mapping, Sequence
from math import isfinite, isinf, isnan
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.few_shot import plots
from benchmarks.few_shot.boot import PROBLEM, Interval, grids, over_problems, over_seeds
from benchmarks.few_shot.claims import CHAMPION, OURS, Claim, claims, difference
from benchmarks.few_shot.data import MINI
from benchmarks.few_shot.figures import FIGURES
from benchmarks.few_shot.groups import GROUPS, store_of
from benchmarks.few_shot.methods import METHODS
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.storage import write_text

PAGE, SUMMARY = "report.html", "summary.json"
_PERCENT = ("accuracy",)
_SHOWN = [figure for figure in FIGURES if figure not in ("seconds_per_step",)]
_STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;padding:0 1.5em;max-width:1200px;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:12px}td,th{padding:3px 8px;border-bottom:1px solid #ddd;
text-align:right}
td:first-child,th:first-child{text-align:left}.yes{color:#1b7f3b;font-weight:600}.no{color:#b3261e;font-weight:600}
img{max-width:100%}.wide{overflow-x:auto}small{color:#777}"""
_NOTE = """<p>Each group of problems is judged by itself. Intervals are 95 % of the bootstrap: of each data set its
problems and its support sets are drawn again, all methods on the same draws; means count each problem once. The best
rival is picked once, by the rows themselves, and stays in every draw. Wins / ties / losses are problems, a tie where
the interval over support sets (Student's t) contains 0. The gap is by how much a claim holds; where it does not, what
it lacks.</p>"""


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


def _plain(value: Interval) -> dict[str, float | None] | None:
    if isnan(value.mean):
        return None
    return {name: _number(each) for name, each in vars(value).items()}


def _number(value: float) -> float | None:
    """What JSON can hold: nothing for NaN."""
    if isnan(value):
        return None
    return round(value, 5) if isfinite(value) else value


def write_report(folder: Path, methods: Sequence[str] | None = None, *, dev: bool = False) -> Path:
    """Write the page, its pictures and ``summary.json``.

    Args:
        folder: of all results; the page lies there, or in its ``dev``.
        methods: what is shown; None is all but the champion of a search.
        dev: whether the rows are of training pictures.

    Returns:
        The page.
    """
    stores = {name: store_of(name, folder, dev=dev) for name in GROUPS}
    # the champion has rows of some problems alone, and tables of its own (champions.py)
    shown = list(methods or (name for name in METHODS if name != CHAMPION))
    frames = {name: store.all_rows(shown) for name, store in stores.items()}
    frames = {name: frame for name, frame in frames.items() if len(frame)}
    must = claims(frames)
    own = stores[MINI].folder
    own.mkdir(parents=True, exist_ok=True)
    parts = [
        "<h1>Few-shot classification on frozen features</h1>",
        _NOTE if frames else "<p>There are no rows yet.</p>",
    ]
    summary: dict[str, Any] = {"environment": json.loads(describe_environment()), "groups": {}}
    for name, frame in frames.items():
        there = [method for method in shown if method in set(frame["method"])]
        held = [claim for claim in must if claim.group == name]
        drawn = _pictures(frame, stores[name].folder, steps=name == MINI)
        parts.append(_group(name, frame, there, held, {key: path.relative_to(own) for key, path in drawn.items()}))
        summary["groups"][name] = _summary(frame, there, held)
    parts.append(_against_seconds(own))
    page = own / PAGE
    title = "Few-shot classification on frozen features"
    body = "\n".join(parts)
    write_text(page, f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>{body}\n")
    write_text(own / SUMMARY, _by_line(summary))
    return page


def _against_seconds(folder: Path) -> str:
    """The race of one task, each method in turn on the same two cores; nothing where it was not run."""
    picture = folder.parent / "fit_cost.png"
    if not picture.is_file():
        return ""
    return (
        "<h2>Accuracy against seconds</h2><p>The emoji at 8 shots, each method alone on the same machine: "
        f"<code>python -m benchmarks.fit_cost</code>.</p><img src=../{picture.name} alt='accuracy against seconds'>"
    )


def _pictures(frame: pd.DataFrame, folder: Path, *, steps: bool) -> dict[str, Path]:
    found = {"shots": folder / plots.SHOTS, "reliability": folder / plots.RELIABILITY}
    plots.shots(frame, found["shots"])
    plots.reliability(frame, found["reliability"])
    if steps:
        found["curves"] = folder / plots.CURVES
        plots.curves(frame, found["curves"])
    return found


def _summary(frame: pd.DataFrame, methods: Sequence[str], must: Sequence[Claim]) -> dict[str, Any]:
    means = {}
    for method in methods:
        own = frame[frame["method"] == method]
        means[method] = {name: _plain(over_problems(grids(own, name))) for name in FIGURES}
    return {
        "problems": len(frame[PROBLEM].drop_duplicates()),
        "must_hold": [
            {
                **vars(claim),
                "value": _plain(claim.value),
                "gap": _number(claim.gap),
                "holds": claim.holds,
                "digits": claim.digits,
            }
            for claim in must
        ],
        "means": means,
        "lines": lines(frame),
    }


def _by_line(summary: Mapping[str, Any]) -> str:
    """JSON with a line for each claim, method, and problem of a method."""
    groups = []
    for name, group in summary["groups"].items():
        must, rows = (",\n".join(json.dumps(row) for row in group[key]) for key in ("must_hold", "lines"))
        means = ",\n".join(f"{json.dumps(method)}: {json.dumps(row)}" for method, row in group["means"].items())
        inner = f'"problems": {group["problems"]},\n"must_hold": [\n{must}\n],\n"means": {{\n{means}\n}},'
        groups.append(f'{json.dumps(name)}: {{\n{inner}\n"lines": [\n{rows}\n]\n}}')
    environment = json.dumps(summary["environment"])
    return f'{{\n"environment": {environment},\n"groups": {{\n' + ",\n".join(groups) + "\n}\n}\n"


def _group(
    name: str, frame: pd.DataFrame, methods: Sequence[str], must: Sequence[Claim], drawn: Mapping[str, Path]
) -> str:
    problems = frame[PROBLEM].drop_duplicates()
    counted = ", ".join(f"{data} {len(part)}" for data, part in problems.groupby("data"))
    seeds = frame.groupby([*PROBLEM, "method"]).size()
    parts = [
        f"<h2 id={name}>{html.escape(GROUPS[name].title)}</h2>",
        f"<p>{len(problems)} problems (data, domain, shots): {html.escape(counted)}; {seeds.min()} to {seeds.max()} "
        "support sets each.</p>",
        "<h3>What must hold</h3>",
        _must(must),
        "<h3>Against shots</h3>",
        f'<img src="{drawn["shots"]}" alt="accuracy and NLL against shots per class">',
        "<h3>Means over all problems</h3>",
        _means(frame, methods),
    ]
    for data, part in frame.groupby("data"):
        parts += [f"<h4>{html.escape(str(data))}</h4>", _means(part, methods)]
    if OURS in methods:
        parts += [f"<h3>Paired differences, {OURS} - other</h3>", _differences(frame, methods)]
    parts += [
        "<h3>Reliability</h3>",
        f'<img src="{drawn["reliability"]}" alt="accuracy against confidence">',
    ]
    if "curves" in drawn:
        parts += [
            "<h3>Accuracy against steps</h3>",
            f'<img src="{drawn["curves"]}" alt="accuracy against steps">',
            "<p><small>Curves are of the weights' mean. Seconds are of a step of a fit that runs alone; they are worth "
            "something on an idle machine.</small></p>",
        ]
    return "\n".join(parts)


def _must(must: Sequence[Claim]) -> str:
    rows = []
    for claim in must:
        verdict = {None: ("", "not measured"), True: ("yes", "holds"), False: ("no", "does not")}[claim.holds]
        value = _cell(claim.value, claim.digits)
        gap = "" if claim.holds is None else f"{claim.gap:+.{claim.digits}f}"
        cells = [claim.text, f"{value} {claim.unit}", claim.rule, gap, str(claim.problems), claim.won, claim.note]
        shown = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr>{shown}<td class="{verdict[0]}">{verdict[1]}</td></tr>')
    names = ("", "value", "rule", "gap", "problems", "wins/ties/losses", "", "verdict")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


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
    if not digits and value.low == value.high:
        return mean
    return f"{mean} [{low}, {high}]"
