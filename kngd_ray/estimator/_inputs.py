"""What an estimator learns from: pictures, which a CLIP model encodes, or a matrix of features from elsewhere."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import issparse
from torch import Tensor

from kngd_ray._vectors import flaw, lengths, unit
from kngd_ray.clip import (
    LOGIT_SCALE,
    AnyModel,
    ClipModel,
    ModelConfig,
    PrecomputedModel,
    given_precomputed,
    load_model,
    load_precomputed,
)
from kngd_ray.errors import InputError
from kngd_ray.estimator._conventions import array_of, conversion_warning
from kngd_ray.estimator._naming import said_of, said_of_digits
from kngd_ray.estimator.given import encode_crops, encode_pictures, labels_of, listed
from kngd_ray.training.batches import Support
from kngd_ray.training.options import FitOptions
from kngd_ray.training.views import crops_of


class Inputs(Protocol):
    """How samples and labels become features and classes."""

    @property
    def source(self) -> ModelConfig:
        """How to load the model again, as far as that is a name or a path."""

    def labels(self, y: Any) -> list[Any]:
        """Labels as Python has them."""

    def check(self, X: Any, width: int | None) -> Any:
        """Samples ready to be encoded; `width` is the fit's number of features, None before a fit."""

    def width(self, samples: Any) -> int | None:
        """Numbers of a sample, where samples are rows of numbers."""

    def model(self, class_names: Sequence[str], width: int | None) -> AnyModel:
        """What embeds classes."""

    def encode(self, model: Any, samples: Any) -> Tensor:
        """Unit features (m, d) of samples."""

    def support(self, model: Any, samples: Any, labels: Tensor, options: FitOptions | None) -> Support:
        """Shots of classes (m,), with the crops that a fit with these options sees; None sees none."""

    def notes(
        self, model: Any, classes: Sequence[Any], names: Sequence[str], templates: Sequence[str], support: Support
    ) -> list[str]:
        """What is to be said of labels, their names and how they go with the model."""


class Pictures:
    """Pictures of any kind, encoded by a CLIP model.

    Args:
        source: the model.
        device: where its towers are.
    """

    def __init__(self, source: ModelConfig, device: str) -> None:
        self.source = source
        self._device = device

    def labels(self, y: Any) -> list[Any]:
        """Labels as Python has them."""
        return labels_of(y)

    def check(self, X: Any, width: int | None) -> Any:
        """The pictures in their order; each is checked when it is decoded.

        Raises:
            InputError: it is one picture, or has no order.
        """
        return listed(X, "X")

    def width(self, samples: Any) -> int | None:
        """None: a picture is no row of numbers."""
        return None

    def model(self, class_names: Sequence[str], width: int | None) -> ClipModel:
        """The frozen model, loaded once for all clones."""
        return load_model(self.source, self._device)

    def encode(self, model: ClipModel, samples: Any) -> Tensor:
        """Unit features (m, d) of pictures."""
        return encode_pictures(model, samples)

    def support(self, model: ClipModel, samples: Any, labels: Tensor, options: FitOptions | None) -> Support:
        """Shots of classes (m,), with the crops that a fit with these options sees; None sees none."""
        crops = None if options is None else crops_of(options, model, len(samples))
        encoded = None if crops is None else encode_crops(model, samples, crops)
        return Support(self.encode(model, samples), labels, encoded)

    def notes(
        self, model: ClipModel, classes: Sequence[Any], names: Sequence[str], templates: Sequence[str], support: Support
    ) -> list[str]:
        """What is to be said of labels and of the prompts that are made of them."""
        return [*said_of(classes, names), *model.notes(names, templates)]


class Matrix:
    """Rows of features, checked as scikit-learn's own estimators check them.

    Only the direction of a row counts: as CLIP's own features, rows are scaled to length 1.

    Args:
        source: logit scale, and the path of the class embeddings if they are in a file.
        embeddings: class embeddings (C, d) or (C, T, d) in order of the classes; None is none, or those of the file.
    """

    def __init__(self, source: ModelConfig, embeddings: Any = None) -> None:
        self.source = source
        self._embeddings = embeddings
        self._zeros = embeddings is None and source.class_embeddings is None

    def labels(self, y: Any) -> list[Any]:
        """Labels of classes, as Python has them.

        Raises:
            InputError: there is none, they are no column of names or whole numbers, or one is missing.
        """
        if y is None:
            raise InputError(
                "KalmanCLIP requires y to be passed, but the target y is None: give one label for each row."
            )
        if issparse(y):
            raise InputError("y is sparse, and dense data is required: give y.toarray().")
        if len(getattr(y, "shape", ())) == 2 and y.shape[1] == 1:
            message = "A column-vector y was passed when a 1d array was expected: its only column is taken."
            warnings.warn(message, conversion_warning(), stacklevel=4)
        labels = labels_of(y)
        numbers = [label for label in labels if isinstance(label, float)]
        if any(not label.is_integer() for label in numbers):
            raise InputError(
                "Unknown label type: y is continuous, and KalmanCLIP is a classifier: give names or whole numbers."
            )
        return labels

    def check(self, X: Any, width: int | None) -> npt.NDArray[np.float64]:
        """Rows of finite numbers, each with a direction.

        Raises:
            InputError: they are not.
        """
        found = _table(X)
        if found.dtype.kind == "c":
            raise InputError("Complex data not supported: X must hold real numbers.")
        try:
            rows = found.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"X holds something other than numbers: {error}.") from error
        if rows.ndim != 2:
            raise InputError(
                f"Expected 2D array, got {rows.ndim}D array instead, of shape {rows.shape}. Reshape your data: "
                "X must be (rows, features)."
            )
        if width is not None and rows.shape[1] != width:
            raise InputError(
                f"X has {rows.shape[1]} features, but KalmanCLIP is expecting {width} features as input, as many as it "
                "was fitted with."
            )
        for axis, what in enumerate(("sample", "feature")):
            if rows.shape[axis] == 0 and (axis or width is None):
                raise InputError(
                    f"Found array with 0 {what}(s) (shape={rows.shape}) while a minimum of 1 is required: X is empty."
                )
        given = np.flatnonzero(lengths(rows) != 0) if self._zeros else np.arange(len(rows))
        wrong = flaw(rows[given])
        if wrong is not None:
            raise InputError(f"row {given[wrong[0]]} of X {wrong[1]}: leave it out, or compute it again.")
        return rows

    def width(self, samples: npt.NDArray[np.float64]) -> int | None:
        """Numbers of a row."""
        return samples.shape[1]

    def model(self, class_names: Sequence[str], width: int | None) -> PrecomputedModel:
        """The class embeddings, checked against classes and features."""
        assert width is not None
        if self._embeddings is None:
            return load_precomputed(self.source, class_names, width)
        scale = LOGIT_SCALE if self.source.logit_scale is None else self.source.logit_scale
        return given_precomputed(
            array_of(self._embeddings, "class_embeddings"), class_names, width, scale, "class_embeddings"
        )

    def encode(self, model: PrecomputedModel, samples: npt.NDArray[np.float64]) -> Tensor:
        """The rows scaled to length 1, (m, d); zeros stay zeros."""
        features = np.zeros(samples.shape, np.float32)
        given = lengths(samples) != 0
        features[given] = unit(samples[given])
        return torch.from_numpy(features)

    def support(self, model: PrecomputedModel, samples: Any, labels: Tensor, options: FitOptions | None) -> Support:
        """Shots of classes (m,): of features there are no crops."""
        return Support(self.encode(model, samples), labels)

    def notes(
        self,
        model: PrecomputedModel,
        classes: Sequence[Any],
        names: Sequence[str],
        templates: Sequence[str],
        support: Support,
    ) -> list[str]:
        """What is to be said of labels and of which class embedding is whose."""
        order = model.row_notes(names, support.features, support.labels, "class_embeddings")
        return [*model.notes(names), *(said_of_digits(classes) if model.zero_shot else ()), *order]


def _table(X: Any) -> npt.NDArray[Any]:
    """What was given as an array; of a column of vectors, as a table of features has it, one with these as its rows.

    Raises:
        InputError: the vectors are of different lengths.
    """
    found = array_of(list(X) if isinstance(X, Iterator) else X, "X")
    cells = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    if cells.dtype != object or cells.ndim != 1 or not len(cells) or not all(np.ndim(cell) == 1 for cell in cells):
        return found
    return array_of(cells.tolist(), "X")
