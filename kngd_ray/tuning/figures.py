"""Optuna's own pictures of a study: as PNG by matplotlib, as interactive HTML by plotly.

::

    <folder>/history.png, contour.png, ...
             history.html, contour.html, ...    they ask for nothing but
             plotly.min.js                      4.8 MB, once for all pages
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from kngd_ray.storage import storage_errors, write_text

logger = logging.getLogger(__name__)

_SCRIPT = "plotly.min.js"
# MLflow previews a page by itself, out of its folder: it says then what it lacks, instead of nothing.
_PAGE = """<!DOCTYPE html>
<html>
<head><meta charset="utf-8"><title>{name}</title></head>
<body>
<script src="{script}" onerror="document.body.textContent = '{lacks}'"></script>
{figure}
</body>
</html>
"""
_LACKS = "This page needs {script} beside it: download the folder of the figures to open it, or see {name}.png."
_CONTOUR = ("filter.p0", "observation.0.r0")  # of prior variance against observation noise, where both were searched


def study_figures(study: optuna.Study, objectives: Sequence[str], folder: Path) -> list[str]:
    """Draw the figures that a study has enough trials for.

    Args:
        study: the study.
        objectives: names of its objectives.
        folder: where the pictures go, created if need be.

    Returns:
        Names of the pictures, each there as ``.png`` and ``.html``; the pages share one script in that folder.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (plot, arguments) in _plots(study, objectives).items():
        try:
            _draw(plot, study, arguments, folder / name)
        except (ValueError, RuntimeError) as error:  # a study with too few or too similar trials for it
            logger.info("%s is not drawn: %s", name, error)
            continue
        drawn.append(name)
    if drawn:
        write_text(folder / _SCRIPT, get_plotlyjs())
    return drawn


def _plots(study: optuna.Study, objectives: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of Optuna's function and its arguments by name of the picture."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    everywhere = set.intersection(*(set(trial.params) for trial in finished)) if finished else set()
    varied = {name for name in everywhere if len({trial.params[name] for trial in finished}) > 1}
    plots: dict[str, tuple[str, dict[str, Any]]] = {}
    if len(objectives) > 1:
        if len(objectives) < 4:
            plots["pareto_front"] = "plot_pareto_front", {"target_names": list(objectives)}
        chosen: Callable[[Any], float] = _first
        target: dict[str, Any] = {"target": chosen, "target_name": objectives[0]}
    else:
        target = {"target_name": objectives[0]}
    plots["history"] = "plot_optimization_history", target
    if len(finished) > 1 and varied:
        plots["importances"] = "plot_param_importances", target
        plots["parallel_coordinates"] = "plot_parallel_coordinate", {"params": sorted(everywhere), **target}
    pair = [name for name in _CONTOUR if name in varied]
    pair += [name for name in sorted(varied) if name not in pair and name.endswith("r0")]
    if len(pair) > 1:
        plots["contour"] = "plot_contour", {"params": pair[:2], **target}
    return plots


def _first(trial: Any) -> float:
    value: float = trial.values[0]
    return value


def _draw(plot: str, study: optuna.Study, arguments: dict[str, Any], path: Path) -> None:
    from optuna.visualization import matplotlib as as_picture

    plt = as_picture._matplotlib_imports.plt
    # Optuna sets a style of its own for the whole process, where it would change the figures of a notebook
    with warnings.catch_warnings(), plt.rc_context():
        warnings.simplefilter("ignore")  # that matplotlib support is experimental, and what it finds in our data
        axes = getattr(as_picture, plot)(study, **arguments)
        axes = axes.flat[0] if hasattr(axes, "flat") else axes
        figure = axes.figure
        figure.set_size_inches(8, 5)
        with storage_errors(path):
            figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight")
        plt.close(figure)
        page = getattr(optuna.visualization, plot)(study, **arguments)
    figure = page.to_html(full_html=False, include_plotlyjs=False, default_height="95vh")
    lacks = _LACKS.format(script=_SCRIPT, name=path.name)
    write_text(path.with_suffix(".html"), _PAGE.format(name=path.name, script=_SCRIPT, lacks=lacks, figure=figure))
