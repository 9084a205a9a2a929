"""What a search of the default's priors is worth: its champion beside the preset, AdamW's champion and zero-shot.

    python -m benchmarks.few_shot --methods champion --shots 4 16 --data embedded pacs.parquet ...    its rows
    python -m benchmarks.few_shot.champions                                                           these tables

``champion`` is ``tune_configs/noise_priors.yaml``, searched as AdamW is: 60 trials for each data set and number of
shots, on the shots of one support set of each domain, by what folds of them say and by the prior of the space. Every
row is then fitted on ten support sets. The tables go to stdout as Markdown, or with ``--markdown`` into the README of
the benchmarks.
"""

import argparse
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path

import pandas as pd

from benchmarks.few_shot.boot import PROBLEM, grids, over_problems
from benchmarks.few_shot.claims import CHAMPION, OURS, ZERO_SHOT, difference
from benchmarks.few_shot.data import CLIP_GEOMETRY, CROPS, MINI, REAL
from benchmarks.few_shot.groups import GROUPS, store_of
from benchmarks.step_cost.report import fill

RESULTS = Path(__file__).parents[1] / "results" / "few_shot"
FIGURES = {
    "id_accuracy": "ID %",
    "id_nll": "ID NLL",
    "id_ece": "ID ECE",
    "ood_accuracy": "OOD %",
    "ood_nll": "OOD NLL",
    "ood_ece": "OOD ECE",
}


def main() -> None:
    """Print the tables, or put them where they belong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true")
    text = "\n\n".join(table for name in (MINI, CROPS, CLIP_GEOMETRY, REAL) for table in tables(name))
    if parser.parse_args().markdown:
        fill("champions", text)
    else:
        print(text)


def tables(group: str) -> list[str]:
    """Means and paired differences of a group of problems, of those that have a champion.

    Args:
        group: its name.

    Returns:
        Markdown.
    """
    store, adamw = store_of(group, RESULTS, dev=False), GROUPS[group].adamw
    methods = (ZERO_SHOT, adamw, OURS, CHAMPION)
    rows = store.all_rows(list(methods))
    has = rows[rows["method"] == CHAMPION][PROBLEM].drop_duplicates()
    rows = rows.merge(has, on=PROBLEM)
    shown = {name: heading for name, heading in FIGURES.items() if rows[name].notna().any()}
    return [
        f"**{GROUPS[group].title}**, {len(has)} problems of 4 and 16 shots",
        _table(["", *shown.values()], [[name, *_means(rows, name, shown)] for name in methods]),
        _table(
            ["champion less", *(f"{heading}, won/tied/lost" for heading in shown.values())],
            [[name, *_differences(rows, name, shown)] for name in (OURS, adamw)],
        ),
    ]


def _means(rows: pd.DataFrame, method: str, figures: Mapping[str, str]) -> list[str]:
    own = rows[rows["method"] == method]
    found = [over_problems(grids(own, name)).mean for name in figures]
    return [_number(value, name) for value, name in zip(found, figures, strict=True)]


def _differences(rows: pd.DataFrame, method: str, figures: Mapping[str, str]) -> list[str]:
    cells = []
    for name in figures:
        value, score, _ = difference(rows, (CHAMPION, name), (method, name))
        low, high = (_number(end, name, "+") for end in (value.low, value.high))
        cells.append(f"{_number(value.mean, name, '+')} [{low}, {high}] {score}")
    return cells


def _number(value: float, name: str, sign: str = "") -> str:
    if isnan(value):
        return ""
    return f"{100 * value:{sign}.1f}" if name.endswith("accuracy") else f"{value:{sign}.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
