"""A finished fit as a classifier of pictures: CLIP's image tower, the trained head and its belief.

A fit on features that were computed elsewhere has no tower: it classifies features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kngd_ray._rgb import to_rgb
from kngd_ray.clip import AnyModel, ClipModel, ModelConfig, PrecomputedModel
from kngd_ray.config import parse
from kngd_ray.errors import CheckpointError
from kngd_ray.training.calibration import AnyPredictor, Calibration
from kngd_ray.training.evaluation import check_numbers
from kngd_ray.training.interval import interval_scale, probability_interval
from kngd_ray.training.novelty import Novelty, total_variance
from kngd_ray.training.options import FitOptions
from kngd_ray.training.predict import Prediction, Predictor, entropy
from kngd_ray.training.restoring import load_fitted, open_fit, restore_predictor
from kngd_ray.training.resumable import SOURCE
from kngd_ray.training.settled import read_settled

CLASS_EMBEDDINGS = "class_embeddings.npy"
"""Class embeddings of a fit on features, copied beside its checkpoints so that the fit can be moved."""


@dataclass(frozen=True)
class Classification:
    """Predictions of m pictures with their uncertainty.

    Attributes:
        probabilities: (m, C) posterior predictive probabilities.
        logit_std: (m, C) posterior standard deviation of the logits; zeros without a posterior.
        interval: (m, 2) 90 % interval of the most probable class's probability, if shots were added; None where no
            shots were held out, or the posterior has no part in the prediction.
        novelty: (m,) novelty percentile, 0 to 1: share of the held-out training shots that the fit is more certain of;
            None if it is not known.
    """

    probabilities: Tensor
    logit_std: Tensor
    interval: Tensor | None = None
    novelty: Tensor | None = None

    def rows(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """The predictions as plain numbers, one mapping per picture.

        Args:
            class_names: the classes, in label order.

        Returns:
            ``class``, ``probability``, ``probability_low``, ``probability_high``, ``novelty``, ``uncertainty``
            (entropy, nats), ``logit_std`` (of that class) and ``probabilities`` (a list); None for what is not known.
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
                "novelty": None if self.novelty is None else float(self.novelty[n]),
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
        calibration: tau, sharpening and the scaling temperature.
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
        own_alpha = parse(FitOptions, manifest["options"]).tune.alpha
        # the shots were measured at the weights that the fit was told to predict by, not at those of a later ensemble
        novelty = settled.novelty if settled.alpha in (None, own_alpha) else None
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
            Probabilities and logit spread, (m, C) each. A FilterError tells of some that are no numbers.
        """
        found = self.calibration.predict(self.predictor, self._inputs(images))
        check_numbers(found.probabilities, self.predictor)
        return Prediction(found.probabilities.cpu(), found.logit_std.cpu())

    def classify(self, images: Sequence[Image.Image] | Tensor) -> Classification:
        """Predictions of pictures with all that is known of their uncertainty.

        Args:
            images: m RGB pictures, or (m, d) unit features.

        Returns:
            Probabilities, spread of the logits, interval and novelty. A FilterError tells of probabilities that are no
            numbers.
        """
        inputs = self._inputs(images)
        found = self.calibration.predict(self.predictor, inputs)
        check_numbers(found.probabilities, self.predictor)
        scale, factor = interval_scale(self.novelty), self.calibration.sharpening
        interval = probability_interval(self.predictor, inputs, found, scale, factor)
        novelty = None if self.novelty is None else self.novelty.score(total_variance(self.predictor, inputs))
        interval = None if interval is None else interval.cpu()
        return Classification(found.probabilities.cpu(), found.logit_std.cpu(), interval, novelty)

    def _inputs(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """What the predictor takes of pictures: features of the pretrained tower, or pixels for a trained one."""
        if isinstance(images, Tensor):
            return images.to(self.predictor.device)
        assert isinstance(self.model, ClipModel)
        if isinstance(self.predictor, Predictor):
            return self.model.encode_images(list(images)).to(self.predictor.device)
        return torch.stack([self.model.pictures.whole(to_rgb(image)) for image in images])
