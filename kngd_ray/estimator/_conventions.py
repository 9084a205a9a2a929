"""What scikit-learn expects of any estimator, without needing it: parameters, tags and kinds of errors."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import issparse

from kngd_ray.clip import best_device
from kngd_ray.errors import InputError, UsageError


class NotFittedError(UsageError, ValueError, AttributeError):
    """The estimator was asked before it was fitted; scikit-learn's error of that name has the same bases."""


def not_fitted(message: str) -> NotFittedError:
    """The error of an estimator that is not fitted; where scikit-learn is in use, one of its kind too."""
    kind = NotFittedError if "sklearn.exceptions" not in sys.modules else _also_of_scikit_learn()
    return kind(message)


@cache
def _also_of_scikit_learn() -> type[NotFittedError]:
    theirs = sys.modules["sklearn.exceptions"].NotFittedError
    return type("NotFittedError", (NotFittedError, theirs), {"__module__": NotFittedError.__module__})


def conversion_warning() -> type[Warning]:
    """The category of a warning that labels were converted: scikit-learn's if it is imported."""
    theirs = sys.modules.get("sklearn.exceptions")
    found: type[Warning] = UserWarning if theirs is None else theirs.DataConversionWarning
    return found


class Parameters:
    """An estimator whose parameters are the arguments of its constructor, kept as they are given."""

    @classmethod
    def parameters(cls) -> dict[str, inspect.Parameter]:
        """The arguments of the constructor by name."""
        return {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name.

        Args:
            deep: there are no estimators within.

        Returns:
            What the constructor was given.
        """
        return {name: getattr(self, name) for name in self.parameters()}

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
            if name not in self.parameters():
                known = ", ".join(self.parameters())
                raise ValueError(f"{type(self).__name__} has no parameter {name!r}; it has {known}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = []
        for name, p in self.parameters().items():
            value = getattr(self, name)
            if isinstance(value, (str, int, float, bool, type(None))):
                changed += [f"{name}={value!r}"] if value != p.default else []
            elif value is not p.default:
                shape = getattr(value, "shape", None)  # an array would fill pages
                changed.append(f"{name}={value!r}" if shape is None else f"{name}=<array {tuple(shape)}>")
        return f"{type(self).__name__}({', '.join(changed)})"


def classifier_tags(*, matrix: bool) -> Any:
    """Scikit-learn's tags of a classifier.

    Args:
        matrix: whether samples are the rows of a matrix of numbers.

    Returns:
        Its ``Tags``.
    """
    sk = sys.modules["sklearn.utils"]
    tags = sk.Tags(
        estimator_type="classifier",
        target_tags=sk.TargetTags(required=True),
        classifier_tags=sk.ClassifierTags(),
        input_tags=sk.InputTags(two_d_array=matrix, string=not matrix),
    )
    tags.no_validation = not matrix
    return tags


def weighted_accuracy(found: Sequence[Any], labels: Sequence[Any], sample_weight: Any) -> float:
    """Share of samples classified right.

    Args:
        found: (m,) predicted labels.
        labels: (m,) true ones.
        sample_weight: (m,) weights; None counts each sample once.

    Returns:
        The share, weighted.

    Raises:
        InputError: the weights are no m numbers of 0 or more, or all are 0, or labels are text and classes are not.
    """
    texts = [{isinstance(label, str) for label in each} for each in (found, labels)]
    if len(found) and not texts[0] & texts[1]:
        raise InputError(
            f"y has labels such as {labels[0]!r}, and the classes are such as {found[0]!r}: text never equals anything "
            "else, so give labels of the type of classes_."
        )
    right = np.array([a == b for a, b in zip(found, labels, strict=True)], dtype=np.float64)
    if sample_weight is None:
        return float(right.mean()) if len(right) else 0.0
    asked = f"sample_weight must be {len(right)} numbers of 0 or more that are not all 0"
    given = array_of(sample_weight, "sample_weight")
    if given.dtype.kind in "cmM":  # complex numbers, of which numpy would drop a part, and dates
        raise InputError(f"{asked}, and it holds something else: values of type {given.dtype}.")
    try:
        weights = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{asked}, and it holds something else: {error}.") from error
    if weights.shape != right.shape or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise InputError(f"{asked}.")
    return float(np.average(right, weights=weights))


def device_of(given: Any) -> str:
    """Where to compute.

    Args:
        given: a device as torch names it; None is this machine's best.

    Returns:
        Its name.

    Raises:
        InputError: torch does not know it, or it is a GPU and there is none that can be used.
    """
    if given is None:
        return best_device()
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {given!r}, which torch does not know: give cpu, cuda or cuda:1.") from error
    if device.type not in {"cpu", "cuda"}:
        raise InputError(f"device is {given!r}, which KalmanCLIP does not run on: give cpu, cuda or cuda:1.")
    if device.type == "cuda" and best_device() == "cpu":
        raise InputError(f"device is {given!r} and this machine has no usable GPU: leave it out.")
    return str(device)


def settings_of(given: Any) -> dict[str, Any]:
    """Settings by dotted key.

    Args:
        given: a mapping; None is none.

    Returns:
        A copy.

    Raises:
        InputError: it is something else, or a key is no text.
    """
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(key, str) for key in given)):
        raise InputError(f"settings is {given!r}: give a mapping of dotted keys, such as {{'filter.mean.gamma': 0.5}}.")
    return dict(given or {})


def array_of(given: Any, what: str) -> np.ndarray[Any, Any]:
    """What was given as an array.

    Args:
        given: lists, a tensor, a frame, or whatever converts itself.
        what: it is called in messages.

    Returns:
        The array.

    Raises:
        InputError: it does not, lists are of different lengths, or it is sparse.
    """
    if issparse(given):
        raise InputError(f"{what} is sparse, and dense data is required: give {what}.toarray().")
    try:
        if isinstance(given, (list, tuple)):
            given = [numpy_of(row) for row in given]
        return np.asarray(numpy_of(given))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} is not a table of numbers ({error}): give rows of one length.") from error


def numpy_of(given: Any) -> Any:
    """A tensor as an array, of 32 bits where numpy lacks its floats; anything else as it is."""
    if not isinstance(given, torch.Tensor):
        return given
    tensor = given.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def columns_of(X: Any) -> np.ndarray[Any, Any] | None:
    """Names of the columns of a table of features; None where they have none, or vectors are in one column."""
    names = list(getattr(X, "columns", ())) if hasattr(X, "iloc") or hasattr(X, "to_dicts") else []
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        return None
    return np.array(names, dtype=object)


def check_columns(estimator: Any, X: Any) -> np.ndarray[Any, Any] | None:
    """Refuse a table whose columns differ from the fit's in name or order.

    Args:
        estimator: fitted; it knows its ``feature_names_in_`` if it has been told them.
        X: a table, or anything else.

    Returns:
        Names of the fit's columns; None where there are none.

    Raises:
        InputError: they differ.
    """
    known: np.ndarray[Any, Any] | None = getattr(estimator, "feature_names_in_", None)
    found = columns_of(X)
    if known is not None and found is not None and found.tolist() != known.tolist():
        first = next(((a, b) for a, b in zip(known, found, strict=False) if a != b), (len(known), len(found)))
        raise InputError(
            "The feature names should match those that were passed during fit, in their order: where the fit has "
            f"{first[0]!r}, X has {first[1]!r}."
        )
    return known


def summing_to_1(probabilities: torch.Tensor) -> npt.NDArray[np.float64]:
    """Probabilities (m, C) as scikit-learn takes them: single precision leaves sums that its metrics warn of."""
    p: npt.NDArray[np.float64] = probabilities.double().cpu().numpy()
    return p / p.sum(1, keepdims=True)
