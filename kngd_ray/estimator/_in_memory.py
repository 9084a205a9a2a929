"""A fit without folders: what it learned stays in memory, in the form of a checkpoint."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kngd_ray.errors import FilterError, UsageError
from kngd_ray.estimator.given import said_of_copies
from kngd_ray.filters import Belief
from kngd_ray.sharding import SingleProcess
from kngd_ray.storage import storage_errors
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import AnyPredictor, Calibration, uncalibrated
from kngd_ray.training.checkpoint import Checkpoint, save
from kngd_ray.training.fit import FitTask, StepRecord, fit
from kngd_ray.training.folds import twins_of
from kngd_ray.training.kalman import FORESEEN
from kngd_ray.training.method import MethodState, stopped_short
from kngd_ray.training.novelty import Novelty, calibrate_and_compare, total_variance
from kngd_ray.training.posterior_options import PosteriorOptions
from kngd_ray.training.predict import Predictor
from kngd_ray.training.prior import Prior
from kngd_ray.training.resumable import describe
from kngd_ray.training.settled import Settled
from kngd_ray.training.stream import Foresight

# in a manifest: steps of the fits before, and pictures that were predicted by an earlier one
_TAKEN, _PREDICTED = "taken", "predicted"


@dataclass(frozen=True)
class Held(Prior):
    """A posterior in memory as the prior of the next fit.

    Attributes:
        state: of the earlier fit.
    """

    state: MethodState

    @property
    def taken(self) -> int:
        """Steps of all earlier fits: parts of one stream."""
        return int(self.manifest[_TAKEN])

    @classmethod
    def of(cls, kept: Checkpoint) -> "Held":
        """From a checkpoint.

        Args:
            kept: in memory or read.

        Returns:
            The prior.
        """
        taken = kept.manifest.get(_TAKEN, 0) + kept.manifest["step"]
        told = {"shots": kept.manifest["shots"], _TAKEN: taken, _PREDICTED: kept.manifest.get(_PREDICTED, 0)}
        return cls(kept.folder, {"files": {}, **told}, kept.state)

    def load(self) -> MethodState:
        """The state itself."""
        return self.state


def learn(task: FitTask, identity: Mapping[str, Any], device: str) -> Checkpoint:
    """Run a fit to its end.

    Args:
        task: what to fit.
        identity: what the weights belong to; see :func:`kngd_ray.training.restoring.identity_of`.
        device: where to compute.

    Returns:
        The checkpoint that a run would have written, without a folder.
    """
    unsettled = []

    def on_step(record: StepRecord) -> None:
        if record.stats is not None and record.stats.unsettled:
            unsettled.append(record.step)

    state, steps = fit(task, device=device, on_step=on_step).state(), task.sampler.steps
    if unsettled:
        warnings.warn(stopped_short(task.options.filter.iterations), stacklevel=4)
    manifest = describe(task, identity) | {
        "step": steps,
        "steps": steps,
        "parameters": {name: list(p.shape) for name, p in state.weights.items()},
        "pieces": list(state.pieces),
        _TAKEN: 0 if task.prior is None else task.prior.taken,
        _PREDICTED: 0 if task.prior is None else task.prior.manifest[_PREDICTED] + len(task.support),
    }
    return Checkpoint(Path(), manifest, state)


def calibrate(
    task: FitTask, posterior: PosteriorOptions, fitted: MethodState, device: str
) -> tuple[Calibration, Novelty | None]:
    """Choose tau on the shots, as far as they can be held out.

    Args:
        task: the fit.
        posterior: how the posterior enters predictions.
        fitted: what came of the fit.
        device: where to compute.

    Returns:
        The calibration, at the tau of no folds where one cannot be fitted, and what pictures are compared with.
    """
    if posterior.folds and (said := said_of_copies(twins_of(task.support))):
        warnings.warn(said, UserWarning, stacklevel=4)
    try:
        return calibrate_and_compare(task, posterior, device, fitted)
    except FilterError as error:
        found, said = uncalibrated(posterior, error)
        warnings.warn(said, UserWarning, stacklevel=4)
        return found, None


def foreseen(task: FitTask, kept: Checkpoint, calibration: Calibration, folds: int) -> Calibration:
    """The calibration after a part of a stream: the tau that has predicted best so far.

    Args:
        task: the fit of the part, which continues another.
        kept: what came of it.
        calibration: as it would be otherwise.
        folds: of the calibration; 0 chooses nothing.

    Returns:
        The calibration.
    """
    scores = kept.state.replicated.get(FORESEEN)
    if task.stream is None or scores is None or not folds or kept.manifest[_PREDICTED] < 2 * folds:
        return calibration
    # a stream is not sharpened: what has predicted it chose tau for the logits as they are
    return replace(calibration, tau=Foresight(task.stream, scores).tau, sharpening=1.0)


def met(before: Settled, predictor: Predictor, shots: Support) -> Settled:
    """What was settled before a part of a stream that is too small to choose anything by.

    Args:
        before: after the part before it.
        predictor: of the belief that has not seen its shots.
        shots: of the part.

    Returns:
        The same, its novelty that of pictures met of late.
    """
    if before.novelty is None:
        return before
    features = shots.features.to(predictor.head.get_buffer("class_embeddings"))
    return replace(before, novelty=before.novelty.renewed(total_variance(predictor, features)))


def check_continues(before: Checkpoint, identity: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse a posterior as the prior of another task.

    Args:
        before: the earlier fit.
        identity: what the weights of the next one belong to.
        options: of the next one, plain data.

    Raises:
        UsageError: model, classes, prompts, adapter or covariance are others.
    """
    then = before.manifest["options"]
    for what, a, b in (
        *((key, before.manifest[key], identity[key]) for key in ("model", "class_names", "templates")),
        ("adapter", then["adapter"], options["adapter"]),
        ("filter.covariance", then["filter"]["covariance"], options["filter"]["covariance"]),
    ):
        if a != b:
            raise UsageError(f"{what} was changed since the last fit: call fit, which starts anew.")


def write(folder: Path, kept: Checkpoint) -> None:
    """Write a checkpoint where :func:`~kngd_ray.training.resumable.latest` finds it.

    Args:
        folder: of the fit; it is made if it is missing.
        kept: the checkpoint.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    description = {key: value for key, value in kept.manifest.items() if key not in ("parameters", "pieces", "files")}
    state = kept.state
    if state.covariance and not state.pieces:  # it was read, and ranks that wrote it had pieces that are one now
        whole: dict[str, tuple[int, int]] = {}
        for name, (start, stop) in (piece for of_rank in kept.manifest["pieces"] for piece in of_rank.items()):
            first, last = whole.get(name, (start, stop))
            whole[name] = min(first, start), max(last, stop)
        state = replace(state, pieces=[whole])
    save(folder / f"step-{kept.manifest['step']:08d}-000000", state, description, SingleProcess())


def in_double(predictor: AnyPredictor) -> Predictor:
    """The same predictor in double precision, where a row's prediction does not depend on the other rows.

    Args:
        predictor: of a head.

    Returns:
        The predictor.
    """
    assert isinstance(predictor, Predictor)
    belief = predictor.belief
    if belief is not None:
        covariance = {
            name: {key: t.double() if t.is_floating_point() else t for key, t in state.items()}
            for name, state in belief.covariance.items()
        }
        belief = Belief(belief.mu.double(), covariance)
    return Predictor(predictor.head.double(), predictor.family, belief, predictor.options)
