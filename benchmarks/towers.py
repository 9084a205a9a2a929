"""Adapter, LoRA and full fine-tuning, each by tuned AdamW, CLIP-CITE and Kalman, on the same few photographs.

    python -m benchmarks.towers --choose eurosat.parquet pacs.parquet:photo pacs.parquet:sketch --epochs 3
    python -m benchmarks.towers --data pacs.parquet --domain photo --tuned benchmarks/results/towers_chosen.json
    python -m benchmarks.towers --markdown

Whatever trains towers starts where the head of the default preset ended, fitted on crops of the pictures too
(``tune.views``); the filter fits it again when they are trained (``tune.refit``). Every method is tuned by eight
trials: the learning rate of AdamW and of CLIP-CITE, the towers' prior variance for Kalman, by the NLL of held-out
training shots (two folds). It is one choice for all problems (``--choose``, the geometric mean over those named, shots
of a seed that no table reports), or one for the problem itself, by the support set of its first seed. The test pictures
are seen once, by the winner. Figures are of the mean of the weights, without tau; for Kalman *served* are those of its
predictions as ``kngd-ray train`` makes them: linearised, at the tau and the sharpening that folds of the head choose.
Gradient methods are served by their mean. Each fit is a process of its own, so that its peak memory is its own, unless
they are to run together; what is finished is kept and not computed again. What was tried for the presets is in
TOWERS_LOG.md beside this.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch

from kngd_ray.config import Config, load_config, override
from kngd_ray.console import with_interval
from kngd_ray.errors import FilterError
from kngd_ray.experiment.aggregate import interval
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.training.calibration import (
    AnyPredictor,
    Calibration,
    calibrate,
    calibrate_by_head,
    held_out_tasks,
    predictor_of,
)
from kngd_ray.training.evaluation import evaluate
from kngd_ray.training.fit import FitTask, fit
from kngd_ray.training.metrics import Scores
from kngd_ray.training.start import HeadStart

RESULTS = Path(__file__).parent / "results"
CHOICE_SEED = 10  # its shots choose for all problems
FOLDS = 2
WIDTH, WIDTHS = "filter.tower_logit_variance", (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RATES = (1e-5, 3e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
RATES_OF_ALL = (5e-6, 1.5e-5, 3e-5, 5e-5, 1e-4, 1.5e-4, 3e-4, 5e-4)
VIEWS = "head, views"  # what those that train towers start from
# what is run: settings, and what is tuned over which values
METHODS: dict[str, tuple[list[str], str, tuple[float, ...]]] = {
    "adapter adamw": (["method=adamw", "tune.views=0"], "optimizer.lr", tuple(10 * rate for rate in RATES)),
    "head": (["method=kalman", "tune.views=0"], "filter.logit_variance", (1000.0,)),
    VIEWS: (["method=kalman", "tune.parameters=lora", "epochs=0"], WIDTH, (0.0,)),
    "lora adamw": (["method=adamw", "tune.parameters=lora"], "optimizer.lr", RATES),
    "lora kalman": (["method=kalman", "tune.parameters=lora"], WIDTH, WIDTHS),
    "norm adamw": (["method=adamw", "tune.parameters=norm"], "optimizer.lr", RATES),
    "norm kalman": (["method=kalman", "tune.parameters=norm"], WIDTH, WIDTHS),
    "full adamw": (["method=adamw", "tune.parameters=full"], "optimizer.lr", RATES_OF_ALL),
    "full clip_cite": (["preset=clip_cite"], "optimizer.lr", RATES_OF_ALL),
    "full kalman": (["method=kalman", "tune.parameters=full"], WIDTH, WIDTHS),
    "full kalman_cite": (["preset=kalman_cite"], WIDTH, WIDTHS),
}


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--domain")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of the methods that train towers; default: each its preset's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--choose", nargs="+", metavar="DATA[:DOMAIN]", help="choose one value for all problems")
    parser.add_argument("--tuned", help="what --choose has kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--together", action="store_true", help="all fits in this process: their memory is not told")
    parser.add_argument("--mean-only", action="store_true", help="no predictions as served, a third of the time")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(args.threads)
        print(json.dumps(_one(json.loads(args.one))))
        return
    if args.markdown:
        problems = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("towers_from_head_*.json"))]
        for done in problems:
            print(_table(done))
        for less in (VIEWS, "norm adamw", "lora adamw", "full adamw", "full clip_cite"):
            print(_paired(problems, less))
        return
    tuned = json.loads(Path(args.tuned).read_text())["methods"] if args.tuned else {}
    if args.together or args.choose:
        torch.set_num_threads(args.threads)
    of_shots = "" if args.shots == 16 else f"_{args.shots}shots"
    if args.choose:
        _choose(args, RESULTS / f"towers_chosen{of_shots}.json")
        return
    where = (f"_{args.domain}" if args.domain else "") + of_shots
    path = RESULTS / f"towers_from_head_{Path(args.data).stem}{where}.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    done |= {
        "data": f"{Path(args.data).stem} {args.domain}" if args.domain else Path(args.data).stem,
        "shots": args.shots,
        "epochs": args.epochs,
        "environment": describe_environment(),
    }
    for seed in args.seeds:
        for method in args.methods:
            found = done.setdefault("methods", {}).setdefault(method, {})
            if str(seed) in found:
                continue
            job = {"method": method, "seed": seed, "data": args.data, "domain": args.domain, "shots": args.shots}
            job |= {
                "epochs": args.epochs,
                "together": args.together,
                "served": not args.mean_only,
                "best": found.get("best", tuned.get(method, {}).get("best")),
            }
            began = time.monotonic()
            result = _one(job) if args.together else _in_a_process(job, args.threads)
            found["best"], found["knob"] = result.pop("best"), METHODS[method][1]
            found["trials"] = result.pop("trials") or found.get("trials")
            found[str(seed)] = result
            path.write_text(json.dumps(done, indent=1))
            print(
                f"{method}, seed {seed}: {time.monotonic() - began:.0f} s", result["id"], result.get("ood"), flush=True
            )
    print(_table(done))


def _in_a_process(job: dict[str, Any], threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.towers", "--one", json.dumps(job), "--threads", str(threads)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if ended.returncode:
        raise SystemExit(f"{job['method']}: {ended.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def _choose(args: argparse.Namespace, path: Path) -> None:
    """The value of each method with the least NLL of held-out training shots, geometric mean over the problems.

    Their NLLs differ by a factor of seven: an arithmetic mean would choose for the hardest of them.
    """
    chosen: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    chosen |= {"seed": CHOICE_SEED, "shots": args.shots, "epochs": args.epochs}
    methods = chosen.setdefault("methods", {})
    for method in args.methods:
        _, knob, values = METHODS[method]
        trials = methods.setdefault(method, {"knob": knob, "trials": {}})["trials"]
        for problem in args.choose if len(values) > 1 else []:
            data, _, domain = problem.partition(":")
            name = f"{Path(data).stem} {domain}".strip()
            job = {"method": method, "seed": CHOICE_SEED, "data": data, "domain": domain, "shots": args.shots}
            began = time.monotonic()
            with _opened(job | {"epochs": args.epochs}) as opened:
                for value in values:
                    found = trials.setdefault(f"{value:g}", {})
                    if name not in found:
                        found[name] = opened.held_out(knob, value)
                        path.write_text(json.dumps(chosen, indent=1))
            print(f"{method}, {name}: {time.monotonic() - began:.0f} s", flush=True)
        means = {value: geometric_mean(trials[f"{value:g}"].values()) if trials else 0.0 for value in values}
        methods[method]["best"] = min(means, key=lambda value: means[value])
        path.write_text(json.dumps(chosen, indent=1))
        print(method, methods[method]["best"], {value: round(nll, 4) for value, nll in means.items()}, flush=True)


@dataclass(frozen=True)
class _Opened:
    """The fits of a method on the shots of a seed.

    Attributes:
        config: with the method's settings.
        prepared: the data.
        folder: for the pictures.
    """

    config: Config
    prepared: TaskData
    folder: Path

    def task(self, config: Config) -> FitTask:
        """The fit that a configuration asks for."""
        prepared, seed = self.prepared, config.seeds[0]
        shots = prepared.shots(seed, config.tune, self.folder)
        scale, towers = prepared.model.logit_scale, prepared.towers(config.tune)
        head = HeadStart.of(config.fit_options, prepared.support(seed))
        return FitTask(config.fit_options, seed, shots, prepared.class_embeddings, scale, towers=towers, head=head)

    def held_out(self, knob: str, value: float) -> float:
        """NLL of the shots, each predicted by the mean of a fit on the other half; infinite where a fit fails."""
        config = override(self.config, {knob: value})
        found = []
        for part, held in held_out_tasks(self.task(config), FOLDS):
            try:
                predictor = predictor_of(fit(part), replace(config.posterior, predict="mean"), config.tune.alpha)
            except FilterError:
                return float("inf")
            found.append(Scores.of(predictor.predict(held.inputs, 0.0).probabilities, held.labels).nll)
        return fmean(found)


@contextmanager
def _opened(job: dict[str, Any]) -> Iterator[_Opened]:
    data = [f"data.path={job['data']}", f"data.shots={job['shots']}", f"seeds={job['seed']}", "trainer.num_workers=0"]
    data += [f"data.train_domain={job['domain']}"] if job["domain"] else []
    data.append("data.draw=first")  # as in the results that are kept
    config = load_config(overrides=[*METHODS[job["method"]][0], *data])
    if job["epochs"] and config.tune.images and config.epochs:
        config = replace(config, epochs=job["epochs"])
    with tempfile.TemporaryDirectory() as folder:
        yield _Opened(config, prepare(open_task(config)), Path(folder))


def _one(job: dict[str, Any]) -> dict[str, Any]:
    """Tune on the shots of seed 0 where that is not done, then fit and test one seed."""
    _, knob, values = METHODS[job["method"]]
    best, trials = job["best"], None
    with _opened(job) as opened:
        if best is None:
            trials = {value: opened.held_out(knob, value) for value in values}
            best = min(trials, key=lambda value: trials[value])
        config = override(opened.config, {knob: best})
        task = opened.task(config)
        began = time.monotonic()
        method = fit(task)
        seconds = time.monotonic() - began
        alone = not job.get("together")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 if alone else None
        tests = opened.prepared.tests(config.seeds[0], config.tune)
        predictor = predictor_of(method, replace(config.posterior, predict="mean"), config.tune.alpha)
        figures = _tested(predictor, tests, Calibration(0.0, 1.0))
        if config.method == "kalman" and job["served"]:
            choose = calibrate if task.head is None else calibrate_by_head
            chosen = choose(task, config.posterior)
            figures["served"] = _tested(predictor_of(method, config.posterior), tests, chosen)
            figures |= {"tau": chosen.tau, "sharpening": chosen.sharpening}
    figures |= {"seconds": seconds, "peak_mb": peak, "steps": task.sampler.steps}
    return {**figures, "best": best, "trials": trials}


def _tested(predictor: AnyPredictor, tests: Mapping[str, Any], chosen: Calibration) -> dict[str, Any]:
    report = evaluate(predictor, tests, chosen).report()
    figures = {"id": _figures(report["id"])}
    if report["ood"]:
        figures["ood"] = _figures(report["ood"]["mean"])
    return figures


def _figures(report: dict[str, Any]) -> dict[str, float]:
    return {key: report[key] for key in ("accuracy", "nll", "ece")}


def _table(done: dict[str, Any]) -> str:
    lines = [f"**{done['data']}**, {done['shots']} shots, epochs {done['epochs'] or 'of the presets'}", ""]
    head = [
        "",
        "tuned",
        "steps",
        "ID accuracy %",
        "OOD accuracy %",
        "ID NLL",
        "OOD NLL",
        "ID ECE",
        "OOD ECE",
        "fit s",
        "peak MB",
    ]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for method, found in done["methods"].items():
        runs = [run for seed, run in found.items() if seed.isdigit()]
        row = [method, f"{found['knob']}={found['best']:g}", f"{runs[0]['steps']}", *_row(runs)]
        peaks = [run["peak_mb"] for run in runs if run["peak_mb"] is not None]
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        row += [f"{fmean(seconds):.0f}" if seconds else "", f"{max(peaks):.0f}" if peaks else ""]
        lines.append(f"| {' | '.join(row)} |")
        if all("served" in run for run in runs):
            served = [f"{method}, served", "", "", *_row([run["served"] for run in runs]), "", ""]
            lines.append(f"| {' | '.join(served)} |")
    return "\n".join([*lines, ""])


def _paired(problems: Sequence[Mapping[str, Any]], less: str) -> str:
    """What methods have more than another on the same shots: mean over seeds, then over problems with its interval."""
    lines = [f"less {less}: mean over problems", ""]
    columns = [(key, part) for key in ("accuracy", "nll", "ece") for part in ("id", "ood")]
    lines.append("| | problems | " + " | ".join(f"{part.upper()} {key}" for key, part in columns) + " |")
    lines.append("|---" * (len(columns) + 2) + "|")
    for method in METHODS:
        both = [done["methods"] for done in problems if {method, less} <= done["methods"].keys()]
        if method == less or not both or (less != VIEWS and "kalman" not in method):
            continue
        cells = []
        for key, part in columns:
            found = [
                fmean(
                    of[method][seed][part][key] - of[less][seed][part][key]
                    for seed in of[less].keys() & of[method].keys()
                    if seed.isdigit()
                )
                for of in both
                if part in of[less]["0"]
            ]
            factor, digits = (100, 1) if key == "accuracy" else (1, 3)
            cells.append(with_interval(interval(found), factor, digits).replace("±", " ± "))
        lines.append(f"| {method} | {len(both)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _row(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        _shown([run[part][key] for run in runs if part in run], key, factor, digits)
        for key, factor, digits in (("accuracy", 100, 1), ("nll", 1, 3), ("ece", 1, 3))
        for part in ("id", "ood")
    ]


def _shown(values: Sequence[float], figure: str, factor: float, digits: int) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0] * factor:.{digits}f}"
    return with_interval(interval(values, figure), factor, digits).replace("±", " ± ")


if __name__ == "__main__":
    main()
