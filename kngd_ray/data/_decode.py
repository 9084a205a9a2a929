"""Pictures from untrusted bytes, files, arrays and PIL images.

Each way ends in :func:`kngd_ray._rgb.to_rgb`, so that a picture is the same by all of them.
"""

import io
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from PIL import Image, UnidentifiedImageError, features

from kngd_ray._rgb import MAX_PIXELS, REPLACE, check_size, from_array, to_rgb, undecodable
from kngd_ray.data._source import read_picture
from kngd_ray.errors import BadImage, DataError

DECODING = "3"
"""Raised whenever a picture comes out otherwise than before: features that were computed then are not read again."""

SUFFIXES = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".dib", ".gif", ".heic", ".heics", ".heif", ".heifs", ".hif", ".j2c", ".j2k",
    ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pfm", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""Of files that are taken for pictures, in small letters; what a file is, its first bytes say."""

# Pillow's other decoders are for rare formats: EPS runs a program, TGA has nothing to tell it by.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MAX_DENSE = 50_000_000  # pixels of the formats whose decoders take twice the memory: a telephone has 48 million
MAX_SCANS = 100  # of a progressive JPEG, which has ten or so: each pass is over the whole picture

_DENSE = ("AVIF", "HEIF", "JPEG2000")
_SKIP = f"{REPLACE}, or set data.on_bad_image=skip"
_AVIF = {b"avif", b"avis"}
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_KNOWN = {  # what a file is that Pillow makes nothing of, by its first bytes
    b"II*\0": "a TIFF of a kind that Pillow does not read, as of floats in colour or of 64 bits: save it as PNG",
    b"MM\0*": "a TIFF of a kind that Pillow does not read, as of floats in colour or of 64 bits: save it as PNG",
    b"\xff\x0a": "JPEG XL, which is not read: save it as PNG",
    b"\0\0\0\x0cJXL ": "JPEG XL, which is not read: save it as PNG",
    b"version https://git-lfs": "a pointer of Git LFS in the place of the file: run git lfs pull",
    b"<!DOCTYPE": "a web page, as a failed download leaves it",
    b"<html": "a web page, as a failed download leaves it",
    b"<svg": "SVG, which is not read: save it as PNG",
}


def decode(data: bytes, place: str, remedy: str = _SKIP) -> Image.Image:
    """Decode a picture to RGB, upright by its EXIF orientation, transparent parts on white.

    Args:
        data: a picture file's bytes; of an animation the first frame is taken.
        place: where the picture is, for the message.
        remedy: what to do about a bad one, for the message.

    Returns:
        The picture, mode RGB.

    Raises:
        BadImage: when the bytes are empty, no picture, cut short, or of too many pixels; see also
            :func:`kngd_ray._rgb.to_rgb`.
    """
    if not data:
        raise BadImage(f"{place}: the picture is empty; {remedy}")
    try:
        opened = _open(data)
    except UnidentifiedImageError as error:
        raise BadImage(undecodable(place, _unknown(data), remedy)) from error
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        raise BadImage(undecodable(place, str(error) or type(error).__name__, remedy)) from error
    with opened:
        return to_rgb(opened, place, remedy)


def picture_of(given: Any, place: str, remedy: str = REPLACE) -> Image.Image:
    """Read a picture of any kind that a program may hold.

    Args:
        given: a PIL picture; a file's bytes, its path, or the open file; a dictionary of `bytes` and `path`, as Hugging
            Face `datasets` has it; or an array, see :func:`kngd_ray._rgb.from_array`.
        place: where it is, for messages; a path is named itself.
        remedy: what to do about a bad one, for the message.

    Returns:
        The picture, mode RGB, the same as by :func:`decode` of its file.

    Raises:
        DataError: a file cannot be read. A BadImage tells of what cannot be decoded.
    """
    given = _entry(given)
    if isinstance(given, Image.Image):
        return to_rgb(given, place, remedy)
    data = file_bytes(given, place)
    if data is None:
        return from_array(given, place, remedy)
    return decode(data, str(given) if isinstance(given, (str, os.PathLike)) else place, remedy)


def file_bytes(given: Any, place: str) -> bytes | None:
    """Read the file of a picture of any kind that a program may hold.

    Args:
        given: as of :func:`picture_of`.
        place: where it is, for messages.

    Returns:
        Its bytes; None of a PIL picture or an array, which have no file.

    Raises:
        DataError: a file cannot be read.
    """
    given = _entry(given)
    if isinstance(given, Image.Image):
        return None
    if isinstance(given, (bytes, bytearray, memoryview)):
        return bytes(given)
    if isinstance(given, (str, os.PathLike)):
        try:
            return read_picture(given)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{place}: the file {str(given)[:200]} cannot be read ({reason}): check the path"
            ) from error
    return _content(given, place) if hasattr(given, "read") else None


def _entry(given: Any) -> Any:
    """What holds the picture: of an entry of a Hugging Face data set its bytes, or else its path."""
    if isinstance(given, Mapping) and ("bytes" in given or "path" in given):
        return given.get("path") if given.get("bytes") is None else given["bytes"]
    return given


def _content(file: Any, place: str) -> bytes:
    """The contents of an open file from its start; its position is restored.

    Raises:
        DataError: it cannot be read, or is open as text.
    """
    try:
        at = file.tell() if file.seekable() else None
        if at is not None:
            file.seek(0)
        data = file.read()
        if at is not None:
            file.seek(at)
    except (OSError, ValueError, AttributeError) as error:  # ValueError: it is closed, or text that is none
        raise DataError(f"{place}: the file cannot be read ({error}): open it anew, as open(path, 'rb')") from error
    if not isinstance(data, (bytes, bytearray)):
        raise DataError(f"{place}: the file is open as text: open it by open(path, 'rb')")
    return bytes(data)


def _open(data: bytes) -> Image.Image:
    """Read a picture's header.

    Raises:
        ValueError: when it announces too much; nothing of it is decoded.
        UnidentifiedImageError: when it is none that can be decoded here.
    """
    opened = Image.open(io.BytesIO(data), formats=_formats(data))
    check_size(opened, MAX_DENSE if opened.format in _DENSE else MAX_PIXELS)
    # a marker that cannot occur within a scan, where 0xff is followed by 0
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans")
    if opened.format == "TIFF" and _stacked(data):
        raise ValueError("a TIFF of several pages of one size: save the one that is the picture")
    return opened


def _formats(data: bytes) -> tuple[str, ...]:
    """What to take a file for.

    Raises:
        UnidentifiedImageError: it needs a package that is not installed.
    """
    brands = _brands(data)
    if brands & _AVIF:
        if not features.check("avif"):
            raise UnidentifiedImageError
        return ("AVIF",)
    if brands & _HEIF:
        if find_spec("pillow_heif") is None:
            raise UnidentifiedImageError
        import_module("pillow_heif").register_heif_opener()
        return ("HEIF",)
    return FORMATS


def _brands(data: bytes) -> set[bytes]:
    """The kinds that a file of boxes, as of MPEG, says to be of."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[n : n + 4] for n in range(16, end, 4))}


def _unknown(data: bytes) -> str:
    """What may be wrong with bytes that no decoder takes."""
    brands = _brands(data)
    if brands & _AVIF and not features.check("avif"):
        return "AVIF, which Pillow reads from version 11.3 on where it was built with it: pip install -U pillow"
    if brands & _HEIF and not brands & _AVIF and find_spec("pillow_heif") is None:
        return "HEIC, which the package pillow-heif reads: pip install 'kngd_ray[heif]'"
    start = data.lstrip()[:64]
    return next((what for first, what in _KNOWN.items() if start.startswith(first)), "no known format")


def _stacked(data: bytes) -> bool:
    """Whether a TIFF has a second page as large as the first: not a smaller one, as thumbnails are."""
    try:
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as pages:
            first = pages.size
            pages.seek(1)
            return pages.size == first
    except Exception:  # no second page, or none that can be read
        return False
