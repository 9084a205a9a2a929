"""Growth of a step's time with n, M and W, the floors beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# of each part of the measurements: what grows, and what it is called
_AXES = {
    "n": ("n", "weights n"),
    "M": ("M", "observations M"),
    "W": ("ranks", "ranks W, one thread each"),
}
_COLOURS = ("#1f5f9e", "#7fb3d5", "#2b8a5a", "#8e5ea2", "#c0392b", "#d1752b", "#8c8c8c", "#444444")


def draw(lines: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write step_cost_n.png, step_cost_M.png and step_cost_W.png, each if it was measured.

    Args:
        lines: the measurements.
        folder: where to.
    """
    for part in _AXES:
        points = [line for line in lines if line["part"] == part and line["device"] == "cpu"]
        if points:
            _draw(points, part, folder / f"step_cost_{part}.png")


def _draw(points: Sequence[Mapping[str, Any]], part: str, path: Path) -> None:
    what, label = _AXES[part]
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    ax = figure.subplots()
    methods = list(dict.fromkeys(point["method"] for point in points))
    for method, colour in zip(methods, _COLOURS, strict=False):
        mine = sorted((p for p in points if p["method"] == method), key=lambda p: p[what])
        x = [p[what] for p in mine]
        ax.loglog(x, [p["ms_median"] for p in mine], "o-", color=colour, label=method, markersize=4)
        if all(p["floor_ms"] is not None for p in mine):
            ax.loglog(x, [p["floor_ms"] for p in mine], ":", color=colour, linewidth=1)
    if part == "W":
        ticks = sorted({p["ranks"] for p in points})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
    handles, labels = ax.get_legend_handles_labels()
    floor = Line2D([], [], color="k", linestyle=":")
    figure.legend([*handles, floor], [*labels, "floor"], loc="outside right center", fontsize=8, frameon=False)
    ax.set_xlabel(label)
    ax.set_ylabel("ms per step (median)")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
