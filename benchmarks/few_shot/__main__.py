"""The command line: run what is missing, print a line per problem and method, write the report."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "few_shot"
_MOST_THREADS = 2


def main() -> None:
    """Read the options, then run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.few_shot", description=_description())
    parser.add_argument(
        "--data", nargs="+", default=["embedded"], help="parquet files of the package's schema; embedded"
    )
    parser.add_argument("--domains", nargs="+", help="domains to train on; by default each, of the emoji noto")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=10, help="number of support sets")
    parser.add_argument("--methods", nargs="+", help="by default all")
    parser.add_argument("--trials", type=int, default=60, help="of each search")
    parser.add_argument("--threads", type=int, default=1, choices=range(1, _MOST_THREADS + 1))
    parser.add_argument("--dev", action="store_true", help="training pictures stand for the test sets")
    parser.add_argument("--again", nargs="+", default=[], help="methods whose rows are computed even if they are there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--json", action="store_true", help="lines in JSON")
    parser.add_argument("--report", action="store_true", help="write report.html with its figures")
    parser.add_argument("--report-only", action="store_true", help="compute nothing")
    args = parser.parse_args()
    # before torch is imported: idle threads that wait for one another cost more than they bring
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)
    _run(args, parser)


def _description() -> str:
    return (__doc__ or "") + " See benchmarks/few_shot/__init__.py."


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    # laplace-torch's dependencies compile when they are imported
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
    import torch
    from threadpoolctl import threadpool_limits

    from benchmarks.few_shot.data import DataSet
    from benchmarks.few_shot.methods import METHODS
    from benchmarks.few_shot.report import lines, write_report
    from benchmarks.few_shot.run import Plan, Runner
    from benchmarks.few_shot.store import Store

    torch.set_num_threads(args.threads)
    unknown = sorted({*(args.methods or ()), *args.again} - set(METHODS))
    if unknown:
        parser.error(f"unknown methods: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if min(args.shots) < 1 or args.seeds < 1 or args.trials < 1:
        parser.error("--shots, --seeds and --trials are 1 or more")
    own = args.out or RESULTS
    store = Store(own / "dev", own / "searches") if args.dev else Store(own)
    methods = args.methods or list(METHODS)
    plan = Plan(args.shots, args.seeds, methods, args.trials, args.domains, args.again)
    with threadpool_limits(args.threads):
        for path in [] if args.report_only else args.data:
            for rows in Runner(DataSet(path, dev=args.dev), plan, store, _say).run():
                _print(lines(rows), as_json=args.json)
        if args.report or args.report_only:
            _say(f"wrote {write_report(store, methods)}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print(found: list[dict[str, Any]], *, as_json: bool) -> None:
    for line in found:
        if as_json:
            print(json.dumps(line), flush=True)
            continue
        head = f"{line['data']:<12} {line['domain']:<14} {line['shots']:>2} {line['method']:<28}"
        cells = [
            f"{name} {f['mean']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" for name, f in line["figures"].items() if f
        ]
        print(head, "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
