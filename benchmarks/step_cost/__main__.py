"""Command line of :mod:`benchmarks.step_cost`."""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cost.cases import GROWING_M, GROWING_N, MAIN, REFERENCE, Case, methods
from benchmarks.step_cost.floors import Rates, work_of
from benchmarks.step_cost.memory import memory_of
from benchmarks.step_cost.plots import draw
from benchmarks.step_cost.ranks import on_ranks
from benchmarks.step_cost.report import environment, fill, markdown
from benchmarks.step_cost.timing import interleaved
from kngd_ray.sharding import SingleProcess

_RESULTS = Path(__file__).parents[1] / "results"
Line = dict[str, Any]


def main() -> None:
    """Measure and print, or print what was measured."""
    import benchmarks.step_cost as package

    parser = argparse.ArgumentParser(
        "python -m benchmarks.step_cost",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON line per measurement on stdout")
    parser.add_argument("--out", type=Path, help="folder for step_cost.json and the plots")
    parser.add_argument("--quick", action="store_true", help="few repeats of the main cases, under a minute")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="measure nothing, put the tables of results/step_cost.json into benchmarks/README.md",
    )
    options = parser.parse_args()
    if options.markdown:
        fill("step_cost", markdown(json.loads((_RESULTS / "step_cost.json").read_text())))
        return
    before, lines = environment(), []
    for line in measured(options.quick):
        lines.append(line)
        if options.json:
            print(json.dumps(line), flush=True)
        else:
            print(f"{line['case']}: {line['method']}", file=sys.stderr, flush=True)
    found = {"environment": before, "lines": lines}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "step_cost.json").write_text(json.dumps(found, indent=1) + "\n")
        draw(lines, options.out)
    if not options.json:
        print(markdown(found))


def measured(quick: bool) -> Iterator[Line]:
    """All measurements, each as soon as it is there."""
    seconds = 1.0 if quick else 12.0
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        yield from on_device(device, quick=quick, seconds=seconds)
    rates = Rates.measured("cpu", threads=1)
    for ranks in (1, 2) if quick else (1, 2, 3, 4):
        yield from _ranks(MAIN[0], ranks, rates, seconds)


def on_device(device: str, *, quick: bool, seconds: float, cases: int | None = None) -> Iterator[Line]:
    """The measurements of one process.

    Args:
        device: where.
        quick: the main cases alone, and the memory of the first of them.
        seconds: of the steps of a case.
        cases: how many of the main ones; None is all.

    Yields:
        A line for each case and method.
    """
    rates = Rates.measured(device)
    for number, case in enumerate(MAIN[:cases]):
        yield from _steps("main", case, device, rates, seconds, memory=not quick or number == 0)
    for part, growing in {} if quick else {"n": GROWING_N, "M": GROWING_M}.items():
        for case in growing:
            yield from _steps(part, case, device, rates, seconds, memory=False)


def _steps(part: str, case: Case, device: str, rates: Rates, seconds: float, memory: bool) -> Iterator[Line]:
    group = SingleProcess()
    made = {name: make(case, device, group) for name, make in methods(case).items()}
    batch = case.batch(device, group)
    times = interleaved(made, batch, seconds)
    held = {name: method.step(batch).covariance_bytes for name, method in made.items()}
    del made
    for name in times:
        line = _line(part, case, name, device, times[name], times[REFERENCE]) | _floor(name, case, rates)
        found = memory_of(case, name, device) if memory else None
        yield line | {
            "covariance_bytes_per_rank": held[name],
            "bytes_per_step": 0,
            "peak_bytes": None if found is None else found.peak_bytes,
            "state_bytes": None if found is None else found.state_bytes,
        }


def _ranks(case: Case, ranks: int, rates: Rates, seconds: float) -> Iterator[Line]:
    figures = on_ranks(case, ranks, seconds)
    with_core = min(ranks, os.cpu_count() or 1)
    for name, found in figures.items():
        line = _line("W", case, name, "cpu", found.times, figures[REFERENCE].times)
        yield (
            line
            | _floor(name, case, rates, with_core)
            | {
                "ranks": ranks,
                "threads": 1,
                "covariance_bytes_per_rank": found.covariance_bytes,
                "bytes_per_step": found.bytes_moved,
                "peak_bytes": None,
                "state_bytes": None,
            }
        )


def _floor(name: str, case: Case, rates: Rates, cores: int = 1) -> Line:
    work = work_of(name, case)
    return {"floor_ms": None if work is None else _ms(work.seconds(rates) / cores)}


def _line(part: str, case: Case, name: str, device: str, times: Sequence[float], reference: Sequence[float]) -> Line:
    return {
        "part": part,
        "case": case.name,
        "method": name,
        "device": device,
        "ranks": 1,
        "threads": torch.get_num_threads(),
        "n": case.n,
        "M": case.m * case.k,
        "ms_median": _ms(statistics.median(times)),
        "ms_min": _ms(min(times)),
        "x_adamw": round(statistics.median(times) / statistics.median(reference), 2),
        "repeats": len(times),
    }


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


if __name__ == "__main__":
    main()
