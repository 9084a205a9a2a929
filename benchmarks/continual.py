"""Learning one domain after the other: what is kept of the earlier ones, what is learned of the next.

    python -m benchmarks.continual --data pacs.parquet
    python -m benchmarks.continual --data pacs.parquet --domains photo,sketch --shots 8 --seeds 0,1,2

Every method learns the domains in turn with its own preset, each time from the posterior of the one before, as
``kngd-ray train prior=`` does: a Kalman filter goes on from its mean and covariance, AdamW from its weights. After
each stage all domains are tested, on pictures that no stage trains on, at the mean of the weights. Then the same in
the opposite order. The figures are means over domains, in per cent, paired by seed:

    learned     accuracy on a domain right after it was learned
    final       accuracy on it after the last stage
    forgetting  the former minus the latter, over all domains but the last
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.readme_table import cell
from kngd_ray.config import load_config
from kngd_ray.experiment.aggregate import interval
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.experiment.prepared import TaskData, prepare
from kngd_ray.experiment.task import open_task
from kngd_ray.sharding import SingleProcess
from kngd_ray.training import checkpoint
from kngd_ray.training.calibration import Calibration
from kngd_ray.training.evaluation import ID, evaluate
from kngd_ray.training.fit import FitTask
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import PosteriorOptions
from kngd_ray.training.prior import Prior
from kngd_ray.training.restoring import restore_predictor
from kngd_ray.training.resumable import run_fit

ROWS = {
    "adamw": ["method=adamw"],
    "diagonal": ["method=kalman", "preset=kalman_diagonal"],
    "kronecker": ["method=kalman", "preset=kalman_diagonal", "filter.covariance=kronecker"],
}
COLOURS = {"adamw": "#d1752b", "diagonal": "#7fb3d5", "kronecker": "#1f5f9e"}
BASELINE = "adamw"
Matrix = list[list[float]]  # accuracy by stage, then by domain, both in the order of learning


def main() -> None:
    """Run the sequences in both orders, print the tables, write figure and numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="parquet file of the package's schema, with several domains")
    parser.add_argument(
        "--domains",
        nargs="+",
        default=["photo,art_painting", "photo,art_painting,cartoon,sketch"],
        help="sequences of domains, each run forwards and backwards",
    )
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    forwards = [sequence.split(",") for sequence in options.domains]
    prepared = {domain: load(domain, options) for domain in {d for sequence in forwards for d in sequence}}
    runs: dict[str, dict[str, list[Matrix]]] = {}
    sequences = {}
    for domains in (order for sequence in forwards for order in (sequence, sequence[::-1])):
        name = ", ".join(domains)
        stages = [prepared[domain] for domain in domains]
        runs[name] = {
            row: [in_turn(load_config(overrides=settings).fit_options, stages, seed) for seed in stages[0].config.seeds]
            for row, settings in ROWS.items()
        }
        figures = {row: [summary(matrix) for matrix in matrices] for row, matrices in runs[name].items()}
        over_seeds = {row: spread(by_seed) for row, by_seed in figures.items()}
        paired = {row: spread(minus(figures[row], figures[BASELINE])) for row in ROWS if row != BASELINE}
        sequences[name] = {"accuracy": runs[name], "over_seeds": over_seeds, f"minus_{BASELINE}": paired}
        print(f"\n{name}\n\n{markdown(over_seeds, paired)}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    draw(runs, options.out / "continual.png")
    about = {"data": Path(options.data).stem, "shots": options.shots, "seeds": options.seeds}
    kept = {"environment": json.loads(describe_environment()), **about, "sequences": sequences}
    (options.out / "continual.json").write_text(json.dumps(kept, indent=1) + "\n")


def load(domain: str, options: argparse.Namespace) -> TaskData:
    """Features of one domain's shots, and of the test rows of all domains."""
    settings = [f"data.path={options.data}", f"data.train_domain={domain}", f"data.shots={options.shots}"]
    settings += ["data.draw=first", "tune.views=0"]  # as in the results that are kept
    return prepare(open_task(load_config(overrides=[*settings, f"seeds={options.seeds}"])))


def in_turn(options: FitOptions, stages: Sequence[TaskData], seed: int) -> Matrix:
    """Accuracies of one method that learns domains in turn from one seed's support sets."""
    matrix: Matrix = []
    domains = [str(stage.config.data.train_domain) for stage in stages]
    prior: Prior | None = None
    with tempfile.TemporaryDirectory() as folder:
        for domain, stage in zip(domains, stages, strict=True):
            texts, scale = stage.class_embeddings, stage.model.logit_scale
            task = FitTask(options, seed, stage.support(seed), texts, scale, prior)
            end = run_fit(task, Path(folder) / domain, stage.identity, SingleProcess(), "cpu", checkpoint_every=0)
            prior = Prior(end, checkpoint.read_manifest(end))
            at_mean = PosteriorOptions(predict="mean")
            predictor = restore_predictor(checkpoint.load(end), stage.model, at_mean, class_embeddings=texts)
            report = evaluate(predictor, stage.tests(seed), Calibration(0.0, 1.0)).report()
            matrix.append([(report[ID] if other == domain else report["ood"][other])["accuracy"] for other in domains])
    return matrix


def summary(matrix: Matrix) -> dict[str, float]:
    """The figures of one sequence."""
    accuracy = torch.tensor(matrix, dtype=torch.float64)
    learned, final = accuracy.diagonal(), accuracy[-1]
    return {
        "learned": float(learned.mean()),
        "final": float(final.mean()),
        "forgetting": float((learned - final)[:-1].mean()),
    }


def minus(mine: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Differences between two methods, seed by seed."""
    return [{name: a[name] - b[name] for name in a} for a, b in zip(mine, other, strict=True)]


def spread(by_seed: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Mean and 95 % interval of each figure over seeds."""
    return {name: interval([figures[name] for figures in by_seed]) for name in by_seed[0]}


def markdown(over_seeds: Mapping[str, Mapping[str, Any]], paired: Mapping[str, Mapping[str, Any]]) -> str:
    """Per cent, mean ± half of the 95 % interval over seeds."""
    rows = dict(over_seeds) | {f"{row} minus {BASELINE}": figures for row, figures in paired.items()}
    names = list(over_seeds[BASELINE])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cell(figures[n], 100) for n in names) + " |" for row, figures in rows.items()]
    return "\n".join(lines)


def draw(runs: Mapping[str, Mapping[str, list[Matrix]]], path: Path) -> None:
    """Per sequence and method, the accuracy on each domain from the stage that learns it to the last."""
    columns = 2
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(8.6, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for ax, (name, methods) in zip(grid, runs.items(), strict=False):
        domains = name.split(", ")
        for n, (row, matrices) in enumerate(methods.items()):
            accuracy = 100 * torch.tensor(matrices, dtype=torch.float64)  # (seeds, stages, domains)
            for d in range(len(domains) - 1):
                figures = [interval(accuracy[:, stage, d].tolist()) for stage in range(d, len(domains))]
                ax.errorbar(
                    [stage + 0.05 * n for stage in range(d, len(domains))],
                    [f["mean"] for f in figures],
                    yerr=[(f["high"] - f["low"]) / 2 for f in figures],
                    color=COLOURS[row],
                    capsize=2,
                    linewidth=1.3,
                    label=row if d == 0 else None,
                )
                if n == 0:
                    place = (d - 0.08, figures[0]["mean"])
                    label = ax.annotate(domains[d], place, ha="right", va="center", fontsize=7, color="#555555")
                    label.set(zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        ax.set_xlim(-0.9, len(domains) - 0.7)
        ax.set_xticks(range(len(domains)), [f"+ {domain}" for domain in domains], fontsize=7)
        ax.tick_params(axis="y", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_ylabel("accuracy %", fontsize=7)
    figure.axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    figure.suptitle("accuracy on each domain from when it was learned, as others follow", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
