"""How well a search's objective ranks priors of the default filter, and what its choice is worth.

    python -m benchmarks.evidence_ranks --data pacs.parquet --domains photo sketch --geometry clip
    python -m benchmarks.evidence_ranks --data features.parquet --shots 4 16
    python -m benchmarks.evidence_ranks --data features.parquet --shots 8 --case unequal
    python -m benchmarks.evidence_ranks --draw

Random priors of ``tune_configs/noise_priors.yaml`` are judged as the search judges them, on the shots of each seed;
then each is fitted on all shots of the seed and tested. Shown are rank correlations of the objective with what a prior
is worth, and the regret of its choice: the test NLL of the prior that it puts first, less that of the preset and less
that of the best. Beside them stands what fresh pictures would tell: the rank correlation of the NLL of as many test
pictures as there are shots with that of all other test pictures. A score of the shots cannot be expected to do better.
Cases that are hard by themselves: single shots, a thousand classes (``--data many``), classes of
unequal size (``--case unequal``), a zero-shot head that knows nothing (``--case wrong_head``).
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from benchmarks.few_shot.boot import Interval, over_problems
from benchmarks.few_shot.groups import open_data
from benchmarks.few_shot.problem import Case, Problem
from kngd_ray.config import load_config, override
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.training.calibration import Calibration, calibrate, predictor_of
from kngd_ray.training.evaluation import ID
from kngd_ray.training.folds import single
from kngd_ray.training.metrics import Scores
from kngd_ray.tuning import Fitted, Workload, fit_together, score_trials
from kngd_ray.tuning.file import SearchConfig, load_search
from kngd_ray.tuning.options import DIRECTIONS, Objective

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "evidence_ranks.json"
SEARCH = Path(__file__).parents[1] / "tune_configs" / "noise_priors.yaml"
TOGETHER = 10  # priors at a time
CASES = ("plain", "unequal", "wrong_head")
Row = dict[str, Any]


def random_priors(search: SearchConfig, count: int) -> list[Row]:
    """The search's first trials, and settings drawn from its space."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [*map(dict, search.points), *(search.space.suggest(study.ask()) for _ in range(count))]


def of_case(problem: Problem, case: str) -> Problem:
    """A problem with what makes it a hard case.

    Args:
        problem: as it is.
        case: ``unequal`` keeps between one and all shots of a class, ``wrong_head`` deals out the texts anew.

    Returns:
        The problem.
    """
    if case == "wrong_head":
        classes = len(problem.class_embeddings)
        return replace(problem, class_embeddings=problem.class_embeddings.roll(1 + classes // 3, 0))
    if case == "unequal":
        return replace(problem, cases=[replace(one, support=_unequal(one)) for one in problem.cases])
    return problem


def _unequal(case: Case) -> Any:
    labels = case.support.labels.numpy()
    rng, kept = np.random.default_rng(case.seed), []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        kept.append(own[: rng.integers(1, len(own) + 1)])
    return case.support.subset(torch.from_numpy(np.sort(np.concatenate(kept))))


def judged(search: SearchConfig, problem: Problem, priors: Sequence[Row]) -> list[Row]:
    """Objective and test figures of each prior, means over the support sets; the shipped preset first."""
    seeds = tuple(case.seed for case in problem.cases)
    work = Workload(
        search.config,
        replace(search.options, seeds=seeds),
        {case.seed: case.support for case in problem.cases},
        problem.class_embeddings,
        problem.logit_scale,
        space=search.space,
    )
    preset = load_config(overrides=["method=kalman"])
    tasks = [work.task(preset, seed) for seed in seeds]
    chosen = [calibrate(task, preset.posterior) for task in tasks]
    rows: list[Row] = [{"settings": "preset", **_tested(fit_together(tasks), problem, chosen, preset.posterior)}]
    for start in range(0, len(priors), TOGETHER):
        some = priors[start : start + TOGETHER]
        *_, found = score_trials(some, work, fit_together, at_once=True)
        for settings, one in zip(some, found, strict=True):
            row: Row = {"settings": settings, "failed": one.reason, **one.objective}
            if one.reason is None:
                config = override(search.config, settings)
                tasks = [work.task(config, seed) for seed in seeds]
                pairs = zip(one.figures["tau"], one.figures["sharpening"], strict=True)
                chosen = [Calibration(tau, 1.0, sharpening=factor) for tau, factor in pairs]
                if all(single(case.support.labels) for case in problem.cases):  # no fold tells, as for the preset
                    chosen = [calibrate(task, config.posterior) for task in tasks]
                row |= _tested(fit_together(tasks), problem, chosen, config.posterior)
            rows.append(row)
    return rows


def _tested(fits: Sequence[Any], problem: Problem, calibrations: Sequence[Calibration], posterior: Any) -> Row:
    rows = []
    for fitted, case, chosen in zip(fits, problem.cases, calibrations, strict=True):
        if not isinstance(fitted, Fitted):
            return {"failed": str(fitted)}
        predictor = predictor_of(fitted.method, posterior)
        scores = {
            name: Scores.of(chosen.predict(predictor, held.features).probabilities, held.labels)
            for name, held in case.tests.items()
        }
        row = {"id_accuracy": scores[ID].accuracy, "id_nll": scores[ID].nll}
        held = case.tests[ID]
        probabilities = chosen.predict(predictor, held.features).probabilities
        fresh = _fresh(case)
        for name, which in (("fresh_nll", fresh), ("rest_nll", ~fresh)):
            row[name] = Scores.of(probabilities[which], held.labels[which]).nll
        others = [found for name, found in scores.items() if name != ID]
        if others:
            row |= {"ood_accuracy": fmean(s.accuracy for s in others), "ood_nll": fmean(s.nll for s in others)}
        rows.append(row)
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def _fresh(case: Case) -> torch.Tensor:
    """Which test pictures stand for fresh shots: as many as there are shots, at most half, the same for all priors."""
    rows = len(case.tests[ID].labels)
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(case.seed))
    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[drawn[: min(len(case.support), rows // 2)]] = True
    return chosen


def summary(rows: Sequence[Row], objective_name: Objective) -> Row:
    """Rank correlations and regret of one problem.

    Args:
        rows: of :func:`judged`.
        objective_name: by which the search chooses.

    Returns:
        ``spearman`` and that over the better half by test NLL, with NLL and accuracy, and ``fresh`` with the NLL, of
        fresh pictures; what the chosen prior has more than preset and best prior.
    """
    preset, *trials = rows
    sound = [row for row in trials if "id_nll" in row]
    sign = 1 if DIRECTIONS[objective_name] == "maximize" else -1
    objective = sign * np.array([row[objective_name] for row in sound])
    nll, accuracy = (np.array([row[name] for row in sound]) for name in ("id_nll", "id_accuracy"))
    fresh, rest = (np.array([row[name] for row in sound]) for name in ("fresh_nll", "rest_nll"))
    better = nll <= np.median(nll)
    chosen = sound[int(objective.argmax())]
    found = {
        "spearman_nll": _ranks(objective, -nll),
        "spearman_accuracy": _ranks(objective, accuracy),
        "spearman_nll_better_half": _ranks(objective[better], -nll[better]),
        "spearman_accuracy_better_half": _ranks(objective[better], accuracy[better]),
        "fresh_nll": _ranks(-fresh, -rest),
        "fresh_nll_better_half": _ranks(-fresh[better], -rest[better]),
        "regret_preset": chosen["id_nll"] - preset["id_nll"],
        "regret_best": chosen["id_nll"] - float(nll.min()),
        "accuracy_gain": chosen["id_accuracy"] - preset["id_accuracy"],
    }
    if "ood_nll" in preset:
        found["ood_accuracy_gain"] = chosen["ood_accuracy"] - preset["ood_accuracy"]
        found["ood_nll_gain"] = chosen["ood_nll"] - preset["ood_nll"]
    return found


def _ranks(score: Any, worth: Any) -> float:
    if np.ptp(score) == 0 or np.ptp(worth) == 0:
        return 0.0
    return float(spearmanr(score, worth).statistic)


def measure(args: argparse.Namespace) -> None:
    """Judge, fit and test the priors of data sets, and keep what came out."""
    torch.set_num_threads(args.threads)
    search = load_search(args.search, [])
    objective = search.options.objective[0]
    priors = random_priors(search, args.priors)
    for path in args.data:
        data = open_data(path, geometry=args.geometry, dev=args.dev)
        for domain in args.domains or data.domains[:1]:
            for shots in args.shots:
                if shots > data.most_shots[domain]:
                    continue
                began = time.monotonic()
                problem = of_case(data.problem(domain, shots, range(args.seeds)), args.case)
                rows = judged(search, problem, priors)
                found = {
                    "data": data.name,
                    "group": data.group,
                    "domain": domain,
                    "shots": shots,
                    "case": args.case,
                    "classes": len(problem.class_embeddings),
                    "seeds": args.seeds,
                    "seconds": round(time.monotonic() - began, 1),
                    "search": args.search.stem,
                    "objective": objective,
                    **summary(rows, objective),
                    "priors": rows,
                }
                _keep(found, args.out)
                print(_line(found), file=sys.stderr, flush=True)


def _key(problem: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(problem[name] for name in ("search", "group", "data", "domain", "shots", "case"))


def _keep(found: Row, path: Path) -> None:
    known = json.loads(path.read_text())["problems"] if path.is_file() else []
    problems = sorted([*(one for one in known if _key(one) != _key(found)), found], key=_key)
    result = {"environment": json.loads(describe_environment()), "problems": problems}
    path.write_text(json.dumps(result, default=float) + "\n")


def _both(problem: Mapping[str, Any], name: str) -> str:
    """A rank correlation over all priors, and over their better half; nothing where it was not measured."""
    return f"{problem[name]:.2f} / {problem[name + '_better_half']:.2f}" if name in problem else ""


def _line(problem: Mapping[str, Any]) -> str:
    ood = f"{100 * problem['ood_accuracy_gain']:+.1f}" if "ood_accuracy_gain" in problem else ""
    name = " ".join(str(problem[key]) for key in ("data", "domain")) + (
        "" if problem["case"] == "plain" else f", {problem['case']}"
    )
    return (
        f"| {name} | {problem['group']} | {problem['classes']} | {problem['shots']} "
        f"| {_both(problem, 'spearman_nll')} "
        f"| {_both(problem, 'fresh_nll')} "
        f"| {_both(problem, 'spearman_accuracy')} "
        f"| {problem['regret_preset']:+.3f} | {problem['regret_best']:+.3f} "
        f"| {100 * problem['accuracy_gain']:+.1f} | {ood} |"
    )


def table(problems: Sequence[Mapping[str, Any]]) -> str:
    """All problems, and what they come to, as Markdown."""
    head = (
        "| data | group | classes | shots | Spearman with NLL: all / better half | of fresh pictures | with accuracy | "
        "regret against preset | against best | ID accuracy | OOD accuracy |"
    )
    lines = [head, "|---" * 11 + "|", *map(_line, problems)]
    problems = [one for one in problems if one["group"] != "many"]  # made data say nothing of real ones in the mean
    several = [one for one in problems if one["shots"] > 1]
    ranks = [
        median(one[name] for one in several if name in one)
        for kind in ("spearman", "fresh")
        for name in (f"{kind}_nll", f"{kind}_nll_better_half")
    ]
    regret = mean_regret(problems)
    lines += [
        "",
        f"Without made data: median Spearman with test NLL, of two shots or more: {ranks[0]:.2f}, over the better half "
        f"{ranks[1]:.2f}; that of as many fresh pictures {ranks[2]:.2f} and {ranks[3]:.2f}. "
        f"Mean regret against the preset {regret.mean:+.4f} [{regret.low:+.4f}, {regret.high:+.4f}] nats, at most "
        f"{max(one['regret_preset'] for one in problems):+.3f}; 95 % intervals, problems of each data set resampled.",
    ]
    return "\n".join(lines)


def mean_regret(problems: Sequence[Mapping[str, Any]]) -> Interval:
    """Mean test NLL of what is chosen less that of the preset, problems of each data set resampled."""
    by_data: dict[str, list[float]] = {}
    for one in problems:
        by_data.setdefault(one["data"], []).append(one["regret_preset"])
    return over_problems([np.array(values)[:, None] for values in by_data.values()])


def draw(path: Path) -> None:
    """Print the table and write the figure: test NLL of each prior against the objective."""
    problems = json.loads(path.read_text())["problems"]
    shown = [one for one in problems if one["case"] == "plain" and one["shots"] > 1][:12]
    columns = 4
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, problem in zip(axes, shown, strict=False):
        preset, *rows = problem["priors"]
        sound = [row for row in rows if "id_nll" in row]
        axis.scatter([row[problem["objective"]] for row in sound], [row["id_nll"] for row in sound], s=12, alpha=0.8)
        axis.axhline(preset["id_nll"], color="0.4", lw=0.8, ls="--")
        axis.set_yscale("log")
        axis.set_title(f"{problem['data']} {problem['domain']}, {problem['shots']} shots", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.locator_params(axis="x", nbins=6)
    figure.supxlabel("objective of the search, nats per shot", fontsize=9)
    figure.supylabel("test NLL (dashed: preset)", fontsize=9)
    figure.savefig(RESULTS / "evidence_ranks.png", dpi=110)
    print(table(problems))


def main() -> None:
    """Measure data sets, or draw what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="files of pictures or features, embedded, many")
    parser.add_argument("--geometry", choices=["mini", "clip"], default="mini")
    parser.add_argument("--domains", nargs="+")
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--case", choices=CASES, default="plain")
    parser.add_argument(
        "--search", type=Path, default=SEARCH, help="the search file whose space and objective are judged"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--priors", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dev", action="store_true", help="training pictures stand for the test sets")
    parser.add_argument("--out", type=Path, default=KEPT)
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    if args.draw:
        draw(args.out)
    elif args.data:
        measure(args)
    else:
        parser.error("name data sets, or --draw")


if __name__ == "__main__":
    main()
