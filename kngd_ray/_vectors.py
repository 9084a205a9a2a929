"""Rows of numbers from outside as unit vectors: their faults, and their normalisation."""

from typing import Any

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

_EXACT = 1e-6  # rounding of a unit vector in float32: such a row is of length 1 already


def flaw(vectors: npt.NDArray[Any]) -> tuple[int, str] | None:
    """The first row that has no direction.

    Args:
        vectors: (m, d) numbers.

    Returns:
        Its number and what is wrong with it, to follow "it"; None where every row has a direction.
    """
    size = lengths(vectors)
    bad = np.flatnonzero(~np.isfinite(size) | (size == 0))
    if not len(bad):
        return None
    row = int(bad[0])
    if size[row] == 0:
        return row, "has length zero"
    return row, "holds NaN" if np.isnan(vectors[row]).any() else "holds infinity or a number near it"


def lengths(vectors: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(m,) Euclidean lengths of the rows of `vectors` (m, d), in double precision; NaN and infinity pass."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: npt.NDArray[np.float64] = np.linalg.norm(vectors.astype(np.float64), axis=1)
    return found


def unit(vectors: npt.NDArray[Any]) -> Vectors:
    """Scale rows to length 1.

    Rows that have it stay as they are, bit for bit: scaling twice is scaling once, so that what was written and read
    again has the same hash.

    Args:
        vectors: (m, d), each row with a direction.

    Returns:
        (m, d) float32.
    """
    size = lengths(vectors)
    size[np.abs(size - 1) <= _EXACT] = 1
    return (vectors / size[:, None]).astype(np.float32)
