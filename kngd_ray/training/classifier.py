"""A finished fit as a classifier of pictures: CLIP's image tower, the trained head and its belief."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kngd_ray.clip import CLIPHead, ClipModel, CLIPNetwork, Head, ModelConfig, load_model
from kngd_ray.config import parse
from kngd_ray.errors import CheckpointError
from kngd_ray.filters import Belief
from kngd_ray.observations import trainable
from kngd_ray.storage import write_text
from kngd_ray.training.calibration import AnyPredictor, Calibration, assembled
from kngd_ray.training.checkpoint import MANIFEST, Checkpoint
from kngd_ray.training.checkpoint import load as load_checkpoint
from kngd_ray.training.kalman import KalmanNGD, nested
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import PosteriorOptions, Prediction, Predictor
from kngd_ray.training.resumable import SOURCE, latest

CALIBRATION = "calibration.json"


def identity_of(
    model: ClipModel, config: ModelConfig, class_names: Sequence[str], templates: Sequence[str]
) -> dict[str, Any]:
    """What a head's weights belong to: a checkpoint of another identity is refused.

    Args:
        model: the loaded model.
        config: how to load it again.
        class_names: the classes, in label order.
        templates: prompts of the class embeddings.

    Returns:
        JSON data.
    """
    return {
        "model": {"fingerprint": model.fingerprint, "embed_dim": model.embed_dim},
        SOURCE: asdict(config.absolute()),
        "class_names": list(class_names),
        "templates": list(templates),
    }


def restore_predictor(
    checkpoint: Checkpoint,
    model: ClipModel,
    posterior: PosteriorOptions,
    *,
    alpha: float | None = None,
    class_embeddings: Tensor | None = None,
) -> AnyPredictor:
    """The predictor that a checkpoint holds.

    Args:
        checkpoint: a verified checkpoint of a fit.
        model: the pretrained model that it was trained from.
        posterior: how the posterior enters.
        alpha: weight ensembling with the pretrained model; None is as the fit was told.
        class_embeddings: (C, d) unit text embeddings of its classes, if they are known already.

    Returns:
        The predictor, where the model is; of a fit that trains no towers, on the CPU.

    Raises:
        CheckpointError: the weights are of another architecture.
    """
    manifest = checkpoint.manifest
    options = parse(FitOptions, manifest["options"])
    if class_embeddings is None:
        class_embeddings = model.encode_classes(manifest["class_names"], manifest["templates"])
    head: Head = CLIPHead(class_embeddings, model.logit_scale, options.adapter)
    if options.tune.images:
        head = CLIPNetwork(
            model,
            manifest["class_names"],
            manifest["templates"],
            options.tune,
            options.adapter,
            pairs=options.pairs,
            class_embeddings=class_embeddings,
        )
    parameters = trainable(head)
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    if shapes != manifest["parameters"]:
        name = next(n for n in {**shapes, **manifest["parameters"]} if shapes.get(n) != manifest["parameters"].get(n))
        raise CheckpointError(
            f"{checkpoint.folder} holds weights of another architecture: its {name} is "
            f"{manifest['parameters'].get(name)}, where {shapes.get(name)} is expected; use the model and classes "
            "that it was trained with."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(checkpoint.state.weights[name])
    alpha = options.tune.alpha if alpha is None else alpha
    if options.method != "kalman":
        return assembled(head, None, None, posterior, alpha)
    if isinstance(head, CLIPNetwork):
        covariance = nested(checkpoint.state.covariance, head.class_embeddings)
        # the mean is what the network has; in the order of theta, as draws are
        belief = Belief(head.class_embeddings.new_empty(0), {name: covariance[name] for name in parameters})
        return assembled(head, options.filter.covariance, belief, posterior, alpha)
    method = KalmanNGD(head, options)
    method.load(checkpoint.state)
    return assembled(head, method.family, method.belief, posterior, alpha)


@dataclass(frozen=True)
class Settled:
    """What was chosen for a fit after it had ended.

    Attributes:
        calibration: tau and the scaling temperature.
        posterior: how the posterior enters.
        alpha: weight ensembling with the pretrained model; None is as the fit was told.
    """

    calibration: Calibration = field(default_factory=lambda: Calibration(1.0, 1.0))
    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    alpha: float | None = None


def save_settled(folder: Path, settled: Settled) -> None:
    """Keep a fit's calibration beside its checkpoints.

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
        What was chosen; tau = 1 and no scaling where nothing was kept.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return Settled()
    try:
        raw = json.loads(path.read_text())
        posterior = parse(PosteriorOptions, raw["posterior"])
        return Settled(Calibration(**raw["calibration"]), posterior, raw.get("alpha"))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to predict with tau = 1.") from error


class Classifier:
    """Pictures to class probabilities with their uncertainty.

    Args:
        model: the CLIP model.
        predictor: the trained head and its belief.
        class_names: the classes, in label order.
        calibration: tau and the scaling temperature.
    """

    def __init__(
        self, model: ClipModel, predictor: AnyPredictor, class_names: Sequence[str], calibration: Calibration
    ) -> None:
        self.model = model
        self.predictor = predictor
        self.class_names = tuple(class_names)
        self.calibration = calibration

    @classmethod
    def load(cls, folder: Path, model: ModelConfig | None = None) -> "Classifier":
        """Load a fit.

        Args:
            folder: of a fit, or of one of its checkpoints.
            model: where the CLIP model is now; None is where it was when the fit was made.

        Returns:
            The classifier.

        Raises:
            CheckpointError: there is no usable checkpoint, or the CLIP model is another one.
        """
        checkpoint, fit_folder = open_fit(folder)
        manifest = checkpoint.manifest
        trained_on = manifest["model"]["fingerprint"]
        clip = load_model(model or parse(ModelConfig, manifest[SOURCE]))
        if clip.fingerprint != trained_on:
            raise CheckpointError(
                f"{folder} was trained on the features of another model: fingerprint {trained_on[:12]}, "
                f"{clip.name} has {clip.fingerprint[:12]}; name the model it was trained with by model.name and "
                "model.pretrained."
            )
        settled = read_settled(fit_folder)
        predictor = restore_predictor(checkpoint, clip, settled.posterior, alpha=settled.alpha)
        return cls(clip, predictor, manifest["class_names"], settled.calibration)

    def predict(self, images: Sequence[Image.Image]) -> Prediction:
        """Posterior predictive probabilities of pictures.

        Args:
            images: m RGB pictures.

        Returns:
            Probabilities and logit spread, (m, C) each.
        """
        if isinstance(self.predictor, Predictor):
            return self.predictor.predict(self.model.encode_images(list(images)), self.calibration.tau)
        pixels = torch.stack([self.model.transform(image.convert("RGB")) for image in images])
        return self.predictor.predict(pixels, self.calibration.tau)


def open_fit(folder: Path) -> tuple[Checkpoint, Path]:
    """The final checkpoint of a fit, or the one that is named.

    Args:
        folder: of a finished fit, or of any checkpoint.

    Returns:
        The verified checkpoint and the folder of its fit.

    Raises:
        CheckpointError: there is none that can be believed, or the fit is not finished.
    """
    if (folder / MANIFEST).is_file():
        return load_checkpoint(folder), folder.parent
    found = latest(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint that can be believed.")
    step, steps = found.manifest["step"], found.manifest["steps"]
    if step < steps or not (folder / CALIBRATION).is_file():
        raise CheckpointError(
            f"{folder} is not finished (step {step} of {steps}): continue its run with --resume, or name "
            f"the checkpoint {found.folder} itself."
        )
    return found, folder
