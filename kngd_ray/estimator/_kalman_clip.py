"""The classifier itself: its parameters, what it learns, and how it is saved."""

import json
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kngd_ray._layered import plain
from kngd_ray._run_layout import ESTIMATOR
from kngd_ray.clip import PRECOMPUTED, AnyModel, ModelConfig
from kngd_ray.config import Config, flatten
from kngd_ray.errors import CheckpointError, InputError, UsageError
from kngd_ray.estimator._bases import BaseEstimator, ClassifierMixin
from kngd_ray.estimator._conventions import (
    Parameters,
    check_columns,
    classifier_tags,
    columns_of,
    device_of,
    not_fitted,
    summing_to_1,
    weighted_accuracy,
)
from kngd_ray.estimator._in_memory import Held, calibrate, check_continues, foreseen, in_double, learn, met
from kngd_ray.estimator._inputs import Inputs, Matrix, Pictures
from kngd_ray.estimator._naming import names_of, templates_of
from kngd_ray.estimator._saved import config_of, fit_in, saved_embeddings, saved_params, write_run
from kngd_ray.estimator.given import check_lengths, label_array, labels_of, ordered, seed_of
from kngd_ray.storage import read_json, write_text
from kngd_ray.training.calibration import Calibration, below_zero_shot
from kngd_ray.training.checkpoint import Checkpoint
from kngd_ray.training.classifier import Classifier
from kngd_ray.training.effect import ignored, set_too_late
from kngd_ray.training.fit import FitTask
from kngd_ray.training.interval import interval_scale, probability_std
from kngd_ray.training.novelty import total_variance
from kngd_ray.training.predict import Predictor
from kngd_ray.training.restoring import identity_of, open_fit, restore_predictor
from kngd_ray.training.settled import Settled, read_settled
from kngd_ray.training.stream import Stream


class KalmanCLIP(Parameters, ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """CLIP adapted to a few labelled pictures, or to their features, by an extended Kalman filter.

    Follows scikit-learn's conventions: parameters are stored as given, ``fit`` returns ``self``, learned attributes end
    in an underscore, and ``clone``, ``cross_val_score`` and ``GridSearchCV`` work. It is a ``ClassifierMixin`` and a
    ``BaseEstimator`` if scikit-learn is installed, and works without it. ``score`` takes ``sample_weight``; ``fit``
    does not.

    ``model="precomputed"`` takes a matrix (N, d) of features instead of pictures, and passes ``check_estimator``. Only
    the direction of a row counts, as in CLIP: rows are scaled to length 1. If lengths or an offset matter, add a scaler
    or a column of ones. A row of zeros gets equal probabilities without class embeddings, and is refused with them. For
    other models, whose samples are pictures, only the checks of parameters, cloning, reprs and unfitted use apply.

    Args:
        model: ``embedded`` for the mini CLIP of this package, a model name of open_clip, or ``precomputed``.
        pretrained: for an open_clip model, a tag or the path of a checkpoint.
        class_embeddings: for ``precomputed``, an array (C, d), or (C, T, d) for T prompts, in the order of
            ``classes_`` (sorted labels; of text ``"10"`` is before ``"2"``), or the path of a ``.npy`` file with one.
            None learns a linear classifier from the samples alone.
        logit_scale: for ``precomputed``, the factor from cosines to logits; None is 100.
        templates: prompts, each with one ``{}`` for the class name, or the name of a set of prompts. Labels that look
            like code are spelled out, ``AnnualCrop`` as ``Annual Crop``, with a warning; ``{name}`` keeps them.
        class_names: name of each label in prompts; None uses the label itself.
        preset: settings of the fit: a shipped preset or a YAML file.
        settings: settings that override the preset, by dotted key: ``{"filter.mean.gamma": 0.5, "tune.views": 0}``.
        random_state: seed of the shuffles: a number, numpy's ``RandomState`` or ``Generator``, or None for a
            random one.
        device: where to compute; None is this machine's GPU if there is one.

    Attributes:
        classes_: labels in the order of the columns of :meth:`predict_proba`.
        class_names_: their names in prompts.
        n_features_in_: for ``precomputed``, the number of features.
        feature_names_in_: for ``precomputed``, names of the columns, if a table with names was given.
        calibration_: tau, sharpening and scaling temperature, chosen on the training pictures unless settings give it.
        checkpoint_: weights and covariance, as in a checkpoint.
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: str = "embedded",
        pretrained: str | None = None,
        *,
        class_embeddings: Any = None,
        logit_scale: float | None = None,
        templates: str | Sequence[str] = ("a photo of a {}.",),
        class_names: Mapping[Any, str] | None = None,
        preset: str = "kalman",
        settings: Mapping[str, Any] | None = None,
        random_state: Any = 0,
        device: str | None = None,
    ) -> None:
        self.model = model
        self.pretrained = pretrained
        self.class_embeddings = class_embeddings
        self.logit_scale = logit_scale
        self.templates = templates
        self.class_names = class_names
        self.preset = preset
        self.settings = settings
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        return classifier_tags(matrix=self.model == PRECOMPUTED)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "checkpoint_")

    def fit(self, X: Any, y: Sequence[Hashable]) -> Self:
        """Adapt CLIP to labelled pictures, from its pretrained weights.

        Args:
            X: N pictures, or a matrix (N, d). A list, an array, a column of pandas, Polars or pyarrow, a table of one
                column, or a generator: what counts is the position, never an index. In another order other folds may
                choose another prior variance.
            y: N labels; strings, numbers or, with `class_names`, anything else that can be hashed. None is missing.

        Returns:
            Itself.
        """
        labels = self._inputs.labels(y)
        return self._learn(X, labels, ordered(labels), None)

    def partial_fit(self, X: Any, y: Sequence[Hashable], classes: Sequence[Hashable] | None = None) -> Self:
        """Learn from more pictures: the posterior so far is the prior. Give each picture once.

        The calls are a stream, as of ``protocol=stream``: between them the belief moves as ``noise.process`` says, and
        pictures are predicted before they are learned from. By how well they were, tau is chosen anew (unless it is
        given), once they are two for each fold; the first call chooses it as :meth:`fit` does.

        Args:
            X: N pictures, or a matrix (N, d).
            y: N labels.
            classes: all labels that will come; the first call needs them, unless `y` has them all.

        Returns:
            Itself.

        Raises:
            InputError: a label that was not announced.
        """
        labels = self._inputs.labels(y)
        fitted, announced = self.__sklearn_is_fitted__(), None if classes is None else labels_of(classes, "classes")
        known = list(self.classes_.tolist()) if fitted else ordered(labels if announced is None else announced)
        if fitted and announced is not None and ordered(announced) != known:
            raise InputError(f"classes differ from those of the first call: these were {known}.")
        new = next((label for label in labels if label not in known), None)
        if new is not None:
            raise InputError(f"the label {new!r} is new: name all of them by classes= in the first partial_fit.")
        return self._learn(X, labels, known, self.checkpoint_ if fitted else None, in_stream=True)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Most probable labels.

        Args:
            X: m pictures, or a matrix (m, d).

        Returns:
            (m,) labels.
        """
        best = self.predict_proba(X).argmax(1)  # refuses if it is not fitted
        return self.classes_[best]

    def predict_proba(self, X: Any, return_std: bool = False) -> Any:
        """Posterior predictive probabilities.

        Args:
            X: m pictures, or a matrix (m, d).
            return_std: also how far each probability is uncertain.

        Returns:
            (m, C) probabilities; with `return_std` a pair of these and their standard deviations (m, C): how far more
            shots would move them, linearised. Zero where no shots could be held out.
        """
        classifier, features = self._features(X)
        p = summing_to_1(classifier.calibration.predict(classifier.predictor, features).probabilities)
        if not return_std:
            return p
        scale, factor = interval_scale(classifier.novelty), classifier.calibration.sharpening
        return p, probability_std(_head(classifier), features, scale, factor).double().cpu().numpy()

    def novelty(self, X: Any) -> npt.NDArray[np.float64]:
        """Novelty percentiles: how unusual samples are by the standard of the training samples.

        Args:
            X: m pictures, or a matrix (m, d).

        Returns:
            (m,) share of the held-out training samples that the fit is surer of, 0 to 1; NaN if it is not known, as
            without folds.
        """
        classifier, features = self._features(X)
        if classifier.novelty is None:
            return np.full(len(features), np.nan)
        return classifier.novelty.score(total_variance(_head(classifier), features)).double().numpy()

    def score(self, X: Any, y: Sequence[Hashable], sample_weight: Any = None) -> float:
        """Accuracy.

        Args:
            X: m pictures, or a matrix (m, d).
            y: m labels.
            sample_weight: (m,) weights; None counts each sample once.

        Returns:
            Share of the pictures classified right.
        """
        self._check_fitted()
        inputs = self._learned_inputs
        labels, samples = inputs.labels(y), inputs.check(X, self._width)
        check_lengths(samples, labels)
        check_columns(self, X)
        return weighted_accuracy(self.predict(samples).tolist(), labels, sample_weight)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fit as a run, for :meth:`load`, :func:`kngd_ray.load`, ``kngd-ray predict`` and ``export``.

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
        params, named = saved_params(self.get_params(), self._learned_inputs.source), self.class_names is not None
        write_run(place, self.checkpoint_, self._settled, self._restored_classifier().model, self._learned_with)
        write_text(place / ESTIMATOR, json.dumps({"labels": labels, "named": named, "params": params}, indent=1))
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
            raw = read_json(place / ESTIMATOR)
            labels, found = raw["labels"], cls(**raw["params"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{place} holds no saved KalmanCLIP ({error}).") from error
        fit = fit_in(place)
        kept, _ = open_fit(fit)
        names = kept.manifest["class_names"]
        if not isinstance(labels, list) or len(labels) != len(names):
            raise CheckpointError(f"{place} names {len(names)} classes, but {ESTIMATOR} has other labels.")
        found.class_embeddings = saved_embeddings(fit)
        found.class_names = dict(zip(labels, names, strict=True)) if raw.get("named", True) else None
        found._adopt(kept, read_settled(fit), labels, found._inputs, found._config())
        return found

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_restored"}  # made again when needed

    def _adopt(self, kept: Checkpoint, settled: Settled, labels: Sequence[Any], inputs: Inputs, config: Config) -> None:
        """Become the fit that a checkpoint holds."""
        for stale in ("_restored", "n_features_in_"):
            self.__dict__.pop(stale, None)
        self._learned_from, self._learned_with = inputs, config
        self.checkpoint_ = kept
        self._settled = settled
        self.calibration_: Calibration = settled.calibration
        self.class_names_: tuple[str, ...] = tuple(kept.manifest["class_names"])
        self.classes_ = label_array(labels)
        if isinstance(inputs, Matrix):
            self.n_features_in_: int = kept.manifest["model"]["embed_dim"]

    def _learn(
        self,
        X: Any,
        labels: Sequence[Any],
        classes: Sequence[Any],
        before: Checkpoint | None,
        *,
        in_stream: bool = False,
    ) -> Self:
        inputs = self._inputs
        samples = inputs.check(X, None if before is None else self._width)
        check_lengths(samples, labels)
        columns = columns_of(X) if before is None else check_columns(self, X)
        if len(classes) < 2:
            raise InputError(
                f"there is one class, {classes[0]!r}; give pictures of two or more, or name them by classes=."
            )
        config = self._config()
        names = names_of(classes, self.class_names, said=self.model != PRECOMPUTED)
        model = inputs.model(names, inputs.width(samples))
        templates = templates_of(
            self.templates,
            None if before is None else before.manifest["templates"],
            names if self.class_names is None and self.model != PRECOMPUTED else (),
        )
        number = {label: n for n, label in enumerate(classes)}
        numbers = torch.tensor([number[label] for label in labels], dtype=torch.long)
        support = inputs.support(model, samples, numbers, None if in_stream else config.fit_options)
        unread = ignored(config.fit_options, config.posterior, self.settings or ()).items()
        notes = inputs.notes(model, classes, names, templates, support)
        late = [] if before is None else set_too_late(flatten(self._learned_with), flatten(config))
        notes += [f"{key} has no effect after the first call: the prior is the posterior so far" for key in late]
        for note in (
            *map(" has no effect with ".join, unread),
            *notes,
            *(config.fit_options.notes if before is None else ()),
        ):
            warnings.warn(note, UserWarning, stacklevel=3)
        task = FitTask(
            config.fit_options,
            seed_of(self.random_state),
            support,
            model.encode_classes(names, templates),
            model.logit_scale,
            None if before is None else Held.of(before),
            stream=Stream(config.posterior) if in_stream else None,
        )
        identity = identity_of(model, inputs.source, names, templates)
        if before is not None:
            check_continues(before, identity, plain(config.fit_options))
        device = device_of(self.device)
        kept = learn(task, identity, device)
        if before is not None and len(support) < 2 * config.posterior.folds:
            settled = met(self._settled, _head(self._restored_classifier()), support)  # too few to choose anything by
        else:
            calibration, novelty = calibrate(replace(task, stream=None), config.posterior, kept.state, device)
            settled = Settled(calibration, config.posterior, None, novelty)
            if (warning := below_zero_shot(task, calibration, config.posterior.folds)) is not None:
                warnings.warn(warning, UserWarning, stacklevel=3)
        if before is not None:
            settled = replace(settled, calibration=foreseen(task, kept, settled.calibration, config.posterior.folds))
        self._adopt(kept, settled, classes, inputs, config)
        if columns is not None:
            self.feature_names_in_ = columns
        elif before is None:
            self.__dict__.pop("feature_names_in_", None)
        self._restore(model)
        return self

    def _config(self) -> Config:
        return config_of(
            self.preset, self.settings, self.templates, self._inputs.source, embedded=self.class_embeddings is not None
        )

    @property
    def _inputs(self) -> Inputs:
        """What the parameters say is learned from.

        Raises:
            InputError: they contradict one another.
        """
        given = self.class_embeddings
        path = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
        if self.model != PRECOMPUTED and given is not None:
            raise InputError(
                f'class_embeddings are for model="precomputed", and model is {self.model!r}: leave one out.'
            )
        try:
            source = ModelConfig(self.model, self.pretrained, path, self.logit_scale)
        except ValueError as error:
            raise InputError(f"{error}.") from error
        except TypeError as error:
            raise InputError(f"logit_scale is {self.logit_scale!r}; it must be a positive number.") from error
        if source.precomputed:
            return Matrix(source, given if path is None else None)
        return Pictures(source, device_of(self.device))

    @property
    def _learned_inputs(self) -> Inputs:
        """What was learned from, whatever parameters were set since; where towers compute is for them to say."""
        kept = self.__dict__.get("_learned_from") or self._inputs
        return Pictures(kept.source, device_of(self.device)) if isinstance(kept, Pictures) else kept

    @property
    def _width(self) -> int | None:
        """Numbers of a sample that the fit takes; None of pictures."""
        return getattr(self, "n_features_in_", None)

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            raise not_fitted("this KalmanCLIP is not fitted: call fit first.")

    def _restore(self, model: AnyModel) -> Classifier:
        """Make the classifier that predicts, with the checkpoint's weights."""
        kept, settled = self.checkpoint_, self._settled
        predictor = restore_predictor(kept, model, settled.posterior)
        if self._width is not None:
            predictor = in_double(predictor)
        self._restored = Classifier(model, predictor, self.class_names_, settled.calibration, settled.novelty)
        return self._restored

    def _restored_classifier(self) -> Classifier:
        self._check_fitted()
        if "_restored" in self.__dict__:
            return self._restored
        model = self._learned_inputs.model(self.class_names_, self._width)
        if model.fingerprint != self.checkpoint_.manifest["model"]["fingerprint"]:
            raise CheckpointError(f"{model.name} has other weights than this classifier's model.")
        return self._restore(model)

    def _features(self, X: Any) -> tuple[Classifier, Tensor]:
        classifier, inputs = self._restored_classifier(), self._learned_inputs
        features = inputs.encode(classifier.model, inputs.check(X, self._width))
        check_columns(self, X)
        features = features.to(classifier.predictor.device)
        return classifier, features.double() if self._width is not None else features


def _head(classifier: Classifier) -> Predictor:
    assert isinstance(classifier.predictor, Predictor)
    return classifier.predictor
