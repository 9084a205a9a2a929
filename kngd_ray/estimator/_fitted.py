"""A fit of a run with scikit-learn's methods: what a run trained, towers too, asked like any classifier."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kngd_ray.errors import UsageError
from kngd_ray.estimator._conventions import array_of, summing_to_1, weighted_accuracy
from kngd_ray.estimator.given import check_lengths, features_of, label_array, labels_of, listed, picture
from kngd_ray.training.classifier import Classification, Classifier

_BATCH = 64  # decoded pictures held at once


class FittedClassifier:
    """A finished fit as a classifier; it predicts, and is not fitted again.

    Of a fit on pictures X is a list of pictures: PIL pictures, paths, bytes or arrays. Of a fit on features X is a
    matrix (m, d).

    Args:
        folder: of the fit, or of one of its checkpoints.

    Attributes:
        classes_: names of the classes, in the order of the columns of :meth:`predict_proba`.
    """

    _estimator_type = "classifier"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._classifier = Classifier.load(folder)
        self.classes_: npt.NDArray[Any] = label_array(self._classifier.class_names)

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Posterior predictive probabilities (m, C)."""
        return summing_to_1(self.classify(X).probabilities)

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """Most probable classes (m,)."""
        best: npt.NDArray[Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return best

    def novelty(self, X: Any) -> npt.NDArray[np.float64]:
        """Novelty percentiles (m,): share of the held-out training shots that the fit is surer of; NaN if unknown."""
        found = self.classify(X)
        return np.full(len(found.probabilities), np.nan) if found.novelty is None else found.novelty.double().numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy.

        Args:
            X: m pictures, or features (m, d).
            y: m class names.
            sample_weight: (m,) weights; None counts each sample once.

        Returns:
            Share of the samples classified right.
        """
        samples, labels = X if self._classifier.takes_features else listed(X, "X"), labels_of(y)
        check_lengths(samples, labels)
        return weighted_accuracy(self.predict(samples).tolist(), labels, sample_weight)

    def classify(self, X: Any) -> Classification:
        """Predict with all that is known of the uncertainty.

        Args:
            X: m pictures, or features (m, d).

        Returns:
            Probabilities, spread of the logits, interval of the best class's probability, and novelty percentiles.

        Raises:
            UsageError: X is empty.
        """
        parts = [self._classifier.classify(batch) for batch in self._batches(X)]
        if not parts:
            raise UsageError("X is empty: give at least one sample.")
        return Classification(
            torch.cat([part.probabilities for part in parts]),
            torch.cat([part.logit_std for part in parts]),
            _joined([part.interval for part in parts]),
            _joined([part.novelty for part in parts]),
        )

    def _batches(self, X: Any) -> Iterator[list[Image.Image] | Tensor]:
        if self._classifier.takes_features:
            rows = list(np.atleast_1d(array_of(X, "X")))  # a single number is refused as a row that is none
            for start in range(0, len(rows), _BATCH):
                yield features_of(rows[start : start + _BATCH], self._classifier.model.embed_dim, start)
            return
        pictures = listed(X, "X")
        for start in range(0, len(pictures), _BATCH):
            yield [picture(pictures[n], n) for n in range(start, min(start + _BATCH, len(pictures)))]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None
