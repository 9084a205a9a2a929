"""Figures of a run, drawn without pyplot: no window, no state shared with the caller's figures."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from kngd_ray.storage import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 15
COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#a6761d", "#e7298a")
_PREFIX = "train/"
_PANELS = (  # figure of a step, title, unit; drawn where it is present
    ("accuracy", "prequential accuracy", "share right"),
    ("nll", "prequential NLL", "nats per sample"),
    ("innovation_rms", "innovation RMS", "RMS of ν"),
    ("nis_per_observation", "NIS per observation", "NIS / M"),
    ("log_evidence", "cumulative log-evidence", "nats"),
)


def reliability_diagram(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], path: Path, title: str = "Reliability"
) -> dict[str, float]:
    """Draw accuracy against confidence in 15 equal bins, and how many samples each bin holds.

    Args:
        curves: by test set, probabilities (m, C) and labels (m,); tensors on the CPU will do.
        path: PNG file to write.
        title: over the figure.

    Returns:
        ECE by test set, as :class:`~kngd_ray.training.metrics.Scores` computes it.
    """
    figure = blank(5.2, 5.6, margins=(0.65, 0.12, 0.5, 0.35), between=0.1)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    top.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated", zorder=1)
    centres = (np.arange(BINS) + 0.5) / BINS
    width = 1 / BINS / max(1, len(curves))
    errors = {}
    for number, (name, (probabilities, labels)) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        counts, confidence, accuracy = _bins(np.asarray(probabilities, dtype=float), np.asarray(labels))
        share = counts / max(1, counts.sum())
        errors[name] = float((share * np.abs(accuracy - confidence)).sum())
        held = counts > 0
        at, right = confidence[held], accuracy[held]
        label = f"{name}: ECE {100 * errors[name]:.1f}%, n = {int(counts.sum()):,}"
        top.vlines(at, at, right, color=colour, alpha=0.6, linewidth=1.2, zorder=2)
        top.plot(at, right, color=colour, linewidth=0.8, alpha=0.5, zorder=3)
        area = 8 + 90 * np.sqrt(share[held])  # a bin of few samples says little
        top.scatter(at, right, area, color=colour, alpha=0.85, linewidths=0, label=label, zorder=4)
        left = centres + (number - (len(curves) - 1) / 2) * width
        bottom.bar(left, counts, width=0.95 * width, color=colour)
    top.set(xlim=(0, 1.01), ylim=(-0.02, 1.03), ylabel="accuracy", title=title)
    for handle in top.legend(loc="upper left", fontsize=8, framealpha=0.9).legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([30])
    bottom.set(xlabel="confidence", ylabel="samples")
    if any(len(np.asarray(labels)) for _, labels in curves.values()):
        bottom.set_yscale("symlog", linthresh=1)
    for axes in (top, bottom):
        tidy(axes)
    figure.align_ylabels()
    _save(figure, path)
    return errors


def learning_curve(steps: Sequence[Mapping[str, float]], path: Path, title: str = "Learning curve") -> None:
    """Draw what each step said of its batch before it learned from it.

    Args:
        steps: ``{"step": 3, "train/nll": 0.4, ...}`` in order, with or without the prefix; figures that
            no step has are left out, and a value that is missing or not finite is a gap.
        path: PNG file to write.
        title: over the figure.
    """
    columns = {name: _column(steps, name) for name, _, _ in _PANELS}
    present = [panel for panel in _PANELS if np.isfinite(columns[panel[0]]).any()] or [_PANELS[0]]
    at = np.array([step["step"] for step in steps], dtype=float)
    figure = blank(6.4, 0.7 + 1.5 * len(present), margins=(0.8, 0.12, 0.5, 0.6), between=0.4)
    axes: Any = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    for place, (name, label, unit) in zip(axes, present, strict=True):
        heading = label
        values = columns[name]
        if name == "log_evidence":
            values = np.where(np.isfinite(values), np.nancumsum(np.where(np.isfinite(values), values, 0.0)), np.nan)
        if name == "nis_per_observation":
            place.axhline(1, color="0.4", linewidth=1, linestyle="--")
        window = len(steps) // 40
        smooth = window > 1 and name != "log_evidence"
        marker = "o" if len(steps) <= 40 else None
        light = {"alpha": 0.3, "linewidth": 0.6} if smooth else {"linewidth": 1.1}
        place.plot(at, values, marker=marker, color=COLOURS[0], markersize=3, **light)
        if smooth:
            place.plot(at, _running_mean(values, window), color=COLOURS[0], linewidth=1.4)
            heading += f", mean of {window}"
        place.set_title(heading, fontsize=9, loc="left")
        place.set_ylabel(unit, fontsize=8)
        tidy(place)
    if present[0][0] == "accuracy":
        axes[0].set_ylim(-0.03, 1.03)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def ensemble_curve(
    alphas: Sequence[float],
    lines: Mapping[str, ArrayLike],
    path: Path,
    title: str = "Weight ensemble",
    used: float | None = None,
) -> None:
    """Draw accuracy over how much of the trained weights there is in the average with the pretrained ones.

    Args:
        alphas: A values from 0, the pretrained model, to 1, the trained one, ascending.
        lines: by test set, accuracies (A, fits); several fits are a line of means within the band that they span.
        path: PNG file to write.
        title: over the figure.
        used: alpha that is marked; None marks none.
    """
    figure = blank(5.2, 3.8)
    axes = figure.subplots()
    if used is not None:
        axes.axvline(used, color="0.4", linewidth=1, linestyle="--", label=f"in use: {used:g}")
    for colour, (name, accuracies) in zip(cycle(COLOURS), lines.items(), strict=False):
        percent = 100 * np.asarray(accuracies, dtype=float)
        axes.plot(alphas, percent.mean(1), color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
        if percent.shape[1] > 1:
            axes.fill_between(alphas, percent.min(1), percent.max(1), color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="alpha: 0 pretrained, 1 trained", ylabel="accuracy %", title=title)
    axes.legend(fontsize=8, framealpha=0.9)
    tidy(axes)
    _save(figure, path)


def stream_curve(curve: Mapping[str, Any], path: Path, title: str = "Stream") -> None:
    """Draw how a stream was predicted as it came, and what was kept of its domains.

    Args:
        curve: ``samples`` met after each batch, its ``accuracy``, ``nll`` and ``tau``; ``stages``, each with ``domain``
            and ``end`` in samples; ``tested``, each with ``samples`` and ``accuracy`` by domain. The last two may be
            empty.
        path: PNG file to write.
        title: over the figure.
    """
    stages, tested = curve["stages"], curve["tested"]
    by_domain = len(tested) > 1
    figure = blank(6.4, 5.6 if by_domain else 4.0)
    axes: Any = figure.subplots(2 + by_domain, 1, sharex=True, squeeze=False)[:, 0]
    at = np.asarray(curve["samples"], dtype=float)
    sizes = np.diff(at, prepend=0.0)
    for place, name, unit in ((axes[0], "accuracy", "share right"), (axes[1], "nll", "nats per sample")):
        values = np.asarray(curve[name], dtype=float)
        place.plot(at, values, color=COLOURS[0], alpha=0.35, linewidth=0.8, marker=".", markersize=3)
        so_far = np.cumsum(values * sizes) / at
        place.plot(at, so_far, color=COLOURS[0], linewidth=1.5)
        place.set_title(
            f"prequential {name if name == 'accuracy' else 'NLL'}: batches, and mean so far", fontsize=9, loc="left"
        )
        place.set_ylabel(unit, fontsize=8)
    if by_domain:
        for colour, domain in zip(cycle(COLOURS), tested[0]["accuracy"], strict=False):
            met = [look["samples"] for look in tested]
            share = [look["accuracy"][domain] for look in tested]
            axes[2].plot(met, share, color=colour, marker="o", markersize=3, linewidth=1.2, label=domain)
        axes[2].set_title("accuracy on test pictures after each stage", fontsize=9, loc="left")
        axes[2].set_ylabel("share right", fontsize=8)
        axes[2].legend(fontsize=7, framealpha=0.9, ncols=2)
    axes[0].set_xlim(0, 1.02 * at[-1])  # all of the stream, so that a name in the middle of its stage is on the axes
    start = 0
    for stage in stages:
        for place in axes:
            place.axvline(stage["end"], color="0.6", linewidth=0.8, linestyle=":")
        middle = (start + stage["end"]) / 2
        axes[0].annotate(stage["domain"], (middle, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=7)
        start = stage["end"]
    for place in axes:
        tidy(place)
    axes[-1].set_xlabel("samples of the stream")
    figure.align_ylabels()
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _bins(
    p: NDArray[np.float64], labels: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Count, mean confidence and accuracy of each bin, (15,) each."""
    if not len(p):
        return np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
    top = p.max(1)
    right = p.argmax(1) == labels
    number = np.clip(np.digitize(top, np.linspace(0, 1, BINS + 1)) - 1, 0, BINS - 1)
    counts = np.bincount(number, minlength=BINS).astype(float)
    divisor = np.maximum(counts, 1)
    return counts, np.bincount(number, top, BINS) / divisor, np.bincount(number, right, BINS) / divisor


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of the finite values around each one."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    count = np.convolve(finite, kernel, "same")
    total = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def _column(steps: Sequence[Mapping[str, float]], name: str) -> NDArray[np.float64]:
    values = [step.get(_PREFIX + name, step.get(name)) for step in steps]
    column = np.array([np.nan if value is None else value for value in values], dtype=float)
    return np.where(np.isfinite(column), column, np.nan)


def blank(
    width: float, height: float, margins: tuple[float, float, float, float] | None = None, between: float = 0.0
) -> "Figure":
    """Begin a figure of so many inches, without pyplot.

    Args:
        width: in inches, as all of these.
        height: of all.
        margins: left, right, bottom and top of the axes. None measures what they hold before it is drawn, which takes
            as long as to draw it once more.
        between: axes that stand one above the other.
    """
    from matplotlib.figure import Figure

    if margins is None:
        return Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure = Figure(figsize=(width, height), dpi=110)
    left, right, bottom, top = margins
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, hspace=between)
    return figure


def tidy(axes: "Axes") -> None:
    """Give axes the look that all figures have."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def _save(figure: "Figure", path: Path) -> None:
    """Write a PNG of 32 colours, a third of the size of one with all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from"
        )  # in names of classes and domains; a box stands there
        canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    picture = Image.fromarray(pixels).convert("RGB").quantize(32)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "PNG", optimize=True)
