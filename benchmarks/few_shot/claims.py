"""What must hold of the default preset, each with its value, its interval and a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isnan, nan
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.few_shot.boot import (
    NOTHING,
    PROBLEM,
    Array,
    Interval,
    grids,
    of_replicates,
    over_problems,
    paired,
    replicates,
    won,
)
from benchmarks.few_shot.figures import LOWER_IS_BETTER, UNCERTAINTIES

OURS, OURS_ONCE, ADAMW, ADAMW_ONCE = "ours", "ours_single_pass", "adamw", "adamw_single_pass"
_POINTS = 100.0
_LEAD = 5.0  # points of a single pass
_QUARTER = 0.25
_STEP_REPLICATES = 1000


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        text: what must hold.
        value: the figure.
        unit: of the figure.
        rule: when it holds.
        holds: whether it does; None where it was not measured.
        won: wins/ties/losses over problems, where it is a difference.
        problems: number of problems that it was measured on.
    """

    text: str
    value: Interval
    unit: str
    rule: str
    holds: bool | None
    won: str
    problems: int


def difference(frame: pd.DataFrame, first: tuple[str, str], second: tuple[str, str]) -> tuple[Interval, str, int]:
    """The mean paired difference of two methods, wins/ties/losses and the number of problems.

    Args:
        frame: all rows.
        first: method and figure.
        second: method and figure that is subtracted.

    Returns:
        All three.
    """
    both = paired(frame, first, second)
    strata = grids(both, "difference")
    return over_problems(strata), won(both, first[1] in LOWER_IS_BETTER), sum(len(grid) for grid in strata)


Verdict = Callable[[Interval], bool]


def claims(frame: pd.DataFrame) -> list[Claim]:
    """The table of what must hold.

    Args:
        frame: all rows.

    Returns:
        Its rows.
    """

    def row(text: str, first: tuple[str, str], second: tuple[str, str], rule: str, verdict: Verdict) -> Claim:
        found, score, problems = difference(frame, first, second)
        points = "accuracy" in first[1]
        value = found.scaled(_POINTS) if points else found
        holds = None if isnan(value.mean) else verdict(value)
        return Claim(text, value, "points" if points else "", rule, holds, score, problems)

    def above(value: Interval) -> bool:
        return value.low > 0

    def below(value: Interval) -> bool:
        return value.high < 0

    found = [
        row(
            "ID accuracy, ours - AdamW",
            (OURS, "id_accuracy"),
            (ADAMW, "id_accuracy"),
            "interval contains or exceeds 0",
            lambda value: value.high >= 0,
        ),
        row("OOD accuracy, ours - AdamW", (OURS, "ood_accuracy"), (ADAMW, "ood_accuracy"), "interval above 0", above),
    ]
    for other, rule, verdict in (
        (ADAMW, "interval below 0", below),
        ("ivon", "interval contains or is below 0", lambda value: value.low <= 0),
    ):
        for figure in ("nll", "ece"):
            for where in ("id", "ood"):
                name = f"{where}_{figure}"
                text = f"{where.upper()} {figure.upper()}, ours - {'AdamW' if other == ADAMW else 'IVON'}"
                found.append(row(text, (OURS, name), (other, name), rule, verdict))
    found += _steps(frame)
    for where in ("id", "ood"):
        text = f"single pass, {where.upper()} accuracy, ours - AdamW"
        name = f"{where}_accuracy"
        rule = f"at least {_LEAD:.0f} points"
        found.append(row(text, (OURS_ONCE, name), (ADAMW_ONCE, name), rule, lambda value: value.mean >= _LEAD))
    rivals = [(ADAMW, "max_prob"), *(("laplace", kind) for kind in UNCERTAINTIES)]
    for other, kind in rivals:
        text = f"AUROC OOD against ID, ours by variance - {other} by {kind}"
        found.append(row(text, (OURS, "auroc_variance"), (other, f"auroc_{kind}"), "interval above 0", above))
    return found


def _steps(frame: pd.DataFrame) -> list[Claim]:
    """Steps to AdamW's final accuracy, as parts of those that AdamW takes to it, and of its whole run."""
    strata = [problems for problems in (_curves(part) for _, part in frame.groupby("data")) if problems]
    rule = "median over problems at most a quarter"
    count = sum(map(len, strata))
    texts = ("steps to AdamW's final ID accuracy / AdamW's own steps to it", "the same / steps of AdamW's whole run")
    if not strata:
        return [Claim(text, NOTHING, "", rule, None, "", 0) for text in texts]
    values = [[problem.ratios(np.arange(problem.seeds)) for problem in problems] for problems in strata]
    flat = [pair for of_data in values for pair in of_data]
    drawn: list[list[float]] = [[], []]
    shapes = [(len(problems), min(problem.seeds for problem in problems)) for problems in strata]
    for picked in replicates(shapes, _STEP_REPLICATES):
        ratios = [
            problems[p].ratios(seeds)
            for problems, (numbers, seeds) in zip(strata, picked, strict=True)
            for p in numbers.astype(int)
        ]
        for n in range(2):
            drawn[n].append(_median([pair[n] for pair in ratios]))
    found = []
    for n, text in enumerate(texts):
        value = of_replicates(_median([pair[n] for pair in flat]), drawn[n])
        reached = sum(pair[n] < inf for pair in flat)
        note = f"reached in {reached} of {count}"
        found.append(Claim(text, value, "", rule, value.mean <= _QUARTER, note, count))
    return found


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not isnan(value)]
    return median(kept) if kept else nan


@dataclass(frozen=True)
class _Pair:
    """Curves of ours and AdamW's on one problem, (seeds, steps) each, at these steps."""

    steps: tuple[Array, Array]
    curves: tuple[Array, Array]

    @property
    def seeds(self) -> int:
        return len(self.curves[0])

    def ratios(self, seeds: Any) -> tuple[float, float]:
        """Of mean curves over some seeds; infinite where ours never gets there, NaN where AdamW has no way to go."""
        ours, adamw = (curve[seeds].mean(0) for curve in self.curves)
        goal = adamw[-1] - 1e-9
        taken, own = (_first(steps, curve, goal) for steps, curve in zip(self.steps, (ours, adamw), strict=True))
        return (taken / own if own else nan), taken / float(self.steps[1][-1])


def _first(steps: Array, curve: Array, goal: float) -> float:
    there = np.flatnonzero(curve >= goal)
    return float(steps[there[0]]) if len(there) else inf


def _curves(frame: pd.DataFrame) -> list[_Pair]:
    """The problems of a data set that both methods have curves of."""
    found = []
    for _, part in frame[frame["method"].isin((OURS, ADAMW))].groupby(PROBLEM):
        sides = [part[part["method"] == method].sort_values("seed") for method in (OURS, ADAMW)]
        seeds = set(sides[0]["seed"]) & set(sides[1]["seed"])
        sides = [side[side["seed"].isin(seeds)] for side in sides]
        if not seeds or any(not len(side["curve_id"].iloc[0]) for side in sides):
            continue
        if any(len(set(map(len, side["curve_id"]))) > 1 for side in sides):
            continue  # seeds of different settings: the missing ones are not computed yet
        curves = [np.stack([np.asarray(curve, float) for curve in side["curve_id"]]) for side in sides]
        steps = [np.asarray(side["curve_steps"].iloc[0], float) for side in sides]
        found.append(_Pair((steps[0], steps[1]), (curves[0], curves[1])))
    return found


def mean_curve(frame: pd.DataFrame, column: str, at: Array) -> Array:
    """Mean accuracy of some fits after given numbers of steps.

    Args:
        frame: rows of one method.
        column: ``curve_id`` or ``curve_ood``.
        at: (k,) steps.

    Returns:
        (k,) accuracies; the last one goes on where a fit has ended.
    """
    values = []
    for steps, curve in zip(frame["curve_steps"], frame[column], strict=True):
        assert all(a < b for a, b in pairwise(steps))
        values.append(np.asarray(curve, float)[np.searchsorted(np.asarray(steps, float), at, side="right") - 1])
    return np.mean(values, axis=0)
