"""Scatter plots of a comparison, drawn by matplotlib, as SVG that follows the page's colours, light or dark."""

import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kngd_ray.comparison.metrics import Metric
from kngd_ray.comparison.tables import Line

READABLE = 60  # points that can all bear numbers; of more, none does

_SIZE = (4.4, 3.4)  # inches, of 72 units
# Colours of which the page has its own: each stands for a variable of its style sheet.
_INK, _SOFT, _GRID, _PAGE, _FRONT = (f"#00000{digit}" for digit in range(1, 6))
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _GRID: "--line", _PAGE: "--page", _FRONT: "--mark"}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "kngd_ray",
    "font.size": 8,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "figure.facecolor": "none",
}


def scatter(shown: Sequence[tuple[int, Line]], points: NDArray[np.float64], x: Metric, y: Metric) -> Markup:
    """Draw rows by two metrics, with their numbers in the table.

    Args:
        shown: number and row of each point.
        points: (n, 2) figures as they are shown.
        x: the first metric.
        y: the second metric.

    Returns:
        SVG without an outside reference; the name of a row is the tooltip of its point.
    """
    numbered = len(shown) <= READABLE
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        axes.margins(0.08)
        axes.locator_params(nbins=6)
        axes.update_datalim(points)
        axes.autoscale_view()
        axes.set_xlabel(_axis(x))
        axes.set_ylabel(_axis(y))
        for (number, line), point in zip(shown, points, strict=True):
            colour = _FRONT if line.front else _SOFT
            text = axes.text(
                float(point[0]),
                float(point[1]),
                str(number) if numbered else " ",
                ha="center",
                va="center",
                fontsize=7 if numbered else 2,
                color=_PAGE if line.front else _INK,
                zorder=3 if line.front else 2,  # those on the front above the others
                bbox={"boxstyle": "circle", "facecolor": colour if line.front else _PAGE, "edgecolor": colour},
            )
            patch = text.get_bbox_patch()
            assert patch is not None
            patch.set_gid(f"row-{number}")
        for artist in axes.findobj():
            artist.set_clip_on(False)
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(stream.getvalue(), {number: line.row.name for number, line in shown})


def _inline(svg: str, names: dict[int, str]) -> Markup:
    """An SVG file as an element of the page: without header and ids, with the page's colours and tooltips."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<g id="row-(\d+)">', lambda found: f"<g><title>{found[1]}: {escape(names[int(found[1])])}</title>", svg
    )
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)  # noqa: S704 - all text in it is matplotlib's or was escaped


def _axis(metric: Metric) -> str:
    return f"{metric.label} ({metric.better})" if metric.better else metric.label
