"""Pictures in the cells of a table sent to the model: bytes, or base64 text in JSON."""

import base64
import binascii
import os
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from kngd_ray.data import BadImage, decode, picture_of
from kngd_ray.errors import DataError
from kngd_ray.estimator.given import is_missing

_REMEDY = "send the bytes of a picture's file, in JSON as base64"
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]+={0,2}")
_DATA_URL = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)


def picture_in(cell: Any, place: str) -> Image.Image:
    """The picture in a cell. No path is read: whoever sends one means a file of their own machine.

    Args:
        cell: a file's bytes, or base64 of them as text, as ``{"b64": ...}`` (TensorFlow Serving's), or as ``{"bytes":
            ...}`` (Hugging Face's); a PIL picture or an array.
        place: where it is, for messages.

    Returns:
        The picture, mode RGB.

    Raises:
        DataError: there is none.
        BadImage: it cannot be decoded.
    """
    if isinstance(cell, Mapping):
        known = [key for key in ("b64", "bytes") if not is_missing(cell.get(key))]
        if not known:
            has = ", ".join(map(repr, list(cell)[:5])) or "nothing"
            raise DataError(f'{place} is a dictionary with {has}, and needs "b64" or "bytes": {_REMEDY}')
        return picture_in(cell[known[0]], place)
    if is_missing(cell):
        raise DataError(f"{place} has no picture ({cell}): {_REMEDY}")
    if isinstance(cell, os.PathLike):
        cell = str(cell)
    if isinstance(cell, str):
        data = _from_base64(_DATA_URL.sub("", cell, count=1).encode("utf-8", "replace"))
        if data is None:
            raise DataError(
                f"{place} is text but not base64, {cell[:60]!r}{'...' if len(cell) > 60 else ''}: {_REMEDY}; paths and "
                "addresses are not read"
            )
        return decode(data, place, _REMEDY)
    if isinstance(cell, (bytes, bytearray, memoryview)):
        try:
            return decode(bytes(cell), place, _REMEDY)
        except BadImage:
            data = _from_base64(bytes(cell))
            if data is None:
                raise
            return decode(data, place, _REMEDY)
    return picture_of(cell, place, _REMEDY)


def _from_base64(text: bytes) -> bytes | None:
    """The bytes that a text stands for; None if it is no base64."""
    joined = b"".join(text.split())
    if not _BASE64.fullmatch(joined):
        return None
    try:
        padded = joined.rstrip(b"=") + b"=" * (-len(joined.rstrip(b"=")) % 4)
        return base64.b64decode(padded.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
    except binascii.Error:
        return None
