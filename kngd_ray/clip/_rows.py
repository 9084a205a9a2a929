"""Which row of given class embeddings is whose: numbers do not say, and in another order they are as good an array."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy.optimize import linear_sum_assignment

from kngd_ray._vectors import Vectors, lengths

Ints = npt.NDArray[np.int64]

_MOST = 25_000_000  # pairs of classes and rows; beyond it nothing is looked for
_NOTHING = 1e-12  # a length that divides to zeros
_SHOWN = 3  # rows in a message
# Measured on features of CLIP, 2 to 59 classes: no head in the right order comes near, however weak, nor do random rows
# for 5 classes or more, but one in thousands. Nine in ten of those that have 20 shots and their rows one place off do.
_GOOD, _RATIO, _DEVIATIONS = 0.6, 2.5, 3.3
_FEW_SHOTS, _FEW_CLASSES, _RARE = 20, 5, 0.05  # what can tell; how often chance is as good as rows that know something
_AS_MEANS = 0.7  # of the accuracy of the classes' own mean features, to which rows of nothing do not come


class Order(NamedTuple):
    """An order of rows that fits better than the given one.

    Attributes:
        accuracy: zero-shot accuracy with rows as they are.
        better: with rows as `rows` has them, on shots that these were not chosen by.
        rows (k,): the row of each class.
    """

    accuracy: float
    better: float
    rows: Ints


def better_order(features: Vectors, labels: Ints, own: Ints, embeddings: Vectors) -> Order | None:
    """Look for rows that fit the shots much better: each half of the shots judges what the other half would choose.

    Args:
        features (m, d): unit vectors of the shots.
        labels (m,): their classes, 0 to k - 1.
        own (k,): which row is that of each class.
        embeddings (C, d): unit rows.

    Returns:
        The order; None where the given one is about as good, or there are too few shots to tell.
    """
    classes = len(own)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    if counts.min() < 2 or classes * len(embeddings) > _MOST:
        return None
    half = np.empty(len(labels), np.int64)
    half[order] = np.concatenate([np.arange(count) % 2 for count in counts])
    as_given, as_chosen, as_means = (np.empty(len(labels), bool) for _ in range(3))
    for judged in (0, 1):
        learned, test = half != judged, half == judged
        means = _means(features[learned], labels[learned], classes)
        chosen = _matched(means, embeddings)
        cosines = features[test] @ embeddings.T
        as_given[test] = cosines[:, own].argmax(1) == labels[test]
        as_chosen[test] = cosines[:, chosen].argmax(1) == labels[test]
        as_means[test] = (features[test] @ (means / np.maximum(lengths(means), _NOTHING)[:, None]).T).argmax(
            1
        ) == labels[test]
    accuracy, better = float(as_given.mean()), float(as_chosen.mean())
    won, lost = int((as_chosen & ~as_given).sum()), int((as_given & ~as_chosen).sum())
    clear = won - lost > _DEVIATIONS * np.sqrt(won + lost)
    if not clear or better < max(_GOOD, accuracy * _RATIO, _AS_MEANS * as_means.mean()):
        return None
    return Order(accuracy, better, _matched(_means(features, labels, classes), embeddings))


def order_note(found: Order, own: Ints, class_names: Sequence[str], place: str) -> str:
    """The line on rows that seem to be in another order.

    Args:
        found: the order that fits better.
        own (k,): the row of each class as they are given.
        class_names: names of the k classes.
        place: what the class embeddings are called.

    Returns:
        A sentence.
    """
    moved = [(row, name) for row, mine, name in zip(found.rows, own, class_names, strict=True) if row != mine]
    shown = ", ".join(f"row {row} of {name!r}" for row, name in sorted(moved)[:_SHOWN])
    more = " and so on" if len(moved) > _SHOWN else ""
    return (
        f"the shots match another order of the rows of {place} much better: zero-shot accuracy is {found.accuracy:.0%}"
        f" with rows as they are, and {found.better:.0%} with {shown}{more}: give the rows in order of the labels"
    )


def chance_note(features: Vectors, labels: Ints, own: Ints, embeddings: Vectors, place: str) -> str | None:
    """The line on rows that know nothing of the shots, as those of another model of the same width.

    Args:
        features (m, d): unit vectors of the shots.
        labels (m,): their classes, 0 to k - 1.
        own (k,): which row is that of each class.
        embeddings (C, d): unit rows.
        place: what the class embeddings are called.

    Returns:
        A sentence; None where the rows do better than chance, or there are too few shots or classes to tell.
    """
    classes = len(own)
    if len(labels) < _FEW_SHOTS or classes < _FEW_CLASSES or np.bincount(labels, minlength=classes).min() < 2:
        return None
    # Of classes, not of shots: those of one class are alike, so that they are right or wrong together.
    nearest = (_means(features, labels, classes) @ embeddings[own].T).argmax(1)
    right = int((nearest == np.arange(classes)).sum())
    if right and special.bdtrc(right - 1, classes, 1 / classes) < _RARE:
        return None
    return (
        f"the shots of {right} of {classes} classes are nearest to their own row of {place}, no more than by chance:"
        " see that the rows are of the model that encoded the features, and in order of the labels"
    )


def rows_note(class_names: Sequence[str], place: str) -> str:
    """The line on which row belongs to which class, of labels that are text.

    Args:
        class_names: of all rows.
        place: what the class embeddings are called.

    Returns:
        A sentence.
    """
    said = [f"row {row} {name!r}" for row, name in enumerate(class_names)]
    said[0] = f"row 0 of {place} is {class_names[0]!r}"
    shown = said if len(said) <= _SHOWN + 1 else [*said[: _SHOWN - 1], "...", said[-1]]
    return f"{', '.join(shown)}: text labels are sorted"


def _means(features: Vectors, labels: Ints, classes: int) -> Vectors:
    """The mean features (classes, d) of classes."""
    sums = np.zeros((classes, features.shape[1]), np.float32)
    np.add.at(sums, labels, features)
    means: Vectors = (sums / np.bincount(labels, minlength=classes)[:, None]).astype(np.float32)
    return means


def _matched(means: Vectors, embeddings: Vectors) -> Ints:
    """The row (k,) of each class by the mean features (k, d), each row at most once."""
    cosines = means @ embeddings.T
    cosines -= cosines.mean(0)  # some rows are near to everything
    matched: Any = linear_sum_assignment(cosines, maximize=True)[1]
    return np.asarray(matched, np.int64)
