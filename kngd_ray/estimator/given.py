"""What a Python program gives instead of a data set: pictures of several kinds, labels of any, and a seed."""

import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kngd_ray._vectors import flaw, unit
from kngd_ray.clip import ClipModel
from kngd_ray.data import picture_of
from kngd_ray.errors import DataError, InputError, UsageError

Picture = Image.Image | bytes | str | os.PathLike[str] | npt.NDArray[Any]
"""A PIL picture, a file's bytes or path, or an array (H, W) or (H, W, 1, 3 or 4) of uint8 or of floats in [0, 1]."""

_BATCH = 64  # decoded pictures held at once
_SEEDS = 2**31 - 1


def encode_pictures(clip: ClipModel, X: Sequence[Picture]) -> Tensor:
    """Features of pictures, a few in memory at once.

    Args:
        clip: the model.
        X: m pictures.

    Returns:
        (m, d) unit image embeddings.

    Raises:
        UsageError: one picture where a list is expected.
    """
    if isinstance(X, (str, bytes, os.PathLike, Image.Image)):
        raise UsageError("X is one picture: give a list of them.")
    starts = range(0, len(X), _BATCH)
    batches = ([picture(X[n], n) for n in range(start, min(start + _BATCH, len(X)))] for start in starts)
    return torch.cat([torch.empty(0, clip.embed_dim), *(clip.encode_images(batch) for batch in batches)])


def picture(given: Any, number: int) -> Image.Image:
    """A picture as PIL has it.

    Args:
        given: of the kinds that ``Picture`` names.
        number: of the picture, for messages.

    Returns:
        The picture, RGB; a DataError tells of one that is none.
    """
    return picture_of(given, f"picture {number}")


def features_of(rows: Sequence[Any], width: int, first: int = 0) -> Tensor:
    """Features of a table as unit vectors.

    Args:
        rows: m lists or arrays of numbers.
        width: d, the length that each must have.
        first: number of the first row, for messages.

    Returns:
        (m, d) float32.

    Raises:
        DataError: a row is no list of d numbers, or has no direction.
    """
    vectors = np.empty((len(rows), width), np.float32)
    for n, row in enumerate(rows):
        try:
            found = np.asarray(row, np.float64)
        except (TypeError, ValueError) as error:
            raise DataError(f"row {first + n}: its features are no list of numbers: give {width} floats.") from error
        if found.shape != (width,):
            raise DataError(f"row {first + n}: its features have shape {found.shape}: give {width} floats.")
        with np.errstate(over="ignore"):
            vectors[n] = found
    wrong = flaw(vectors)
    if wrong is not None:
        raise DataError(f"row {first + wrong[0]}: its feature {wrong[1]}: give one with a direction.")
    return torch.from_numpy(unit(vectors))


def labels_of(y: Sequence[Any]) -> list[Any]:
    """Labels as Python has them.

    Args:
        y: labels; of an array, its values.

    Returns:
        A list.

    Raises:
        InputError: one cannot be hashed, or there is none.
    """
    labels = y.tolist() if hasattr(y, "tolist") else list(y)  # numpy's scalars are no JSON
    for n, label in enumerate(labels):
        if not isinstance(label, Hashable):
            raise InputError(f"label {n} is {label!r}: a label must be a string, a number or something hashable.")
    if not labels:
        raise InputError("there is no label: give one for each picture.")
    return labels


def ordered(labels: Sequence[Any]) -> list[Any]:
    """Distinct labels, sorted, by what they look like where they have no order.

    Args:
        labels: any.

    Returns:
        Each once.
    """
    distinct = list(dict.fromkeys(labels))
    try:
        return sorted(distinct)
    except TypeError:
        return sorted(distinct, key=lambda label: (type(label).__name__, repr(label)))


def label_array(labels: Sequence[Any]) -> npt.NDArray[Any]:
    """Labels as an array, of whatever type they are.

    Args:
        labels: C of them.

    Returns:
        (C,) of strings or numbers, or of objects.
    """
    kinds = {type(label) for label in labels}
    if len(kinds) == 1 and kinds <= {str, int, float, bool}:
        return np.array(labels)
    found = np.empty(len(labels), dtype=object)
    found[:] = list(labels)
    return found


def check_lengths(X: Any, labels: Sequence[Any]) -> None:
    """Refuse pictures without labels.

    Args:
        X: pictures.
        labels: theirs.

    Raises:
        InputError: there are not as many.
    """
    if len(X) != len(labels):
        raise InputError(f"there are {len(X)} pictures and {len(labels)} labels: give one label for each.")


def seed_of(random_state: Any) -> int:
    """The seed of a fit.

    Args:
        random_state: as scikit-learn has it.

    Returns:
        A number.

    Raises:
        ValueError: it is no seed.
    """
    if random_state is None:
        return int(np.random.default_rng().integers(_SEEDS))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(_SEEDS))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(_SEEDS))
    if isinstance(random_state, (int, np.integer)) and random_state >= 0:
        return int(random_state)
    raise ValueError(f"random_state is {random_state!r}; give a number of 0 or more, a generator of numpy's, or None")
