"""What a Python program gives instead of a data set: pictures of several kinds, labels of any, and a seed."""

import os
from collections.abc import Hashable, Mapping, Sequence, Set
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kngd_ray._vectors import flaw, unit
from kngd_ray.clip import ClipModel
from kngd_ray.data import Crops, content_key, file_bytes, picture_of
from kngd_ray.errors import DataError, InputError
from kngd_ray.estimator._conventions import numpy_of
from kngd_ray.storage import address

Picture = Image.Image | bytes | str | os.PathLike[str] | npt.NDArray[Any]
"""A PIL picture, a file's bytes or path, or an array (H, W) or (H, W, 1, 3 or 4) of uint8 or of floats in [0, 1]."""

_BATCH = 64  # decoded pictures held at once
_FEW_COPIES = 0.05  # of all samples, with which held-out figures are no less true
_FINE = {"ns", "ps", "fs", "as"}  # units of time that Python lacks, and numpy makes whole numbers of
_SEEDS = 2**31 - 1
_ONE = {"X": "picture", "y": "label", "classes": "label"}
_NAMED = 5  # examples in a message
_CHANNELS = 4  # at most; a picture is wider


def listed(given: Any, what: str) -> Any:
    """The items of whatever holds several, by their position.

    Args:
        given: a list, an array, a column of a table by whichever library, or anything else that can be gone through.
        what: it is called in messages.

    Returns:
        A sequence. Of a table the one column that it has; of a column its values, whatever its index.

    Raises:
        InputError: it has no order, is one item, or is a table of several columns.
    """
    if isinstance(given, (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)) or hasattr(given, "read"):
        raise InputError(f"{what} is one {_ONE[what]}, {_shown(given)}: give a list of them.")
    if isinstance(given, (Mapping, Set)):
        raise InputError(f"{what} is a {type(given).__name__}, which has no order: give a list.")
    if hasattr(given, "columns") or hasattr(given, "column_names"):
        return listed(_only_column(given, what), what)
    if isinstance(given, np.ndarray) or hasattr(given, "detach"):
        return _array(given, what)
    if isinstance(given, Sequence):
        return given
    for values in ("to_list", "to_pylist"):  # pandas and Polars, pyarrow; by itself a column goes by its index
        if hasattr(given, values):
            return getattr(given, values)()
    if hasattr(given, "__array__"):
        return _array(np.asarray(given), what)
    try:
        return list(given)
    except TypeError as error:
        raise InputError(f"{what} is of type {type(given).__name__}: give a list.") from error


def _only_column(table: Any, what: str) -> Any:
    """The column of a table that has one.

    Raises:
        InputError: it has none, or several.
    """
    names = list(table.column_names if hasattr(table, "column_names") else table.columns)  # pyarrow has both
    if len(names) != 1:
        named = ", ".join(map(str, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
        raise InputError(f"{what} is a table of {len(names)} columns ({named}): give the one of {_ONE[what]}s.")
    return table.iloc[:, 0] if hasattr(table, "iloc") else table[names[0]]


def _array(given: Any, what: str) -> Any:
    """An array or tensor along its first axis.

    Raises:
        InputError: it is a single item.
    """
    array = numpy_of(given)
    if array.ndim == 0:
        raise InputError(f"{what} is {_shown(given)} alone: give a list.")
    if what != "X":
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise InputError(f"{what} has shape {array.shape}: give one label for each {_ONE['X']}, a 1d array.")
        if array.dtype.kind in "mM" and np.datetime_data(array.dtype)[0] in _FINE:
            array = array.astype(f"{array.dtype.kind}8[us]")
        return array.tolist()
    alone = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    # channels come first in tensors, by convention; in an array it is more likely three grey pictures
    alone = alone or (hasattr(given, "detach") and array.ndim == 3 and array.shape[0] in (1, 3, 4))
    if alone or (array.ndim == 2 and array.dtype.kind in "biuf"):
        raise InputError(f"X is one array of shape {array.shape}, which looks like one picture: give a list, [X].")
    return array


def encode_pictures(clip: ClipModel, X: Sequence[Picture]) -> Tensor:
    """Features of pictures, a few in memory at once.

    Args:
        clip: the model.
        X: m pictures, as :func:`listed` has them.

    Returns:
        (m, d) unit image embeddings.
    """
    starts = range(0, len(X), _BATCH)
    batches = ([picture(X[n], n) for n in range(start, min(start + _BATCH, len(X)))] for start in starts)
    return torch.cat([torch.empty(0, clip.embed_dim), *(clip.encode_images(batch) for batch in batches)])


def encode_crops(clip: ClipModel, X: Sequence[Picture], crops: Crops) -> Tensor:
    """Features of crops of pictures, computed for a few pictures at a time.

    Args:
        clip: the model.
        X: m pictures, as :func:`listed` has them.
        crops: V of each picture: of a file those that ``train`` draws, by its bytes; of a PIL picture or an array, by
            its pixels.

    Returns:
        (m, V, d) unit image embeddings.
    """

    def of(n: int) -> list[Image.Image]:
        whole, data = picture(X[n], n), file_bytes(X[n], f"picture {n}")
        return crops.of(whole, content_key(whole.tobytes() if data is None else data))

    step = max(_BATCH // crops.count, 1)
    batches = (
        [crop for n in range(start, min(start + step, len(X))) for crop in of(n)] for start in range(0, len(X), step)
    )
    encoded = torch.cat([torch.empty(0, clip.embed_dim), *(clip.encode_images(batch) for batch in batches)])
    return encoded.unflatten(0, (len(X), crops.count))


def picture(given: Any, number: int) -> Image.Image:
    """A picture as PIL has it.

    Args:
        given: of the kinds that ``Picture`` names.
        number: of the picture, for messages.

    Returns:
        The picture, RGB.

    Raises:
        DataError: it is none.
    """
    place = f"picture {number}"
    if isinstance(given, (str, os.PathLike)) and address(given) is not None and not os.path.exists(given):
        raise DataError(f"{place}: {address(given)} is an address, and nothing is fetched: give the path of a file.")
    shape = tuple(getattr(given, "shape", ()))
    if len(shape) == 2 and 0 < int(shape[-1]) <= _CHANNELS:
        raise DataError(
            f"{place} is an array of shape {shape}, which looks like one row of a picture: give whole pictures."
        )
    return picture_of(given, place)


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
            raise DataError(f"row {first + n}: its features are not a list of numbers: give {width} floats.") from error
        if found.shape != (width,):
            raise DataError(f"row {first + n}: its features have shape {found.shape}: give {width} floats.")
        with np.errstate(over="ignore"):
            vectors[n] = found
    wrong = flaw(vectors)
    if wrong is not None:
        raise DataError(f"row {first + wrong[0]}: its feature {wrong[1]}: give one with a direction.")
    return torch.from_numpy(unit(vectors))


def labels_of(y: Any, what: str = "y") -> list[Any]:
    """Labels as Python has them.

    Args:
        y: labels, in whatever :func:`listed` takes.
        what: they are called in messages.

    Returns:
        A list.

    Raises:
        InputError: one is missing, cannot be hashed, or there is none.
    """
    labels = [_plain(label) for label in listed(y, what)]
    lost = [n for n, label in enumerate(labels) if is_missing(label)]
    if lost:
        rows = ", ".join(map(str, lost[:_NAMED])) + (", ..." if len(lost) > _NAMED else "")
        kinds = ", ".join(dict.fromkeys(str(labels[n]) for n in lost))
        raise InputError(
            f"Input {what} contains NaN or infinity: {len(lost)} of {len(labels)} labels are missing ({kinds}), at "
            f"position {rows} counted from 0: give each sample its class, or leave it out."
        )
    for n, label in enumerate(labels):
        if not isinstance(label, Hashable) or isinstance(label, Tensor):  # of several numbers
            raise InputError(f"label {n} is {label!r}: a label must be a string, a number or something hashable.")
    if not labels:
        raise InputError("there is no label: give one for each picture.")
    return labels


def _plain(label: Any) -> Any:
    """A label of numpy's types or in a tensor of no axis, which is told apart by where it lies, as Python has it."""
    single = isinstance(label, (np.ndarray, Tensor)) and label.ndim == 0
    return label.item() if single or isinstance(label, np.generic) else label


def is_missing(value: Any) -> bool:
    """Whether a value stands for one that is not there: None, NaN, NaT, infinity, or the NA of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, float):
        return not isfinite(value)
    try:
        return bool(value != value)  # what NaN is known by
    except (TypeError, ValueError, ArithmeticError, RuntimeError):  # no truth, as of arrays and tensors
        return False


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
        (C,) of strings or numbers, or of objects where these would not be the labels: numpy makes floats of whole
        numbers beyond 63 bits, and strips zeros off the end of a string.
    """
    kinds = {type(label) for label in labels}
    if len(kinds) == 1 and kinds <= {str, int, float, bool}:
        (kind,) = kinds
        for dtype in (None, np.uint64) if kind is int else (None,):
            try:
                array = np.array(labels, dtype)
            except OverflowError:  # negative, or beyond 64 bits
                continue
            if array.dtype != object and array.tolist() == list(labels) and isinstance(array[0].item(), kind):
                return array
    found = np.empty(len(labels), dtype=object)
    found[:] = list(labels)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


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
    if isinstance(random_state, (int, np.integer)) and 0 <= random_state < 2**63:
        return int(random_state)
    raise ValueError(
        f"random_state is {random_state!r}; give a number from 0 to 2^63 - 1, a generator of numpy's, or None"
    )


def said_of_copies(twins: Tensor | None) -> str | None:
    """What is to be said of samples that are there more than once.

    Args:
        twins: (N,) number of the first sample with the same features; None where all differ.

    Returns:
        A sentence, where they are enough to show; else None.
    """
    copies = 0 if twins is None else len(twins) - len(twins.unique())
    if twins is None or copies < _FEW_COPIES * len(twins):
        return None
    return (
        f"samples that repeat others: {copies} of {len(twins)}. They are held out together, but each counts as one more"
        " picture: the fit, its intervals and novelty are too sure: give each sample once"
    )
