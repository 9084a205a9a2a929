r"""Seconds of a whole fit of the default beside AdamW's, and of all that comes after it; accuracy against seconds.

    python -m benchmarks.fit_cost                   the small cases and the race: minutes
    python -m benchmarks.fit_cost --big             a thousand classes too
    python -m benchmarks.fit_cost --markdown        put the tables of results/fit_cost.json into README.md

**Costs** are those of made features in CLIP's geometry (scale 100, a cone), N shots of C classes, width d. *fit* runs
to its end, and takes the choice of the prior's variance with it; *all* is what ``train`` does after the features: the
fit, tau, the scaling temperature and the novelty percentiles. Both methods run in turns, medians are shown.

The floor of a fit is counted in products of the Hessian with a direction, of which each is two matrix products ::

    4 N r C  FLOPs in float32, r = min(N, d + 1)

Predicted before it was measured: six linearisations from the start and four from a neighbouring variance, three
products each, for a fold of two thirds of the shots under three variances, and eight with four products for all shots:
14 + 32 products, and as many float64 products of the same size for gradients and what a direction leads to. Whitening
and the nearest Kronecker product are six products of (N, d) with (d, d) and seven factorisations of (r, r).

Then half of AdamW's time was the aim, from 0.55, 0.64 and 0.52 of it. Predicted of 100 x 4: the nearest product in
the space of the samples saves 7 of 93 ms, folds in single precision 8, memory that is kept between tensors a quarter of
all. It came to 0.48, 0.47 and 0.44.

**The race** is of the emoji that the package ships, 20 classes: each method's seconds of fitting alone, at settings
that the same budget of search chose from the shots (the default is not searched), and its accuracy on the test
pictures. AdamW's is followed over its passes.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.few_shot.methods import METHODS
from benchmarks.few_shot.plots import COLOURS
from benchmarks.few_shot.problem import Case, Problem
from benchmarks.few_shot.search import search
from benchmarks.step_cost.report import environment, fill
from kngd_ray.config import load_config
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.evaluation import ID
from kngd_ray.training.fit import FitTask, fit
from kngd_ray.training.novelty import calibrate_and_compare

CASES = ((20, 8, 256), (100, 4, 512), (100, 16, 512))  # classes, shots of each, width
BIG = (1000, 16, 512)
RACE = ("zero_shot", "gda", "linear_probe", "tip_adapter_f", "adamw_class_residual", "ours")
_RESULTS = Path(__file__).parent / "results"
_CONE, _COSINE, _SCALE = 0.65, 0.2, 18.0  # as real CLIP features have them
_PICTURES = 64
_RACE_SHOTS, _RACE_SEEDS = 8, 3


def made(classes: int, shots: int, width: int, seed: int = 0) -> tuple[Support, Tensor]:
    """Shots of classes that CLIP half knows, and the classes' texts (C, d): pictures in a cone, logit scale 100."""
    rng = torch.Generator().manual_seed(seed)
    texts = normalize(torch.randn(classes, width - 2, generator=rng), dim=1)
    looks = texts + 0.8 * normalize(torch.randn(classes, width - 2, generator=rng), dim=1)
    labels = torch.arange(classes).repeat_interleave(shots)
    x = normalize(looks[labels] + 2.2 * torch.randn(len(labels), width - 2, generator=rng) / sqrt(width), dim=1)
    along, share = sqrt(1 - _CONE**2), _SCALE / (100 * _CONE)
    common, rest = _COSINE / along, sqrt(1 - share**2 - (_COSINE / along) ** 2)
    pictures = torch.nn.functional.pad(torch.nn.functional.pad(_CONE * x, (0, 1), value=along), (0, 1))
    named = torch.nn.functional.pad(torch.nn.functional.pad(share * texts, (0, 1), value=common), (0, 1), value=rest)
    return Support(pictures, labels), named


def costs(classes: int, shots: int, width: int, repeats: int) -> dict[str, Any]:
    """Seconds of both methods, in turns."""
    support, texts = made(classes, shots, width)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(repeats + 1):  # the first one warms up
        for method in ("kalman", "adamw"):
            config = load_config(overrides=[f"method={method}"])
            task = FitTask(config.fit_options, 0, support, texts, 100.0)
            began = time.perf_counter()
            done = fit(task)
            fitted = time.perf_counter()
            calibrate_and_compare(task, config.posterior, fitted=done.state())
            ended = time.perf_counter()
            row = found.setdefault(method, {"fit": [], "all": []})
            row["fit"].append(fitted - began)
            row["all"].append(ended - began)
    medians = {
        method: {what: statistics.median(taken[1:]) for what, taken in row.items()} for method, row in found.items()
    }
    return {"classes": classes, "shots": shots, "width": width, "seconds": medians}


def big() -> dict[str, Any]:
    """A thousand classes: seconds of the fit and of what comes after it, peak memory, a prediction."""
    support, texts = made(*BIG)
    config = load_config(overrides=["method=kalman"])
    task = FitTask(config.fit_options, 0, support, texts, 100.0)
    began = time.perf_counter()
    done = fit(task)
    fitted = time.perf_counter()
    calibration, _ = calibrate_and_compare(task, config.posterior, fitted=done.state())
    ended = time.perf_counter()
    predictor, taken = predictor_of(done, config.posterior), []
    for _ in range(20):
        pictures = support.features[:_PICTURES].clone()
        start = time.perf_counter()
        calibration.predict(predictor, pictures)
        taken.append((time.perf_counter() - start) / _PICTURES)
    return {
        "classes": BIG[0],
        "shots": BIG[1],
        "width": BIG[2],
        "fit_seconds": fitted - began,
        "all_seconds": ended - began,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "prediction_ms": 1e3 * statistics.median(taken),
    }


def race(trials: int) -> list[dict[str, Any]]:
    """Accuracy and seconds of each method on the shipped pictures."""
    config = load_config(overrides=[f"data.shots={_RACE_SHOTS}", f"seeds={list(range(_RACE_SEEDS))}", "tune.views=0"])
    prepared = prepare(open_task(config))
    cases = [_case(prepared, seed) for seed in range(_RACE_SEEDS)]
    problem = Problem(cases, prepared.class_embeddings, prepared.model.logit_scale, watched=False)
    rows = []
    for name in RACE:
        method = METHODS[name]
        settings = dict(method.usual) if method.space is None else search(method, problem, trials)["settings"]
        for case in cases:
            if name == "ours":
                rows.append({"method": name, "seed": case.seed, **_ours(problem, case)})
                continue
            for passes in _passes(settings):
                alone = Problem([case], problem.class_embeddings, problem.logit_scale, watched=False)
                began = time.perf_counter()
                (outcome,) = method.fit(alone, {**settings, **passes})
                seconds = time.perf_counter() - began
                right = outcome.probabilities[ID].argmax(1) == case.tests[ID].labels
                row = {"method": name, "seed": case.seed, "seconds": seconds, "accuracy": float(right.double().mean())}
                rows.append(row | passes)
    return rows


def _passes(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a method that descends, fits of fewer passes than the searched one too."""
    if "epochs" not in settings:
        return [{}]
    last = int(settings["epochs"])
    return [{"epochs": n} for n in sorted({max(1, last // part) for part in (16, 8, 4, 2, 1)})]


def _case(prepared: TaskData, seed: int) -> Case:
    return Case(prepared.support(seed), {ID: prepared.tests(seed)[ID]}, seed)


def _ours(problem: Problem, case: Case) -> dict[str, float]:
    options = load_config(overrides=["method=kalman"]).fit_options
    began = time.perf_counter()
    done = fit(problem.task(case, options))
    seconds = time.perf_counter() - began
    with torch.no_grad():
        right = done.head(case.tests[ID].features).argmax(1) == case.tests[ID].labels
    return {"seconds": seconds, "accuracy": float(right.double().mean())}


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of results."""
    about = results["environment"]
    lines = [
        f"{about['cpu']}, {about['threads']} threads, {about['date']}, load {about['load']:.2f} before.",
        "",
        "| classes x shots, d | fit, s: kalman / adamw | ratio | all, s: kalman / adamw | ratio |",
        "|---|---|---|---|---|",
    ]
    for row in results["costs"]:
        ours, theirs = row["seconds"]["kalman"], row["seconds"]["adamw"]
        lines.append(
            f"| {row['classes']} x {row['shots']}, {row['width']} | {ours['fit']:.3f} / {theirs['fit']:.3f} | "
            f"{ours['fit'] / theirs['fit']:.2f} | {ours['all']:.3f} / {theirs['all']:.3f} | "
            f"{ours['all'] / theirs['all']:.2f} |"
        )
    if (one := results.get("big")) is not None:
        lines += [
            "",
            f"{one['classes']} classes x {one['shots']} shots, d = {one['width']}: fit {one['fit_seconds']:.0f} s, all "
            f"{one['all_seconds']:.0f} s, peak {one['peak_gb']:.1f} GB; a prediction with its variance "
            f"{one['prediction_ms']:.3f} ms a picture in batches of {_PICTURES}.",
        ]
    if results.get("race"):
        lines += ["", "| method | seconds of a fit | accuracy % |", "|---|---|---|"]
        lines += [
            f"| {name} | {1e3 * statistics.median(row['seconds'] for row in rows):.0f} ms | "
            f"{100 * statistics.fmean(row['accuracy'] for row in rows):.1f} |"
            for name in RACE
            if (rows := _last(results["race"], name))
        ]
    return "\n".join(lines)


def _last(rows: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    own = [row for row in rows if row["method"] == method]
    most = max((row.get("epochs", 0) for row in own), default=0)
    return [row for row in own if row.get("epochs", 0) == most]


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against seconds of fitting, means over seeds."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method in RACE:
        by_passes: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["method"] == method:
                by_passes.setdefault(row.get("epochs", 0), []).append(row)
        seconds = [statistics.median(r["seconds"] for r in found) for _, found in sorted(by_passes.items())]
        accuracy = [100 * statistics.fmean(r["accuracy"] for r in found) for _, found in sorted(by_passes.items())]
        axes.plot(seconds, accuracy, marker="o", color=COLOURS[method], label=method)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of fitting")
    axes.set_ylabel("accuracy % of the test pictures")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="Seconds of whole fits.")
    parser.add_argument("--big", action="store_true", help="a thousand classes too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60, help="of each rival's search in the race")
    parser.add_argument("--out", type=Path, default=_RESULTS)
    parser.add_argument("--markdown", action="store_true", help="only put the tables into README.md")
    chosen = parser.parse_args(argv)
    path = chosen.out / "fit_cost.json"
    if chosen.markdown:
        fill("fit_cost", markdown(json.loads(path.read_text())))
        return
    kept = json.loads(path.read_text()) if path.is_file() else {}
    parts: dict[str, Callable[[], Any]] = {
        **({"big": big} if chosen.big else {}),  # first: a process's peak is that of all that it has done
        "costs": lambda: [costs(*case, chosen.repeats) for case in CASES],
        "race": lambda: race(chosen.trials),
    }
    results = {**kept, "environment": environment()}
    for name, measure in parts.items():
        results[name] = measure()
        path.write_text(json.dumps(results, indent=1) + "\n")
    picture(results["race"], chosen.out / "fit_cost.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
