"""The faults that a run survives, counted: the table of docs/reliability.md.

    python -m benchmarks.reliability [--only WORDS] [--again]     runs what is not counted yet, row by row
    python -m benchmarks.reliability --markdown                   writes its tables into docs/reliability.md

A row is a set of tests: what is counted is what is tested, with real processes. Each row is kept in
``results/reliability.json`` as soon as it is done, and not run again unless ``--again`` is given. A test may say how
often it tried, how many tries survived, and after how many seconds each went on; one that says nothing is one try. The
rows on storage, tracking and damaged files come from ``results/reliability_storage.json``, see
``benchmarks.reliability_storage``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

from benchmarks import soak
from kngd_ray.experiment.environment import describe_environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "reliability.md"
STORAGE_ROWS = "<!-- storage rows -->"

# fault, what must hold, tests, how often each is run
ROWS: tuple[tuple[str, str, str, int], ...] = (
    (
        "SIGKILL of one Train worker of two, at a random step",
        "goes on from the last committed checkpoint; theta and P at the end are bitwise those of an unkilled run",
        "tests/ray/test_worker_deaths.py::test_killed_at_a_random_step",
        1,
    ),
    (
        "SIGKILL inside the write of a checkpoint: 12 points, 1 and 2 ranks",
        "a torn checkpoint is never used, and the run continues from the one before; the end is bitwise the same",
        "tests/ray/test_worker_deaths.py::test_killed_inside_a_checkpoint",
        1,
    ),
    (
        "a node of two dies, a spare one is there, `num_workers: [1, 2]`",
        "goes on with 2 ranks",
        "tests/ray/test_node_death.py::test_a_job_goes_on_with_the_nodes_that_are_left[spare]",
        3,
    ),
    (
        "a node of two dies, no spare, `num_workers: [1, 2]`",
        "goes on with 1 rank, P resharded: bitwise what one process makes of the checkpoint of two",
        "tests/ray/test_node_death.py::test_a_job_goes_on_with_the_nodes_that_are_left[no-spare]",
        3,
    ),
    (
        "the head dies and another one is started",
        "the command ends with one sentence; `--resume` on the new head ends bitwise as an unkilled run",
        "tests/ray/test_head_restart.py::test_a_head_that_is_switched_off",
        3,
    ),
    (
        "the driver is killed, its cluster lives on",
        "its workers end; a second driver is refused while it lives; `--resume` ends bitwise as an unkilled run",
        "tests/ray/test_head_restart.py::test_a_driver_killed_beside_a_head_that_lives_on",
        3,
    ),
    (
        "the driver and all its processes are killed, 0 and 2 workers",
        "`--resume` by name ends bitwise as an unkilled run, with the same figures",
        "tests/ray/test_killed_driver.py",
        3,
    ),
)


def count(tests: str, runs: int) -> dict[str, Any]:
    """Run the tests of a row; tries, those that survived, seconds until each went on, and why others did not."""
    row: dict[str, Any] = {"tries": 0, "survived": 0, "seconds": [], "lost_because": []}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1"]
        command += [f"--junitxml={report}", tests]
        for _ in range(runs):
            subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
            for case in ElementTree.parse(report).iter("testcase"):
                said = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
                wrong = [*case.iter("failure"), *case.iter("error")]
                tries = int(said.get("tries") or 1)
                row["tries"] += tries
                row["survived"] += int(said.get("survived") or 0) if "survived" in said else tries * (not wrong)
                row["seconds"] += json.loads(said.get("seconds") or "[]")
                row["lost_because"] += [str(one.get("message")).splitlines()[0] for one in wrong]
    row["lost"] = row["tries"] - row["survived"]
    return {**row, "minutes_in_all": round((time.monotonic() - began) / 60, 1), "load": round(os.getloadavg()[1], 1)}


def run(only: str, again: bool) -> None:
    """Count the rows that are not counted yet."""
    kept = _kept("reliability.json")
    for fault, must_hold, tests, runs in ROWS:
        if only not in fault or (not again and any(row["fault"] == fault for row in kept)):
            continue
        row = {"fault": fault, "must_hold": must_hold, "tests": tests, **count(tests, runs)}
        row["environment"] = json.loads(describe_environment())
        order = [name for name, *_ in ROWS]
        kept = sorted([*(r for r in kept if r["fault"] != fault), row], key=lambda r: order.index(r["fault"]))
        (RESULTS / "reliability.json").write_text(json.dumps(kept, indent=1) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "environment"}), flush=True)


def _kept(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else []


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of Markdown."""
    lines = []
    for row in rows:
        seconds = [value for value in row.get("seconds") or [] if value is not None]
        shown = ""
        if seconds:
            shown = f"{median(seconds):.1f}" + (f" (most {max(seconds):.1f})" if len(seconds) > 1 else "")
        lines.append(
            f"| {row['fault']} | {row['must_hold']} | {row['tries']} | {row['survived']} | {row['lost']} | {shown} |"
        )
    return lines


def write_document() -> None:
    """Put the tables in their places."""
    faults = [
        "| fault | what holds | tries | survived | lost | median seconds until it went on (most) |",
        "|---|---|---|---|---|---|",
        *table(_kept("reliability.json")),
        *(table(_kept("reliability_storage.json")) or [STORAGE_ROWS]),
    ]
    text = _between(DOCUMENT.read_text(), "faults", faults)
    if soak.RESULTS.is_file():
        text = _between(text, "soak", [soak.markdown(json.loads(soak.RESULTS.read_text()))])
    DOCUMENT.write_text(text)


def _between(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with what stands between two comments replaced."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{DOCUMENT} lacks {start} or {end}")
    return before + "\n".join([start, *lines, end]) + after


def main() -> None:
    """Count, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose fault has these words")
    parser.add_argument("--again", action="store_true", help="also those that are counted")
    parser.add_argument("--markdown", action="store_true", help="write the tables into the document")
    args = parser.parse_args()
    if args.markdown:
        write_document()
    else:
        run(args.only, args.again)


if __name__ == "__main__":
    main()
