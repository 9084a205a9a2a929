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
        "--data",
        nargs="+",
        default=["embedded"],
        help="parquet files of pictures or of features; embedded; made data: many, many200",
    )
    parser.add_argument("--geometry", choices=["mini", "clip"], default="mini", help="of the pictures' features")
    parser.add_argument("--views", type=int, default=0, help="random crops of each shot that methods learn from too")
    parser.add_argument(
        "--class-embeddings",
        type=Path,
        help="text embeddings of a file of features; by default NAME_text.npy beside it",
    )
    parser.add_argument("--logit-scale", type=float, default=100.0, help="of the model that features are from")
    parser.add_argument("--domains", nargs="+", help="domains to train on; by default each, of the emoji noto")
    parser.add_argument("--shots", nargs="+", type=int, help="by default 1 2 4 8 16; of made data 1 2")
    parser.add_argument("--seeds", type=int, help="number of support sets, by default 10; of made data 3")
    parser.add_argument("--methods", nargs="+", help="by default those of the data's group: see groups.py")
    parser.add_argument("--trials", type=int, default=60, help="of each search")
    parser.add_argument("--threads", type=int, default=1, choices=range(1, _MOST_THREADS + 1))
    parser.add_argument("--dev", action="store_true", help="training pictures stand for the test sets")
    parser.add_argument("--again", nargs="+", default=[], help="methods whose rows are computed even if they are there")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--json", action="store_true", help="lines in JSON")
    parser.add_argument("--report", action="store_true", help="write report.html with its figures")
    parser.add_argument("--report-only", action="store_true", help="compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the report that is there, only")
    args = parser.parse_args()
    if args.markdown:
        _print_tables(args.out or RESULTS, dev=args.dev)
        return
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

    from benchmarks.few_shot.groups import GROUPS, open_data, store_of
    from benchmarks.few_shot.methods import METHODS
    from benchmarks.few_shot.report import lines, write_report
    from benchmarks.few_shot.run import Plan, Runner
    from kngd_ray.errors import KngdError

    torch.set_num_threads(args.threads)
    unknown = sorted({*(args.methods or ()), *args.again} - set(METHODS))
    if unknown:
        parser.error(f"unknown methods: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    if min(args.shots or [1]) < 1 or (args.seeds or 1) < 1 or args.trials < 1:
        parser.error("--shots, --seeds and --trials are 1 or more")
    if not args.logit_scale > 0:
        parser.error("--logit-scale is above 0")
    if args.class_embeddings is not None and len(args.data) > 1:
        parser.error("--class-embeddings belongs to one file of features: name that one alone with --data")
    if args.views:
        _check_views(args, parser)
    own = args.out or RESULTS
    with threadpool_limits(args.threads):
        for path in [] if args.report_only else args.data:
            try:
                data = open_data(
                    path,
                    dev=args.dev,
                    geometry=args.geometry,
                    views=args.views,
                    class_embeddings=args.class_embeddings,
                    logit_scale=args.logit_scale,
                )
            except KngdError as error:
                parser.error(str(error))
            group = GROUPS[data.group]
            plan = Plan(
                args.shots or group.shots,
                args.seeds or group.seeds,
                args.methods or group.methods,
                args.trials,
                args.domains,
                args.again,
            )
            for rows in Runner(data, plan, store_of(data.group, own, dev=args.dev), _say).run():
                _print(lines(rows), as_json=args.json)
        if args.report or args.report_only:
            _say(f"wrote {write_report(own, args.methods, dev=args.dev)}")


def _check_views(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse crops of what has none, and of methods that would leave them out in silence."""
    from benchmarks.few_shot.data import has_features
    from benchmarks.few_shot.groups import LEARN_FROM_CROPS
    from benchmarks.few_shot.made import MADE

    if args.views < 0:
        parser.error("--views is 0 or more")
    if args.geometry == "clip" or any(path in MADE or has_features(path) for path in args.data):
        parser.error("--views is for pictures in the geometry of their own model")
    if deaf := [name for name in args.methods or () if name not in LEARN_FROM_CROPS]:
        parser.error(f"--views: {', '.join(deaf)} learns nothing from crops; there are {', '.join(LEARN_FROM_CROPS)}")


def _print_tables(folder: Path, *, dev: bool) -> None:
    from benchmarks.few_shot.tables import markdown

    print(markdown((folder / "dev" if dev else folder) / "summary.json"))


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
