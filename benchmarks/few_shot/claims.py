"""What must hold of the default preset in each group of problems, with its value, its interval and a verdict.

Intervals are 95 % of the bootstrap of :mod:`~benchmarks.few_shot.boot`: problems and support sets are resampled. What
was picked by the rows themselves, such as the best rival, is picked once, on all of them, and stays in every replicate.
"""

from collections.abc import Callable, Mapping, Sequence
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
    exactly,
    grids,
    of_replicates,
    over_problems,
    paired,
    replicates,
    won,
)
from benchmarks.few_shot.data import CLIP_GEOMETRY, MINI
from benchmarks.few_shot.figures import LOWER_IS_BETTER
from benchmarks.few_shot.groups import GROUPS, Group

OURS, CHAMPION, ADAMW_ONCE, ZERO_SHOT = "ours", "champion", "adamw_single_pass", "zero_shot"
OWN = (OURS, CHAMPION, "kalman_diagonal")  # presets of the package, which are nobody's rivals
BEST_RIVAL = "the best rival"
POINTS, PROBLEMS = "points", "problems"  # units
_POINTS = 100.0
_BEHIND = 0.3  # points that the best of all rivals, picked afterwards, may be ahead
_SAME_ACCURACY, _SAME_NLL = 0.3, 0.01  # points and nats between the geometries
_SHOTS = (((1, 2), "1-2 shots"), ((4, 8), "4-8 shots"), ((16,), "16 shots"))
_LEAD = 5.0  # points of a single pass
_QUARTER = 0.25
_STEP_REPLICATES = 1000


@dataclass(frozen=True)
class Rule:
    """When a claim holds.

    Attributes:
        text: in the table.
        margin: of a figure, by how much it holds; negative is what it lacks.
    """

    text: str
    margin: Callable[[Interval], float]


_ABOVE = Rule("interval above 0", lambda value: value.low)
_NOT_ABOVE = Rule("mean not above 0", lambda value: 0.0 - value.mean)


def _at_least(least: float) -> Rule:
    return Rule(f"mean at least {least:g}", lambda value: value.mean - least)


def _at_most(most: float) -> Rule:
    return Rule(f"mean at most {most:g}", lambda value: most - value.mean)


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        group: of problems.
        text: what must hold.
        value: the figure.
        unit: of the figure: points of accuracy, problems, or none.
        rule: when it holds.
        gap: by how much it holds, negative where it does not; NaN where it was not measured.
        won: wins/ties/losses over problems, where it is a difference.
        problems: number of problems that it was measured on.
        note: what was picked on the way.
    """

    group: str
    text: str
    value: Interval
    unit: str
    rule: str
    gap: float
    won: str
    problems: int
    note: str = ""

    @property
    def digits(self) -> int:
        """Decimals that the figure is shown with."""
        return {POINTS: 2, PROBLEMS: 0}.get(self.unit, 3)

    @property
    def holds(self) -> bool | None:
        """Whether it does; None where it was not measured. An interval that ends at 0 does not exclude it."""
        if isnan(self.gap):
            return None
        return self.gap > 0 or (self.gap == 0 and self.rule != _ABOVE.text)


def _claim(
    group: str, text: str, found: tuple[Interval, str, int], rule: Rule, *, unit: str = "", note: str = ""
) -> Claim:
    value, score, problems = found
    value = value.scaled(_POINTS) if unit == POINTS else value
    gap = nan if isnan(value.mean) else rule.margin(value)
    return Claim(group, text, value, unit, rule.text, gap, score, problems, note)


def difference(frame: pd.DataFrame, first: tuple[str, str], second: tuple[str, str]) -> tuple[Interval, str, int]:
    """The mean paired difference of two methods, wins/ties/losses and the number of problems.

    Args:
        frame: all rows.
        first: method and figure.
        second: method and figure that is subtracted.

    Returns:
        All three.
    """
    return _of_pairs(paired(frame, first, second), first[1])


def _of_pairs(both: pd.DataFrame, figure: str) -> tuple[Interval, str, int]:
    strata = grids(both, "difference")
    return over_problems(strata), won(both, figure in LOWER_IS_BETTER), sum(len(grid) for grid in strata)


def claims(frames: Mapping[str, pd.DataFrame]) -> list[Claim]:
    """The table of what must hold.

    Args:
        frames: all rows by group.

    Returns:
        Its rows, group by group, then those between groups.
    """
    found = [claim for name, frame in frames.items() if len(frame) for claim in claims_of(GROUPS[name], frame)]
    if MINI in frames and CLIP_GEOMETRY in frames:
        found += _between(frames[MINI], frames[CLIP_GEOMETRY])
    return found


def claims_of(group: Group, frame: pd.DataFrame) -> list[Claim]:
    """What must hold in a group.

    Args:
        group: which.
        frame: its rows.

    Returns:
        The rows of the table; what is about domains out of distribution only where there are any.
    """
    where = ["id", *(["ood"] if frame["ood_accuracy"].notna().any() else [])]
    adamw = "AdamW" if group.adamw == "adamw_class_residual" else "AdamW at fixed settings"
    found = [
        _claim(
            group.name,
            f"{w.upper()} accuracy, ours - {adamw}",
            difference(frame, (OURS, f"{w}_accuracy"), (group.adamw, f"{w}_accuracy")),
            _ABOVE,
            unit=POINTS,
        )
        for w in where
    ]
    found += [_to_the_best(group.name, frame), _below_zero_shot(group.name, frame)]
    for w in where:
        name = f"{w}_nll"
        best = lowest_nll(frame, name)
        found.append(
            _claim(
                group.name,
                f"{w.upper()} NLL, ours - {BEST_RIVAL}",
                difference(frame, (OURS, name), (best, name)),
                _NOT_ABOVE,
                note=f"lowest mean: {best}" if best else "",
            )
        )
    for w in where:
        for shots, text in _SHOTS:
            part = frame[frame["shots"].isin(shots)]
            if len(part):
                found.append(
                    _claim(
                        group.name,
                        f"{w.upper()} ECE, {text}, ours - {adamw}",
                        difference(part, (OURS, f"{w}_ece"), (group.adamw, f"{w}_ece")),
                        _NOT_ABOVE,
                    )
                )
    return found + _further(group, frame, where)


def rivals_of(frame: pd.DataFrame) -> list[str]:
    """The methods of other people that there are rows of."""
    return sorted(set(frame["method"]) - set(OWN))


def lowest_nll(frame: pd.DataFrame, figure: str) -> str:
    """The rival whose mean is lowest over the problems that ours has rows of, if all rivals' rows are there.

    Args:
        frame: rows of a group.
        figure: ``id_nll`` or ``ood_nll``.

    Returns:
        Its name; empty without any.
    """
    rows = frame[frame["method"].isin(rivals_of(frame))]
    table = rows.pivot_table(index=PROBLEM, columns="method", values=figure)
    whole = table.loc[:, table.notna().all()]
    return str(whole.mean().idxmin()) if whole.size else ""


def _to_the_best(group: str, frame: pd.DataFrame) -> Claim:
    """Ours against the rival of the highest mean accuracy, of each problem by itself."""
    figure = "id_accuracy"
    table = frame[frame["method"].isin(rivals_of(frame))].pivot_table(index=PROBLEM, columns="method", values=figure)
    best = table.idxmax(axis=1).rename("best")
    picked = frame.merge(best.reset_index(), on=PROBLEM)
    picked = picked[picked["method"] == picked["best"]].assign(method=BEST_RIVAL)
    found = difference(pd.concat([frame, picked]), (OURS, figure), (BEST_RIVAL, figure))
    counts = ", ".join(f"{name} {count}" for name, count in best.value_counts().items())
    text = f"ID accuracy, ours - {BEST_RIVAL} of each problem, picked afterwards"
    return _claim(group, text, found, _at_least(-_BEHIND), unit=POINTS, note=counts)


def _below_zero_shot(group: str, frame: pd.DataFrame) -> Claim:
    """How many problems training makes worse."""
    both = paired(frame, (OURS, "id_accuracy"), (ZERO_SHOT, "id_accuracy"))
    means = both.groupby(PROBLEM)["difference"].mean()
    below = means[means < 0]
    value = exactly(float(len(below))) if len(means) else NOTHING
    note = "; ".join(f"{data} {domain} {shots}: {100 * gap:.1f}" for (data, domain, shots), gap in below.items())
    rule = Rule("none", lambda value: 0.0 - value.mean)
    return _claim(
        group,
        "problems whose mean ID accuracy is below zero-shot's",
        (value, "", len(means)),
        rule,
        unit=PROBLEMS,
        note=note,
    )


def _between(mini: pd.DataFrame, clip: pd.DataFrame) -> list[Claim]:
    """The same problems of ours in both geometries."""
    both = pd.concat([mini.assign(method="mini " + mini["method"]), clip.assign(method="clip " + clip["method"])])
    found = []
    for figure, most in (("accuracy", _SAME_ACCURACY), ("nll", _SAME_NLL)):
        for w in ("id", "ood"):
            name = f"{w}_{figure}"
            strata = grids(paired(both, (f"clip {OURS}", name), (f"mini {OURS}", name)), "difference")
            text = f"{w.upper()} {figure if figure == 'accuracy' else 'NLL'}, |ours here - ours by the mini CLIP|"
            value = over_problems(strata, absolute=True)
            count = sum(len(grid) for grid in strata)
            found.append(
                _claim(
                    CLIP_GEOMETRY, text, (value, "", count), _at_most(most), unit=POINTS if figure == "accuracy" else ""
                )
            )
    return found


def _further(group: Group, frame: pd.DataFrame, where: Sequence[str]) -> list[Claim]:
    """Steps, a single pass, and telling other domains apart, where there are rows to say it by."""
    there = set(frame["method"])
    found = []
    if {OURS, group.adamw} <= there:
        found += _steps(group, frame)
    if {OURS, ADAMW_ONCE} <= there:
        for w in where:
            name = f"{w}_accuracy"
            text = f"single pass of both, {w.upper()} accuracy, ours - AdamW"
            pair = difference(frame, (OURS, name), (ADAMW_ONCE, name))
            found.append(_claim(group.name, text, pair, _at_least(_LEAD), unit=POINTS))
    if {OURS, "laplace"} <= there and "ood" in where:
        text = "AUROC OOD against ID, ours by variance - laplace by variance"
        pair = difference(frame, (OURS, "auroc_variance"), ("laplace", "auroc_variance"))
        found.append(_claim(group.name, text, pair, _ABOVE))
    return found


def _steps(group: Group, frame: pd.DataFrame) -> list[Claim]:
    """Steps to AdamW's final accuracy, as parts of those that AdamW takes to it, and of its whole run."""
    parts = [_curves(part, group.adamw) for _, part in frame.groupby("data")]
    strata = [problems for problems in parts if problems]
    rule = Rule("median over problems at most a quarter", lambda value: _QUARTER - value.mean)
    count = sum(map(len, strata))
    if not strata:
        return []
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
    texts = ("steps to AdamW's final ID accuracy / AdamW's own steps to it", "the same / steps of AdamW's whole run")
    for n, text in enumerate(texts):
        value = of_replicates(_median([pair[n] for pair in flat]), drawn[n])
        reached = sum(pair[n] < inf for pair in flat)
        found.append(_claim(group.name, text, (value, "", count), rule, note=f"reached in {reached} of {count}"))
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


def _curves(frame: pd.DataFrame, adamw: str) -> list[_Pair]:
    """The problems of a data set that both methods have curves of."""
    found = []
    for _, part in frame[frame["method"].isin((OURS, adamw))].groupby(PROBLEM):
        sides = [part[part["method"] == method].sort_values("seed") for method in (OURS, adamw)]
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
