"""Figures of results that are shown, in a notebook or by their owner, and not saved by us."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from kngd_ray.tracking._figures import COLOURS, blank, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Estimate = tuple[float, float, float]
"""A mean, and the ends of its interval."""


def accuracy_plot(rows: Mapping[str, Mapping[str, Estimate]], title: str = "Accuracy") -> "Figure":
    """Draw the accuracy of methods on test sets, with its interval over seeds.

    Args:
        rows: by method, by test set, shares in [0, 1]; methods from top to bottom.
        title: over the figure.

    Returns:
        The figure; a notebook shows it, ``figure.savefig(path)`` keeps it.
    """
    sets = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    figure = _shown(blank(6.4, 1.1 + 0.45 * max(1, len(sets)) * max(1, len(rows)) ** 0.5))
    axes = figure.subplots()
    step = 0.8 / max(1, len(rows))
    for number, (method, figures) in enumerate(rows.items()):
        at = [sets.index(name) + step * (number + 0.5) - 0.4 for name in figures]
        means = [100 * mean for mean, _, _ in figures.values()]
        below = [100 * max(mean - low, 0.0) for mean, low, _ in figures.values()]
        above = [100 * max(high - mean, 0.0) for mean, _, high in figures.values()]
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(means, at, xerr=[below, above], fmt="o", color=colour, label=method, capsize=2, linewidth=1)
    axes.set_yticks(range(len(sets)), ["ID" if name == "id" else name for name in sets])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy (%)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    tidy(axes)
    return figure


def trial_plot(values: Sequence[tuple[int, float]], name: str, *, minimised: bool, title: str = "Search") -> "Figure":
    """Draw the objective of a search's trials, and the best so far.

    Args:
        values: number and objective of each finished trial, by number.
        name: of the objective.
        minimised: whether less is better.
        title: over the figure.

    Returns:
        The figure.
    """
    figure = _shown(blank(6.4, 3.6))
    axes = figure.subplots()
    numbers = [number for number, _ in values]
    best, so_far = None, []
    for _, value in values:
        best = value if best is None else min(best, value) if minimised else max(best, value)
        so_far.append(best)
    axes.plot(numbers, [value for _, value in values], "o", color=COLOURS[0], markersize=4, label="trial")
    axes.step(numbers, so_far, where="post", color=COLOURS[1], label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(name)
    axes.set_title(title)
    if values:
        axes.legend(fontsize=8)
    tidy(axes)
    return figure


def _shown(figure: "Figure") -> "Figure":
    """Let a notebook show a figure that has no window."""

    def png() -> bytes:
        stream = BytesIO()
        figure.savefig(stream, format="png", dpi=110)
        return stream.getvalue()

    figure._repr_png_ = png  # type: ignore[attr-defined]
    return figure
