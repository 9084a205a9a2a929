"""CLIP fine-tuned by the Kalman filter as a classifier with scikit-learn's conventions.

::

    from kngd_ray import KalmanCLIP

    clf = KalmanCLIP().fit(images, labels)
    probabilities, std = clf.predict_proba(others, return_std=True)

Everything happens in this process: no Ray, no MLflow, and nothing is written until :meth:`KalmanCLIP.save`.
"""

import inspect
import json
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kngd_ray._layered import plain
from kngd_ray.clip import ClipModel, ModelConfig, load_model
from kngd_ray.config import Config, load_config, override
from kngd_ray.errors import CheckpointError, UsageError
from kngd_ray.storage import read_json, write_text
from kngd_ray.training.batches import Support
from kngd_ray.training.calibration import Calibration
from kngd_ray.training.checkpoint import Checkpoint
from kngd_ray.training.classifier import (
    Classifier,
    Settled,
    identity_of,
    open_fit,
    read_settled,
    restore_predictor,
    save_settled,
)
from kngd_ray.training.fit import FitTask
from kngd_ray.training.given import (
    Picture,
    check_lengths,
    encode_pictures,
    label_array,
    labels_of,
    ordered,
    seed_of,
)
from kngd_ray.training.in_memory import Held, check_continues, learn, settle, write
from kngd_ray.training.novelty import probability_std, total_variance
from kngd_ray.training.predict import Predictor

_FILE = "estimator.json"
_ELSEWHERE = ("tune", "seeds", "baselines", "prior", "data", "model", "protocol", "targets", "trainer", "tracking")


class NotFittedError(UsageError, ValueError, AttributeError):
    """The estimator was asked before it was fitted; scikit-learn's error of that name has the same bases."""


class KalmanCLIP:
    """CLIP adapted to a few labelled pictures by an extended Kalman filter.

    Follows scikit-learn's conventions without needing it: parameters are kept as they are given, ``fit`` returns
    ``self``, what is learned ends in an underscore, and ``clone``, ``cross_val_score`` and ``GridSearchCV`` work. Of
    ``check_estimator``, the checks of parameters, cloning, reprs and unfitted use apply; those that fit a
    matrix of numbers do not, since a sample is a picture: hence no ``n_features_in_`` either, and no sparse input,
    ``sample_weight`` or regression targets.

    Args:
        model: ``embedded`` for the mini CLIP of this package, or a model name of open_clip.
        pretrained: of an open_clip model, a tag or the path of a checkpoint.
        templates: prompts, each with one ``{}`` for the class name, or the name of a set of them.
        class_names: what labels are called in prompts, by label; None is their ``str``.
        preset: the settings of the fit: a shipped preset or a YAML file.
        settings: settings over the preset by dotted key, as ``{"filter.p0": 0.1, "epochs": 3}``.
        random_state: seed of the shuffles: a number, numpy's ``RandomState`` or ``Generator``, or None for
            another one each time.
        device: where pictures are encoded.

    Attributes:
        classes_: labels in the order of the columns of :meth:`predict_proba`.
        class_names_: what they are called in prompts.
        calibration_: posterior temperature tau, chosen on the training pictures alone unless the settings give it, and
            scaling temperature, likewise.
        checkpoint_: weights and covariance, as a checkpoint holds them.
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: str = "embedded",
        pretrained: str | None = None,
        *,
        templates: str | Sequence[str] = ("a photo of a {}.",),
        class_names: Mapping[Any, str] | None = None,
        preset: str = "kalman",
        settings: Mapping[str, Any] | None = None,
        random_state: Any = 0,
        device: str = "cpu",
    ) -> None:
        self.model = model
        self.pretrained = pretrained
        self.templates = templates
        self.class_names = class_names
        self.preset = preset
        self.settings = settings
        self.random_state = random_state
        self.device = device

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name.

        Args:
            deep: there are no estimators within.

        Returns:
            What the constructor was given.
        """
        return {name: getattr(self, name) for name in _parameters()}

    def set_params(self, **params: Any) -> Self:
        """Change parameters; they count from the next ``fit``.

        Args:
            **params: of the constructor.

        Returns:
            Itself.

        Raises:
            ValueError: there is no such parameter.
        """
        for name, value in params.items():
            if name not in _parameters():
                raise ValueError(f"KalmanCLIP has no parameter {name!r}; it has {', '.join(_parameters())}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = [
            f"{name}={getattr(self, name)!r}" for name, p in _parameters().items() if getattr(self, name) != p.default
        ]
        return f"KalmanCLIP({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        sk = sys.modules["sklearn.utils"]  # only scikit-learn asks
        tags = sk.Tags(
            estimator_type="classifier",
            target_tags=sk.TargetTags(required=True),
            classifier_tags=sk.ClassifierTags(),
            input_tags=sk.InputTags(two_d_array=False, string=True),
        )
        tags.no_validation = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "checkpoint_")

    def fit(self, X: Sequence[Picture], y: Sequence[Hashable]) -> Self:
        """Adapt CLIP to labelled pictures, from its pretrained weights.

        Args:
            X: N pictures.
            y: N labels; strings, numbers or anything else that can be hashed.

        Returns:
            Itself.
        """
        labels = labels_of(y)
        return self._learn(X, labels, ordered(labels), None)

    def partial_fit(
        self, X: Sequence[Picture], y: Sequence[Hashable], classes: Sequence[Hashable] | None = None
    ) -> Self:
        """Learn from more pictures: the posterior so far is the prior. Give each picture once.

        What is chosen on pictures (tau, unless it is given) is chosen anew on the new ones, unless there are fewer than
        two for each fold.

        Args:
            X: N pictures.
            y: N labels.
            classes: all labels that will come; the first call needs them, unless `y` has them all.

        Returns:
            Itself.

        Raises:
            UsageError: a label that was not announced.
        """
        labels = labels_of(y)
        fitted = self.__sklearn_is_fitted__()
        known = list(self.classes_.tolist()) if fitted else ordered(labels if classes is None else labels_of(classes))
        if fitted and classes is not None and ordered(labels_of(classes)) != known:
            raise UsageError(f"classes differ from those of the first call: these were {known}.")
        new = next((label for label in labels if label not in known), None)
        if new is not None:
            raise UsageError(f"the label {new!r} is new: name all of them by classes= in the first partial_fit.")
        return self._learn(X, labels, known, self.checkpoint_ if fitted else None)

    def predict(self, X: Sequence[Picture]) -> npt.NDArray[Any]:
        """Most probable labels.

        Args:
            X: m pictures.

        Returns:
            (m,) labels.
        """
        best = self.predict_proba(X).argmax(1)  # refuses if it is not fitted
        return self.classes_[best]

    def predict_proba(self, X: Sequence[Picture], return_std: bool = False) -> Any:
        """Posterior predictive probabilities.

        Args:
            X: m pictures.
            return_std: also how far each probability is uncertain.

        Returns:
            (m, C) probabilities; with `return_std` a pair of these and their posterior standard deviations (m, C),
            linearised, zero where tau is 0.
        """
        classifier, features = self._features(X)
        tau = classifier.calibration.tau
        p = classifier.predictor.predict(features, tau).probabilities.double().numpy()
        if not return_std:
            return p
        return p, probability_std(_head(classifier), features, tau).double().numpy()

    def unlike(self, X: Sequence[Picture]) -> npt.NDArray[np.float64]:
        """How unlike the training pictures others are.

        Args:
            X: m pictures.

        Returns:
            (m,) share of the training pictures, held out, that the fit is surer of; NaN where that is not known, as
            without folds.
        """
        classifier, features = self._features(X)
        if classifier.novelty is None:
            return np.full(len(features), np.nan)
        return classifier.novelty.score(total_variance(_head(classifier), features)).double().numpy()

    def score(self, X: Sequence[Picture], y: Sequence[Hashable]) -> float:
        """Accuracy.

        Args:
            X: m pictures.
            y: m labels.

        Returns:
            Share of the pictures classified right.
        """
        labels = labels_of(y)
        check_lengths(X, labels)
        found = self.predict(X).tolist()
        return sum(a == b for a, b in zip(found, labels, strict=True)) / max(len(labels), 1)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit as a checkpoint, for :meth:`load` and ``kngd_ray.training.classifier.Classifier.load``.

        Args:
            folder: a new or empty folder.

        Returns:
            The folder.

        Raises:
            UsageError: the folder holds something, or a label is no string, number or boolean.
        """
        self._check_fitted()
        place = Path(folder)
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UsageError(f"{place} is not an empty folder: name a new one.")
        labels = self.classes_.tolist()
        if not all(isinstance(label, (str, int, float, bool)) for label in labels):
            raise UsageError("labels must be strings, numbers or booleans to be saved.")
        params = self.get_params() | {
            "pretrained": self._model_config.absolute().pretrained,
            "templates": list(_listed(self.templates)),
            "class_names": None,  # are in the checkpoint
            "random_state": self.random_state if isinstance(self.random_state, int) else None,
        }
        write(place, self.checkpoint_)
        save_settled(place, self._settled)
        write_text(place / _FILE, json.dumps({"labels": labels, "params": params}, indent=1))
        return place

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder.

        Returns:
            The fitted estimator.

        Raises:
            CheckpointError: it is none, or it is damaged.
        """
        place = Path(folder)
        try:
            raw = read_json(place / _FILE)
            labels, found = raw["labels"], cls(**{key: raw["params"][key] for key in _parameters()})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{place} holds no saved KalmanCLIP ({error}).") from error
        kept, _ = open_fit(place)
        names = kept.manifest["class_names"]
        if not isinstance(labels, list) or len(labels) != len(names):
            raise CheckpointError(f"{place} names {len(names)} classes, and {_FILE} has other labels.")
        found.class_names = dict(zip(labels, names, strict=True))
        found._adopt(kept, read_settled(place), labels)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_restored"}  # made again when needed

    def _adopt(self, kept: Checkpoint, settled: Settled, labels: Sequence[Any]) -> None:
        """Become the fit that a checkpoint holds."""
        self.__dict__.pop("_restored", None)
        self.checkpoint_ = kept
        self._settled = settled
        self.calibration_: Calibration = settled.calibration
        self.class_names_: tuple[str, ...] = tuple(kept.manifest["class_names"])
        self.classes_ = label_array(labels)

    def _learn(
        self, X: Sequence[Picture], labels: Sequence[Any], classes: Sequence[Any], before: Checkpoint | None
    ) -> Self:
        check_lengths(X, labels)
        if len(classes) < 2:
            raise UsageError(
                f"there is one class, {classes[0]!r}; give pictures of two or more, or name them by classes=."
            )
        config = self._config()
        clip = _clip(self._model_config, self.device)
        names = self._names(classes)
        templates = tuple(_listed(self.templates))
        number = {label: n for n, label in enumerate(classes)}
        support = Support(encode_pictures(clip, X), torch.tensor([number[label] for label in labels], dtype=torch.long))
        task = FitTask(
            config.fit_options,
            seed_of(self.random_state),
            support,
            clip.encode_classes(names, templates),
            clip.logit_scale,
            None if before is None else Held.of(before),
        )
        identity = identity_of(clip, self._model_config, names, templates)
        if before is not None:
            check_continues(before, identity, plain(config.fit_options))
        kept = learn(task, identity)
        if before is not None and len(support) < 2 * config.posterior.folds:
            settled = self._settled  # too few to choose anything by
        else:
            calibration, novelty = settle(task, config.posterior)
            settled = Settled(calibration, config.posterior, None, novelty)
        self._adopt(kept, settled, classes)
        return self

    def _config(self) -> Config:
        settings = dict(self.settings or {})
        for key in settings:
            if key.partition(".")[0] in (*_ELSEWHERE, "preset", "method"):
                raise UsageError(f"settings has {key}, which KalmanCLIP takes otherwise or not at all: leave it out.")
        config = load_config(forced={"preset": self.preset})
        if config.tune.images:
            raise UsageError(f"preset {self.preset} trains towers: that is for kngd-ray train.")
        if config.method != "kalman":
            raise UsageError(f"preset {self.preset} is for {config.method}: KalmanCLIP runs the Kalman filter.")
        return override(config, settings)

    @property
    def _model_config(self) -> ModelConfig:
        return ModelConfig(self.model, self.pretrained)

    def _names(self, classes: Sequence[Any]) -> tuple[str, ...]:
        given = self.class_names
        missing = [] if given is None else [label for label in classes if label not in given]
        if missing:
            raise UsageError(f"class_names has no name of the label {missing[0]!r}: name every label, or leave it out.")
        names = tuple(str(label) if given is None else given[label] for label in classes)
        if len(set(names)) < len(names):
            raise UsageError("two labels have one name: give each its own by class_names=.")
        return names

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise NotFittedError("this KalmanCLIP is not fitted: call fit first.")

    def _features(self, X: Sequence[Picture]) -> tuple[Classifier, Tensor]:
        self._check_fitted()
        if "_restored" not in self.__dict__:
            clip = _clip(self._model_config, self.device)
            kept, settled = self.checkpoint_, self._settled
            if clip.fingerprint != kept.manifest["model"]["fingerprint"]:
                raise CheckpointError(f"{clip.name} has other weights than those that this was fitted with.")
            predictor = restore_predictor(kept, clip, settled.posterior)
            self._restored = Classifier(clip, predictor, self.class_names_, settled.calibration, settled.novelty)
        return self._restored, encode_pictures(self._restored.model, X)


def _parameters() -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(KalmanCLIP.__init__).parameters.items() if name != "self"}


@lru_cache(maxsize=2)
def _clip(config: ModelConfig, device: str) -> ClipModel:
    """The frozen model, loaded once for all clones."""
    return load_model(config, device)


def _head(classifier: Classifier) -> Predictor:
    assert isinstance(classifier.predictor, Predictor)
    return classifier.predictor


def _listed(templates: str | Sequence[str]) -> Sequence[str]:
    return (templates,) if isinstance(templates, str) else tuple(templates)
