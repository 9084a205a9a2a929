"""Choices made after a fit has ended, stored beside its checkpoints."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kngd_ray.config import parse
from kngd_ray.errors import CheckpointError
from kngd_ray.storage import read_json, write_text
from kngd_ray.training.calibration import Calibration
from kngd_ray.training.novelty import Novelty
from kngd_ray.training.posterior_options import PosteriorOptions

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Settled:
    """What was chosen for a fit after it had ended.

    Attributes:
        calibration: tau, sharpening and the scaling temperature.
        posterior: how the posterior enters.
        alpha: weight ensembling with the pretrained model; None is the fit's own setting.
        novelty: the variances that novelty percentiles are ranks among; None if there are none.
    """

    calibration: Calibration = field(default_factory=lambda: Calibration(1.0, 1.0))
    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    alpha: float | None = None
    novelty: Novelty | None = None


def save_settled(folder: Path, settled: Settled) -> None:
    """Save a fit's calibration beside its checkpoints.

    Args:
        folder: of the fit.
        settled: what was chosen.
    """
    write_text(folder / CALIBRATION, json.dumps(asdict(settled), indent=1))


def read_settled(folder: Path) -> Settled:
    """Read what :func:`save_settled` kept.

    Args:
        folder: of the fit.

    Returns:
        What was chosen. Where nothing was kept, as of a fit that has not ended, the mean of the belief predicts: a tau
        that was not chosen makes nearly all classes as probable.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return Settled(Calibration(0.0, 1.0), PosteriorOptions(predict="mean"))
    try:
        raw = read_json(path)
        posterior = parse(PosteriorOptions, raw["posterior"])
        compared = raw.get("novelty")  # runs of earlier versions have none
        novelty = None if compared is None else Novelty(tuple(float(q) for q in compared["quantiles"]))
        return Settled(Calibration(**raw["calibration"]), posterior, raw.get("alpha"), novelty)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it, and name a checkpoint to predict at its mean."
        ) from error
