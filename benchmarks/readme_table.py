"""The README's tables and figure: zero-shot, AdamW and Kalman on the same support sets.

    python -m benchmarks.readme_table                                  the emoji that come along
    python -m benchmarks.readme_table --data pacs.parquet --domain photo --shots 16

Each method runs in this process on the same features and seeds. The table goes to stdout as
Markdown; figures and numbers with their environment go to ``--out``.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from kngd_ray.config import load_config
from kngd_ray.console import Display, with_interval
from kngd_ray.experiment.environment import describe_environment
from kngd_ray.experiment.run import train

PRESETS = ("adamw", "kf_clip", "kalman_diagonal", "kalman")
COLOURS = {"zero-shot": "#8c8c8c", "adamw": "#d1752b"}
COLOURS |= {"kf_clip": "#b9d4e8", "kalman_diagonal": "#7fb3d5", "kalman": "#1f5f9e"}


def main() -> None:
    """Run the methods, print the table, write figure and numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="parquet file of the package's schema")
    parser.add_argument("--domain", default=None, help="domain trained on; the others are out of distribution")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    name = "emoji" if options.data == "embedded" else Path(options.data).stem
    reports: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for preset in PRESETS:
            settings = [
                f"method={'adamw' if preset == 'adamw' else 'kalman'}",
                f"preset={preset}",
                f"seeds={options.seeds}",
                f"data.path={options.data}",
                f"data.train_domain={options.domain or 'null'}",
                f"data.shots={options.shots}",
                "data.draw=first",  # as in the results that are kept
                "trainer.num_workers=0",
                f"trainer.storage_path={folder}",
                "tracking.enabled=false",
            ]
            reports[preset] = train(load_config(overrides=settings), Display(quiet_stdout=True))
    rows = {"zero-shot": reports["adamw"]["zero_shot"], **reports}
    print(markdown(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(rows, options.out / f"few_shot_{name}.png")
    environment = json.loads(describe_environment())
    kept = {row: {key: value for key, value in report.items() if key != "run_id"} for row, report in rows.items()}
    (options.out / f"few_shot_{name}.json").write_text(
        json.dumps({"environment": environment, **kept}, indent=1) + "\n"
    )


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy, NLL and ECE in and out of distribution, mean ± half of the 95 % interval."""
    lines = ["| | steps | ID accuracy % | ID NLL | ID ECE | OOD accuracy % | OOD NLL | OOD ECE |", "|---" * 8 + "|"]
    for name, report in rows.items():
        sets = (report["id"], report["ood"]["mean"])
        cells = [
            cell(s[figure], 100 if figure == "accuracy" else 1) for s in sets for figure in ("accuracy", "nll", "ece")
        ]
        lines.append(f"| {name} | {report.get('steps', 0)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(figure: Mapping[str, float], factor: float) -> str:
    """One figure of the table."""
    digits = 1 if factor == 100 else 3
    return with_interval(figure, factor, digits).replace("±", " ± ")


def draw(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of accuracy and calibration error with their intervals."""
    figure = Figure(figsize=(8.6, 2.7), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = [("id", "accuracy", "ID accuracy %"), ("ood", "accuracy", "OOD accuracy %")]
    panels += [("id", "ece", "ID ECE, lower is better"), ("ood", "ece", "OOD ECE, lower is better")]
    for ax, (where, what, title) in zip(axes, panels, strict=True):
        factor = 100 if what == "accuracy" else 1
        for x, (name, report) in enumerate(rows.items()):
            figures = report["ood"]["mean"] if where == "ood" else report["id"]
            value = {key: number * factor for key, number in figures[what].items()}
            half = (value["high"] - value["low"]) / 2
            ax.bar(x, value["mean"], yerr=half, color=COLOURS[name], capsize=3, width=0.75)
            ax.annotate(
                f"{value['mean']:.{1 if factor == 100 else 2}f}",
                (x, 0),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="white",
            )
        ax.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right", fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.tick_params(axis="y", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
