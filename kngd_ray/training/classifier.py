"""A finished fit as a classifier of pictures: CLIP's image tower, the trained head and its belief.

Of a fit on features that were computed elsewhere there is no tower: it classifies features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kngd_ray.clip import (
    AnyModel,
    CLIPHead,
    ClipModel,
    CLIPNetwork,
    Head,
    ModelConfig,
    PrecomputedModel,
    load_model,
    load_precomputed,
)
from kngd_ray.config import parse
from kngd_ray.errors import CheckpointError
from kngd_ray.filters import Belief
from kngd_ray.observations import trainable
from kngd_ray.storage import read_json, write_text
from kngd_ray.training.calibration import AnyPredictor, Calibration, assembled
from kngd_ray.training.checkpoint import MANIFEST, Checkpoint
from kngd_ray.training.checkpoint import load as load_checkpoint
from kngd_ray.training.interval import probability_interval
from kngd_ray.training.kalman import KalmanNGD, nested
from kngd_ray.training.method import load_head
from kngd_ray.training.novelty import Novelty, total_variance
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import PosteriorOptions, Prediction, Predictor, entropy
from kngd_ray.training.resumable import SOURCE, latest

CALIBRATION = "calibration.json"
CLASS_EMBEDDINGS = "class_embeddings.npy"
"""Those of a fit on features, as a copy beside its checkpoints: so that it can be moved to where their file is not."""


def identity_of(
    model: AnyModel, config: ModelConfig, class_names: Sequence[str], templates: Sequence[str]
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
        "model": model.identity,
        SOURCE: asdict(config.absolute()),
        "class_names": list(class_names),
        "templates": list(templates),
    }


def load_fitted(manifest: Mapping[str, Any], config: ModelConfig | None = None) -> AnyModel:
    """The model that a fit was trained on, by whatever data it is to be used on now.

    Args:
        manifest: of a checkpoint of the fit.
        config: where the model is now; None is where it was.

    Returns:
        The model. Its fingerprint tells whether it is still the same.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    config = config or parse(ModelConfig, manifest[SOURCE])
    if not config.precomputed:
        return load_model(config)
    known = manifest["model"]
    try:
        return load_precomputed(config, known.get("classes", manifest["class_names"]), int(known["embed_dim"]))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the manifest's model is damaged ({error}): use another checkpoint.") from error


def restore_predictor(
    checkpoint: Checkpoint,
    model: AnyModel,
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
        assert isinstance(model, ClipModel)
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
    load_head(head, checkpoint.state)
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
        novelty: what pictures are compared with to say how unlike the shots they are; None where that is not known.
    """

    calibration: Calibration = field(default_factory=lambda: Calibration(1.0, 1.0))
    posterior: PosteriorOptions = field(default_factory=PosteriorOptions)
    alpha: float | None = None
    novelty: Novelty | None = None


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
        raw = read_json(path)
        posterior = parse(PosteriorOptions, raw["posterior"])
        compared = raw.get("novelty")  # runs of earlier versions have none
        novelty = None if compared is None else Novelty(tuple(float(q) for q in compared["quantiles"]))
        return Settled(Calibration(**raw["calibration"]), posterior, raw.get("alpha"), novelty)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to predict with tau = 1.") from error


@dataclass(frozen=True)
class Judgement:
    """What is said of m pictures.

    Attributes:
        probabilities: (m, C) posterior predictive probabilities.
        logit_std: (m, C) posterior standard deviation of the logits; zeros without a posterior.
        interval: (m, 2) 90 % credible interval of the most probable class's probability; None where the posterior has
            no part in the prediction.
        unlike: (m,) share of the training shots, held out, that the fit is surer of; None where that is not known.
    """

    probabilities: Tensor
    logit_std: Tensor
    interval: Tensor | None = None
    unlike: Tensor | None = None

    def rows(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Per picture, in plain numbers, what is said of it.

        Args:
            class_names: the classes, in label order.

        Returns:
            ``class``, ``probability``, ``probability_low``, ``probability_high``, ``unlike``, ``uncertainty`` (entropy,
            nats), ``logit_std`` (of that class) and ``probabilities`` (a list); None for what is not known.
        """
        p = self.probabilities.double()
        entropies = entropy(p)
        found = []
        for n, c in enumerate(p.argmax(1).tolist()):
            low, high = (None, None) if self.interval is None else self.interval[n].tolist()
            found.append({
                "class": class_names[c],
                "probability": float(p[n, c]),
                "probability_low": low,
                "probability_high": high,
                "unlike": None if self.unlike is None else float(self.unlike[n]),
                "uncertainty": float(entropies[n]),
                "logit_std": float(self.logit_std[n, c]),
                "probabilities": p[n].tolist(),
            })
        return found


class Classifier:
    """Pictures, or features, to class probabilities with their uncertainty.

    Args:
        model: the CLIP model, or what stands for it.
        predictor: the trained head and its belief.
        class_names: the classes, in label order.
        calibration: tau and the scaling temperature.
        novelty: what pictures are compared with; None where there is nothing to compare with.
    """

    def __init__(
        self,
        model: AnyModel,
        predictor: AnyPredictor,
        class_names: Sequence[str],
        calibration: Calibration,
        novelty: Novelty | None = None,
    ) -> None:
        self.model = model
        self.predictor = predictor
        self.class_names = tuple(class_names)
        self.calibration = calibration
        self.novelty = novelty

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
        trained_on = str(manifest["model"].get("fingerprint")) if isinstance(manifest["model"], dict) else ""
        source = model or parse(ModelConfig, manifest[SOURCE])
        copy, named = fit_folder / CLASS_EMBEDDINGS, source.class_embeddings
        if named is not None and not Path(named).exists() and copy.is_file():
            source = replace(source, class_embeddings=str(copy))
        clip = load_fitted(manifest, source)
        if clip.fingerprint != trained_on:
            raise CheckpointError(
                f"{folder} was trained on the features of another model: fingerprint {trained_on[:12]}, "
                f"{clip.name} has {clip.fingerprint[:12]}; name the model it was trained with by model.name and "
                f"{'model.class_embeddings' if source.precomputed else 'model.pretrained'}."
            )
        settled = read_settled(fit_folder)
        predictor = restore_predictor(checkpoint, clip, settled.posterior, alpha=settled.alpha)
        told = parse(FitOptions, manifest["options"]).tune.alpha
        # the shots were measured at the weights that the fit was told to predict by, not at those of a later ensemble
        novelty = settled.novelty if settled.alpha in (None, told) else None
        return cls(clip, predictor, manifest["class_names"], settled.calibration, novelty)

    @property
    def takes_features(self) -> bool:
        """Whether it classifies features, not pictures."""
        return isinstance(self.model, PrecomputedModel)

    def predict(self, images: Sequence[Image.Image] | Tensor) -> Prediction:
        """Posterior predictive probabilities of pictures.

        Args:
            images: m RGB pictures, or (m, d) unit features.

        Returns:
            Probabilities and logit spread, (m, C) each.
        """
        return self.predictor.predict(self._inputs(images), self.calibration.tau)

    def judge(self, images: Sequence[Image.Image] | Tensor) -> Judgement:
        """Predictions of pictures with all that is known of their uncertainty.

        Args:
            images: m RGB pictures, or (m, d) unit features.

        Returns:
            Probabilities, spread of the logits, interval and likeness.
        """
        inputs = self._inputs(images)
        found = self.predictor.predict(inputs, self.calibration.tau)
        interval = probability_interval(self.predictor, inputs, found, self.calibration.tau)
        unlike = None
        if self.novelty is not None and isinstance(self.predictor, Predictor):
            unlike = self.novelty.score(total_variance(self.predictor, inputs))
        return Judgement(found.probabilities, found.logit_std, interval, unlike)

    def _inputs(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """What the predictor takes of pictures: features of the pretrained tower, or pixels for a trained one."""
        if isinstance(images, Tensor):
            return images
        assert isinstance(self.model, ClipModel)
        if isinstance(self.predictor, Predictor):
            return self.model.encode_images(list(images))
        return torch.stack([self.model.transform(image.convert("RGB")) for image in images])


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
