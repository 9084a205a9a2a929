"""The environment of a run, and its tables as Markdown."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

from kngd_ray.experiment.environment import describe_environment


def environment() -> dict[str, Any]:
    """Versions, processor, threads, load and date; to be asked before measuring, whose own load would be in it."""
    info = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return json.loads(describe_environment()) | {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "load": round(psutil.getloadavg()[0], 2),
        "date": date.today().isoformat(),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of a run.

    Args:
        found: what step_cost.json holds.

    Returns:
        Its environment, the steps of each case, and the steps on ranks.
    """
    e, lines = found["environment"], found["lines"]
    gpus = f", {', '.join(e['gpus'])}" if e["gpus"] else ""
    blocks = [
        f"{e['cpu']}, {e['cores']} cores{gpus}, torch {e['packages']['torch']}, {e['date']}, load {e['load']} before."
    ]
    one = [line for line in lines if line["part"] == "main"]
    keys = dict.fromkeys((line["case"], line["device"]) for line in one)
    blocks += [_steps([x for x in one if (x["case"], x["device"]) == key]) for key in keys]
    blocks.append(_ranks([line for line in lines if line["part"] == "W"]))
    return "\n\n".join(blocks)


def fill(section: str, text: str) -> None:
    """Put tables into benchmarks/README.md, so that no number there is typed.

    Args:
        section: name of the comments that the tables stand between.
        text: the tables.
    """
    begin, end = f"<!-- {section} -->\n", f"<!-- /{section} -->"
    readme = Path(__file__).parents[1] / "README.md"
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}{text}\n{end}{rest.split(end)[1]}")


def _steps(lines: Sequence[Mapping[str, Any]]) -> str:
    first = lines[0]
    title = f"**{first['case']}**: n = {first['n']:,}, M = {first['M']}, {first['device']}, {first['threads']} threads"
    head = ["", "floor ms", "median ms", "min ms", "x AdamW", "state, floats / n", "peak, floats / n"]
    return _table(
        title,
        head,
        [
            [
                x["method"],
                _number(x["floor_ms"]),
                _number(x["ms_median"]),
                _number(x["ms_min"]),
                _number(x["x_adamw"]),
                _number(x["state_bytes"], 1 / 4 / x["n"]),
                _number(x["peak_bytes"], 1 / 4 / x["n"]),
            ]
            for x in lines
        ],
    )


def _ranks(lines: Sequence[Mapping[str, Any]]) -> str:
    title = f"**{lines[0]['case']}** on gloo ranks of one thread each, the global batch fixed"
    head = ["", "ranks", "floor ms", "median ms", "x AdamW", "covariance per rank, kB", "received per step, kB"]
    return _table(
        title,
        head,
        [
            [
                x["method"],
                str(x["ranks"]),
                _number(x["floor_ms"]),
                _number(x["ms_median"]),
                _number(x["x_adamw"]),
                _number(x["covariance_bytes_per_rank"], 1e-3),
                _number(x["bytes_per_step"], 1e-3),
            ]
            for x in sorted(lines, key=lambda x: x["method"])
        ],
    )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [title, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _number(value: float | None, factor: float = 1.0) -> str:
    return (
        "" if value is None else f"{value * factor:,.{2 if value * factor < 10 else 1 if value * factor < 100 else 0}f}"
    )
