"""The report's means and claims in Markdown, from ``summary.json``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.few_shot.groups import GROUPS

_COLUMNS = [f"{where}_{figure}" for where in ("id", "ood") for figure in ("accuracy", "nll", "ece")]
_HEAD = ["", "ID %", "NLL", "ECE", "OOD %", "NLL", "ECE"]


def markdown(summary: Path) -> str:
    """Tables of every group.

    Args:
        summary: ``summary.json`` of a report.

    Returns:
        For each group its means over problems, then what must hold, as far as it was measured.
    """
    groups: dict[str, Any] = json.loads(summary.read_text())["groups"]
    return "\n\n".join(_group(name, group) for name, group in groups.items())


def _group(name: str, group: dict[str, Any]) -> str:
    parts = [f"**{GROUPS[name].title}**, {group['problems']} problems", _table(_HEAD, _means(group["means"]))]
    judged = [claim for claim in group["must_hold"] if claim["holds"] is not None]
    if judged:
        parts.append(_table(["must hold", "value", "rule", "gap", "verdict"], [_claim(claim) for claim in judged]))
    return "\n\n".join(parts)


def _means(means: dict[str, Any]) -> list[list[str]]:
    measured = [method for method in means if means[method]["id_accuracy"] is not None]
    order = sorted(measured, key=lambda method: -means[method]["id_accuracy"]["mean"])
    return [[method, *(_mean(means[method][name], name) for name in _COLUMNS)] for method in order]


def _mean(value: dict[str, float] | None, name: str) -> str:
    if value is None:
        return ""
    return f"{100 * value['mean']:.1f}" if name.endswith("accuracy") else f"{value['mean']:.3f}"


def _claim(claim: dict[str, Any]) -> list[str]:
    digits, value = claim["digits"], claim["value"]
    cell = "{mean:.{n}f} [{low:.{n}f}, {high:.{n}f}]" if digits else "{mean:.0f}"
    verdict = "holds" if claim["holds"] else "does not"
    text = claim["text"].replace("|", "\\|")
    return [text, cell.format(n=digits, **value), claim["rule"], f"{claim['gap']:+.{digits}f}", verdict]


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
