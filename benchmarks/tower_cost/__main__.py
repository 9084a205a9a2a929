"""Command line of :mod:`benchmarks.tower_cost`."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.step_cost.floors import Rates
from benchmarks.step_cost.report import environment, fill
from benchmarks.tower_cost.cases import FAMILIES, REFERENCE, Case
from benchmarks.tower_cost.floors import Sizes, work_of
from benchmarks.tower_cost.memory import peak_of
from benchmarks.tower_cost.network import Link, table
from benchmarks.tower_cost.ranks import on_ranks
from benchmarks.tower_cost.timing import in_turns, stages
from kngd_ray.sharding import SingleProcess

_RESULTS = Path(__file__).parents[1] / "results"
_FILE = "tower_cost.json"
_WORLDS = (1, 8, 32, 128, 512, 1024)
Line = dict[str, Any]


def main() -> None:
    """Measure and print, or print what was measured."""
    import benchmarks.tower_cost as package

    parser = argparse.ArgumentParser(
        "python -m benchmarks.tower_cost",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [REFERENCE, *FAMILIES]
    parser.add_argument("--model", default="small-vit", help="small-vit, embedded, or a model of open_clip")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step")
    parser.add_argument("--method", default="adamw,ekf,vdekf", help=f"of {', '.join(names)}, AdamW always first")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the towers")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each method that count")
    parser.add_argument("--ranks", type=int, default=1, help="also one step on so many gloo ranks")
    parser.add_argument("--simulate", action="store_true", help="measure nothing: 1 to 1024 ranks on paper")
    parser.add_argument("--json", action="store_true", help="one JSON line per method on stdout")
    parser.add_argument("--out", type=Path, help=f"folder of {_FILE}, whose lines of the same case are replaced")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, fill benchmarks/README.md")
    options = parser.parse_args()
    if options.markdown:
        fill("tower_cost", markdown(json.loads((_RESULTS / _FILE).read_text())))
        return
    if options.simulate:
        print(table(Case(options.model, options.batch, "float32", "cpu"), _WORLDS, Link()))
        return
    methods = list(dict.fromkeys([REFERENCE, *options.method.split(",")]))
    if unknown := sorted({*methods} - {*names}):
        parser.error(f"there is no method {unknown[0]}; choose of {', '.join(names)}")
    torch.set_num_threads(options.threads)
    before = environment()
    case = Case(options.model, options.batch, options.precision, options.device)
    lines = []
    for line in measured(case, methods, options.threads, options.rounds, options.ranks):
        lines.append(line | {"load": before["load"]})
        if options.json:
            print(json.dumps(lines[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / _FILE
        kept = json.loads(path.read_text())["lines"] if path.exists() else []
        kept = [line for line in kept if _case(line) != _case(lines[0])]
        path.write_text(json.dumps({"environment": before, "lines": kept + lines}, indent=1) + "\n")
    if not options.json:
        print(markdown({"environment": before, "lines": lines}))


def measured(case: Case, methods: Sequence[str], threads: int, rounds: int, ranks: int) -> Iterator[Line]:
    """A line for each method: floors first, then memory, then times."""
    rates, network, group = [Rates.measured(case.device)], case.network(), SingleProcess()
    sizes, batch = Sizes.of(network), case.batch(network, group)
    works = {name: work_of(name, sizes, case.m) for name in methods}
    del network
    peaks = {name: peak_of(case, name, threads) for name in methods}
    made = {name: case.method(name, case.network(), group) for name in methods}
    times = in_turns(made, batch, rounds)
    wall, own = ({name: median(t[which] for t in times[name]) for name in methods} for which in (0, 1))
    rates.append(Rates.measured(case.device))  # of two times, one may have been of a busy machine
    best = Rates(max(rate.flops for rate in rates), max(rate.bytes for rate in rates))
    least = works[REFERENCE]
    assert least is not None
    for name in methods:
        work, filtered = works[name], name != REFERENCE
        shared = on_ranks(case, name, ranks) if filtered and ranks > 1 else None
        yield {
            "model": case.model,
            "batch": case.m,
            "device": case.device,
            "precision": case.precision,
            "threads": threads,
            "method": name,
            "n": sizes.n,
            "floor_ms": None if work is None else _rounded(work.seconds(best) * 1e3),
            "predicted_x": None if work is None else _rounded(work.seconds(best) / least.seconds(best)),
            "ms_median": _rounded(wall[name] * 1e3),
            "ms_min": _rounded(min(t[0] for t in times[name]) * 1e3),
            "cpu_ms_median": _rounded(own[name] * 1e3),
            "x_adamw": _rounded(wall[name] / wall[REFERENCE]),
            "cpu_x_adamw": _rounded(own[name] / own[REFERENCE]),
            "peak_bytes": peaks[name],
            "peak_x_adamw": _rounded(peaks[name] / peaks[REFERENCE]),
            "stages_ms": stages(made[name], batch, rounds) if filtered else None,
            "covariance_bytes": made[name].step(batch).covariance_bytes,
            "ranks": ranks,
            "covariance_bytes_per_rank": shared and shared[0],
            "bytes_per_step": shared and shared[1],
            "rounds": rounds,
        }


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of a run, one for each case."""
    e, lines = found["environment"], found["lines"]
    gpus = f", {', '.join(e['gpus'])}" if e["gpus"] else ""
    blocks = [f"{e['cpu']}, {e['cores']} cores{gpus}, torch {e['packages']['torch']}, {e['date']}."]
    for case in dict.fromkeys(map(_case, lines)):
        mine = [line for line in lines if _case(line) == case]
        first = mine[0]
        head = [
            "",
            "floor ms",
            "predicted x",
            "median ms",
            "x AdamW",
            "x AdamW, CPU time",
            "peak MB",
            "x AdamW",
            "stages",
        ]
        rows = [
            [
                line["method"],
                _text(line["floor_ms"]),
                _text(line["predicted_x"]),
                _text(line["ms_median"]),
                _text(line["x_adamw"]),
                _text(line["cpu_x_adamw"]),
                _text(line["peak_bytes"] / 1e6),
                _text(line["peak_x_adamw"]),
                ", ".join(f"{stage} {ms:.3g}" for stage, ms in (line["stages_ms"] or {}).items()),
            ]
            for line in mine
        ]
        title = (
            f"**{first['model']}**, {first['n']:,} weights, batch {first['batch']}, {first['device']}, "
            f"{first['precision']}, {first['threads']} threads, load {first['load']} before"
        )
        table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows)]
        blocks.append("\n".join([title, "", *table]))
        for line in mine:
            if line["covariance_bytes_per_rank"]:
                held, whole, moved = (
                    f"{line[key] / 1e6:,.1f} MB"
                    for key in ("covariance_bytes_per_rank", "covariance_bytes", "bytes_per_step")
                )
                blocks.append(f"{line['method']} on {line['ranks']} ranks: {held} of {whole} on each, {moved} moved.")
    return "\n\n".join(blocks)


def _case(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("model", "batch", "device", "precision", "threads"))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
