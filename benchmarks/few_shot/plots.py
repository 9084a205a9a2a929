"""The report's pictures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.few_shot.claims import mean_curve
from kngd_ray.training.metrics import ECE_BINS

COLOURS = {
    "ours": "#1f5f9e",
    "adamw_class_residual": "#d1752b",
    "adamw_class_residual_fixed": "#d1752b",
    "ivon": "#6a9f58",
    "gda": "#d1615d",
    "tip_adapter_f": "#a77c9f",
    "proker": "#967662",
    "clap": "#e7ca60",
    "lp++": "#63b5b0",
    "linear_probe": "#e39bc1",
    "zero_shot": "#8c8c8c",
}
NAMES = {
    "ours": "kalman (the default)",
    "adamw_class_residual": "adamw, 60 trials",
    "adamw_class_residual_fixed": "adamw, fixed settings",
    "zero_shot": "zero-shot",
}
RELIABILITY, CURVES, SHOTS = "reliability.png", "curves.png", "shots.png"
_PANELS = (
    ("id_accuracy", "ID accuracy %"),
    ("ood_accuracy", "OOD accuracy %"),
    ("id_nll", "ID NLL"),
    ("ood_nll", "OOD NLL"),
)
_LEAST_IN_BIN = 0.002  # share of the pictures, below which a bin is noise


def reliability(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy against confidence, all problems together; a panel for each kind of test set that there is.

    Args:
        frame: all rows.
        path: of the picture.
    """
    sets = [where for where in ("id", "ood") if frame[f"{where}_accuracy"].notna().any()]
    figure = Figure(figsize=(4.5 * len(sets), 4.2), layout="constrained")
    for axes, where in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        for method in _drawn(frame):
            rows = frame[frame["method"] == method]
            count, confidence, right = (
                np.sum(np.stack(rows[f"bins_{where}_{name}"].map(np.asarray).tolist()), axis=0)
                for name in ("count", "confidence", "right")
            )
            kept = count > max(_LEAST_IN_BIN * count.sum(), 0)
            axes.plot(
                confidence[kept] / count[kept],
                right[kept] / count[kept],
                color=COLOURS[method],
                marker="o",
                markersize=3,
                label=NAMES.get(method, method),
                linewidth=2 if method == "ours" else 1.2,
            )
        axes.set_title(f"{where.upper()}, {ECE_BINS} bins", fontsize=10)
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        _plain(axes)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def shots(frame: pd.DataFrame, path: Path) -> None:
    """Figures against shots per class: the mean over data sets of the mean over their domains and support sets.

    Args:
        frame: all rows; shots that a data set has no rows of are left out.
        path: of the picture.
    """
    tables = {
        title: frame.pivot_table(index=["method", "shots"], columns="data", values=name) * scale
        for name, title in _PANELS
        if frame[name].notna().any()
        for scale in [100 if name.endswith("accuracy") else 1]
    }
    figure = Figure(figsize=(3.1 * len(tables) + 1.6, 3.0), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (title, table) in zip(panels, tables.items(), strict=True):
        means = table.dropna().mean(axis=1).unstack("shots")
        for method in _drawn(frame):
            if method in means.index:
                own = means.loc[method].dropna()
                width = 2.4 if method == "ours" else 1.2
                label = NAMES.get(method, method)
                axes.plot(own.index, own, color=COLOURS[method], marker="o", markersize=3, label=label, linewidth=width)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(means.columns), [str(n) for n in means.columns])
        axes.set_xlabel("shots per class")
        axes.set_title(title, fontsize=10)
        _plain(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=130)


def curves(frame: pd.DataFrame, path: Path) -> None:
    """Accuracy against steps, for each data set at its most shots, means over domains and support sets.

    Args:
        frame: all rows.
        path: of the picture.
    """
    with_steps = frame[frame["steps"].notna()]
    most = with_steps[with_steps["shots"] == with_steps.groupby("data")["shots"].transform("max")]
    drawn = [
        (data, where)
        for where in ("id", "ood")
        for data, rows in most.groupby("data")
        if rows[f"{where}_accuracy"].any()
    ]
    if not drawn:
        Figure(figsize=(4, 2)).savefig(path)
        return
    wide = min(len(drawn), 3)
    figure = Figure(figsize=(3.9 * wide, 3.0 * -(-len(drawn) // wide)), layout="constrained")
    panels = figure.subplots(-(-len(drawn) // wide), wide, squeeze=False).flatten()
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    for axes, (data, where) in zip(panels, drawn, strict=False):
        rows = most[most["data"] == data]
        for method in _drawn(rows):
            own = rows[rows["method"] == method]
            at = np.unique(np.geomspace(1, own["steps"].max(), 120).astype(int)).astype(float)
            accuracy = 100 * mean_curve(own, f"curve_{where}", at)
            width = 2.4 if method == "ours" else 1.2
            marker = "D" if len(at) == 1 else None  # one step is no line
            label = NAMES.get(method, method)
            axes.plot(at, accuracy, color=COLOURS[method], label=label, linewidth=width, marker=marker, zorder=3)
        axes.set_xscale("log")
        axes.set_xlabel("steps")
        axes.set_ylabel(f"{where.upper()} accuracy %")
        axes.set_title(f"{data}, {rows['shots'].iloc[0]} shots, {where.upper()}", fontsize=10)
        _plain(axes)
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _drawn(frame: pd.DataFrame) -> Sequence[str]:
    there = set(frame["method"])
    return [method for method in COLOURS if method in there]


def _plain(axes) -> None:  # type: ignore[no-untyped-def]
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
