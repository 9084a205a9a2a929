"""How well the evidence ranks priors: against held-out shots, and against the test pictures.

    python -m benchmarks.evidence_ranks --data pacs.parquet --domain photo
    python -m benchmarks.evidence_ranks --data eurosat.parquet
    python -m benchmarks.evidence_ranks --data caltech101.parquet --shots 4
    python -m benchmarks.evidence_ranks --draw

Random priors of the shipped search's space are judged as a search judges them, by ``evidence`` and by ``held_out_nll``
on the shots of each seed; then each is fitted on all shots of the seed and tested. Beside them two scores that look
more like a textbook's evidence, and rank badly: the filter's own log N(nu; 0, S), and the labels' log-probability by
the undamped posterior (tau = 1), both of one pass that counts each shot once.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from scipy.stats import spearmanr

from kngd_ray.commands.environment import describe_environment
from kngd_ray.commands.prepare import Prepared, open_task, prepare
from kngd_ray.commands.search_file import SearchConfig, load_search
from kngd_ray.config import override
from kngd_ray.errors import FilterError
from kngd_ray.search import Fitted, Workload, fit_together, judge
from kngd_ray.training.calibration import predictor_of
from kngd_ray.training.evaluation import ID
from kngd_ray.training.fit import FitTask
from kngd_ray.training.metrics import Scores

RESULTS = Path(__file__).parent / "results"
SEARCH = Path(__file__).parents[1] / "tune_configs" / "noise_priors.yaml"
TOGETHER = 8  # priors at a time
WORST = float("-inf")
SCORES = {
    "evidence": "evidence",
    "held_out_nll": "held-out NLL",
    "gaussian": "log N(nu; 0, S)",
    "undamped": "labels at tau = 1",
}
TARGETS = {
    "held_out_nll": "held-out NLL",
    "id_accuracy": "ID accuracy",
    "id_nll": "ID NLL",
    "ood_accuracy": "OOD accuracy",
}
LESS_IS_BETTER = ("held_out_nll", "id_nll")


def random_priors(search: SearchConfig, count: int) -> list[dict[str, Any]]:
    """Settings drawn from a search's space."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [search.space.suggest(study.ask()) for _ in range(count)]


def judged(search: SearchConfig, prepared: Prepared, priors: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Scores and test figures of each prior, means over the support sets."""
    seeds = search.options.seeds
    work = Workload(
        search.config,
        replace(search.options, objective=("evidence", "held_out_nll")),
        {seed: prepared.support(seed) for seed in seeds},
        prepared.class_embeddings,
        prepared.model.logit_scale,
    )
    tests = {seed: prepared.tests(seed) for seed in seeds}
    for start in range(0, len(priors), TOGETHER):
        some = priors[start : start + TOGETHER]
        *_, found = judge(some, work, fit_together, at_once=True)
        configs = [override(search.config, settings) for settings in some]
        tasks = [work.task(config, seed) for config in configs for seed in seeds]
        fits = fit_together(tasks)
        passes = fit_together([_single_pass(task) for task in tasks])
        for n, (settings, config, one) in enumerate(zip(some, configs, found, strict=True)):
            own = slice(n * len(seeds), (n + 1) * len(seeds))
            row: dict[str, Any] = {"settings": settings, "failed": one.reason, **one.objective}
            if one.reason is None and not any(isinstance(fit, FilterError) for fit in fits[own]):
                row |= _tested(fits[own], [tests[seed] for seed in seeds], one.figures["tau"], config.posterior)
                row |= _textbook(passes[own])
            yield row
        print(f"{min(start + TOGETHER, len(priors))} of {len(priors)} priors", file=sys.stderr, flush=True)


def _single_pass(task: FitTask) -> FitTask:
    return replace(task, options=replace(task.options, epochs=1), prequential=True)


def _tested(fits: Sequence[Any], tests: Sequence[Any], taus: Sequence[float], posterior: Any) -> dict[str, float]:
    rows = []
    for fitted, sets, tau in zip(fits, tests, taus, strict=True):
        predictor = predictor_of(fitted.method, posterior)
        scores = {
            name: Scores.of(predictor.predict(held.features, tau).probabilities, held.labels)
            for name, held in sets.items()
        }
        row = {"id_accuracy": scores[ID].accuracy, "id_nll": scores[ID].nll}
        if len(scores) > 1:
            row["ood_accuracy"] = fmean(found.accuracy for name, found in scores.items() if name != ID)
        rows.append(row)
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def _textbook(passes: Sequence[Fitted | FilterError]) -> dict[str, float]:
    gaussian, undamped = [], []
    for fitted in passes:
        stats = [] if isinstance(fitted, FilterError) else [record.stats for record in fitted.records]
        if not stats or any(one is None for one in stats):
            return {"gaussian": WORST, "undamped": WORST}
        gaussian.append(sum(one.log_evidence for one in stats) / sum(fitted.sizes))
        undamped.append(sum(one.log_predictive[-1] for one in stats) / sum(fitted.sizes))
    return {"gaussian": fmean(gaussian), "undamped": fmean(undamped)}


def spearman(rows: Sequence[dict[str, Any]], score: str, target: str) -> float | None:
    """Rank correlation of a score with a target, positive where they agree on what is good."""
    both = [(row[score], row[target]) for row in rows if score in row and target in row]
    if not both:
        return None
    signs = [-1 if name in LESS_IS_BETTER else 1 for name in (score, target)]
    pairs = [(signs[0] * a, signs[1] * b) for a, b in both]
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)


def measure(args: argparse.Namespace) -> None:
    """Judge, fit and test the priors of one data set, and keep what came out."""
    torch.set_num_threads(args.threads)
    overrides = ["preset=kalman_diagonal", f"data.path={args.data}", f"data.shots={args.shots}", "seeds=0,1,2"]
    if args.domain:
        overrides.append(f"data.train_domain={args.domain}")
    overrides.append("data.draw=first")  # as in the results that are kept
    search = load_search(SEARCH, overrides)
    prepared = prepare(open_task(search.config))
    began = time.monotonic()
    rows = list(judged(search, prepared, random_priors(search, args.priors)))
    name = Path(args.data).stem
    better = sorted((row for row in rows if "held_out_nll" in row), key=lambda row: row["held_out_nll"])
    better = better[: len(better) // 2]
    result = {
        "data": name,
        "shots": args.shots,
        "seeds": list(search.options.seeds),
        "seconds": round(time.monotonic() - began, 1),
        "failed": sum(row["failed"] is not None for row in rows),
        "spearman": {score: {target: spearman(rows, score, target) for target in TARGETS} for score in SCORES},
        "spearman_of_the_better_half": {s: {target: spearman(better, s, target) for target in TARGETS} for s in SCORES},
        "environment": json.loads(describe_environment()),
        "priors": rows,
    }
    (RESULTS / f"evidence_ranks_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**{key: result[key] for key in ("data", "seconds", "failed")}, "priors": len(rows)}))
    print(table([result]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Rank correlations as Markdown."""
    lines = ["| data, priors | score | " + " | ".join(TARGETS.values()) + " |", "|---|---|" + "---|" * len(TARGETS)]
    for result in results:
        for score, label in SCORES.items():
            halves = [result[key][score] for key in ("spearman", "spearman_of_the_better_half")]
            cells = " | ".join(" / ".join(_cell(half[target]) for half in halves).strip(" /") for target in TARGETS)
            lines.append(f"| {result['data']}, {len(result['priors'])} | {label} | {cells} |")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def draw() -> None:
    """The figure: held-out NLL and test accuracy of each prior against its evidence."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("evidence_ranks_*.json"))]
    figure = Figure(figsize=(4 * len(results), 6.4), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, result in enumerate(results):
        rows = [row for row in result["priors"] if "id_accuracy" in row]
        kinds = sorted({row["settings"]["observation"] for row in rows})
        for axis, (target, label) in zip(
            axes[:, column], (("held_out_nll", "held-out NLL"), ("id_accuracy", "test accuracy")), strict=True
        ):
            for number, kind in enumerate(kinds):
                own = [row for row in rows if row["settings"]["observation"] == kind]
                axis.scatter(
                    [-row["evidence"] for row in own],
                    [row[target] for row in own],
                    s=16,
                    color=f"C{number}",
                    label=kind.replace(",", ", "),
                    alpha=0.8,
                )
            axis.set_xscale("log")
            scaled = [axis.xaxis]
            if target == "held_out_nll":
                axis.set_yscale("log")
                scaled.append(axis.yaxis)
            for one in scaled:
                one.set_major_locator(LogLocator(subs=(1, 2, 5)))
                one.set_major_formatter(ScalarFormatter())
                one.set_minor_formatter(NullFormatter())
            axis.set_title(f"{result['data']}, Spearman {result['spearman']['evidence'][target]:.2f}", fontsize=10)
            axis.set_xlabel("- evidence, nats per shot")
            axis.set_ylabel(label)
            axis.invert_xaxis()
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(RESULTS / "evidence_ranks.png", dpi=110)
    print(table(results))


def main() -> None:
    """Measure a data set, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--domain")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--priors", type=int, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.draw:
        draw()
    elif args.data:
        measure(args)
    else:
        parser.error("name a data set, or --draw")


if __name__ == "__main__":
    main()
