"""Pictures of any kind as 8 bits of red, green and blue: one rule, by whichever door they come.

Pillow alone clips what has more than 8 bits, shows grey floats as black, and leaves pictures lying that their camera
says are to be turned. Here

- more than 8 bits are scaled by their range: 16 bits by 65,535, floats from 0 to 1, a bit from black to white. What
  would come out black, ends at the white of another range, or lies outside of its own is refused: nobody knows what its
  white is. A picture that is black all over is black;
- transparent parts are white;
- a picture is upright, as its EXIF or XMP says. Where these cannot be read, it stays as it is, as viewers show it.
"""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from kngd_ray.errors import BadImage

MAX_PIXELS = 80_000_000  # 240 MB as RGB, below the size at which Pillow starts to warn
REPLACE = "replace it"

_WHITE_16 = 65_535
_DARK_16 = 4096  # of 65,536: twelve bits in the place of sixteen, of which none would be brighter than 15 of 255
# Fourteen bits in the place of sixteen end here if anything is white; what ends lower may be just dark, as at night.
_WHITE_14 = (15 << 10, (1 << 14) - 1)
_WHITE_IS_ZERO = 0  # of a TIFF's tag 262
_FEW_BITS = {"L;2": 85, "L;4": 17}  # from a shade of grey of so many bits to one of 8
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of EXIF that is cut short or says too much, which viewers pass over too. For good: what restores filters is not safe
# in threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin$")


def to_rgb(picture: Image.Image, place: str = "a picture", remedy: str = REPLACE) -> Image.Image:
    """Convert a picture of any mode.

    Args:
        picture: as PIL has it, opened or made; it is not changed. Of several frames the one that it stands at is taken.
        place: where it is from, for the message.
        remedy: what to do about a bad one.

    Returns:
        The picture upright, mode RGB, without metadata. Converted again it is itself.

    Raises:
        BadImage: when it cannot be decoded, is empty or too large, or its range of values is unknown.
    """
    try:
        check_size(picture)
        converted = type(picture) is Image.Image and picture.mode == "RGB" and not picture.info
        return picture if converted else _upright(picture)
    except Exception as error:  # decoders raise nearly any type on hostile bytes
        raise BadImage(undecodable(place, str(error) or type(error).__name__, remedy)) from error


def from_array(given: Any, place: str = "a picture", remedy: str = REPLACE) -> Image.Image:
    """Convert an array of pixels.

    Args:
        given: (H, W), or (H, W, channels) of grey, grey and opacity, RGB, or RGB and opacity; uint8, floats in [0, 1],
            16 bits or booleans. What NumPy makes an array of, such as a tensor, is one.
        place: where it is from, for the message.
        remedy: what to do about a bad one.

    Returns:
        The picture, mode RGB.

    Raises:
        BadImage: when the array has another shape, or values of an unknown range.
    """
    try:
        pixels = np.asarray(given)
    except Exception as error:  # lists of unequal rows, tensors on a GPU
        raise BadImage(undecodable(place, f"{type(given).__name__} is no array: {error}", remedy)) from error
    if pixels.dtype.kind not in "biuf" or pixels.ndim < 2:
        raise BadImage(
            f"{place} is {_named(given, pixels)}: give a PIL picture, a file's bytes or path, or an array (H, W) or"
            " (H, W, 3) of uint8, or of floats between 0 and 1"
        )
    if pixels.ndim == 3 and pixels.shape[2] not in {1, 2, 3, 4} and pixels.shape[0] in {1, 3, 4}:
        turn = "permute" if hasattr(given, "permute") else "transpose"
        raise BadImage(f"{place} is an array of shape {pixels.shape}: channels come last, give {turn}(1, 2, 0) of it")
    if pixels.ndim > 3 or (pixels.ndim == 3 and pixels.shape[2] not in {1, 2, 3, 4}) or not pixels.size:
        raise BadImage(
            f"{place} is an array of shape {pixels.shape}: a picture has (H, W) or (H, W, 3), none of them 0"
        )
    try:
        _check_no_mask(pixels)
        narrow = np.ascontiguousarray(_eight_bits(pixels))
    except ValueError as error:
        raise BadImage(undecodable(place, str(error), remedy)) from error
    return to_rgb(Image.fromarray(narrow[:, :, 0] if narrow.shape[2:] == (1,) else narrow), place, remedy)


def check_size(picture: Image.Image, most: int = MAX_PIXELS) -> None:
    """Refuse a picture without pixels or with too many; of an opened one nothing is decoded.

    Args:
        picture: as PIL has it.
        most: pixels that it may have.

    Raises:
        ValueError: it is.
    """
    if 0 in picture.size:
        raise ValueError(f"it has {picture.width} x {picture.height} pixels")
    if picture.width * picture.height > most:
        raise ValueError(f"{picture.width} x {picture.height} is over {most:,} pixels")


def undecodable(place: str, reason: str, remedy: str = REPLACE) -> str:
    """The sentence on a bad picture.

    Args:
        place: where it is.
        reason: what is wrong with it.
        remedy: what to do.

    Returns:
        For a BadImage.
    """
    return f"{place}: the picture cannot be decoded ({reason}); {remedy}"


def _upright(picture: Image.Image) -> Image.Image:
    negative = getattr(picture, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO
    deep = any(map(_is_deep, getattr(picture, "tile", ())))
    brighter = next((by for tile in getattr(picture, "tile", ()) if (by := _FEW_BITS.get(str(tile[-1])))), None)
    picture.load()  # which turns a TIFF, and strikes what said so
    clear = picture.info.get("transparency")
    if brighter is not None and isinstance(clear, int):  # Pillow scales the pixels, and not the shade that is clear
        picture = picture.copy()
        picture.info["transparency"] = brighter * clear
    if deep and picture.mode in {"RGB", "RGBA", "RGBX", "LA"}:  # Pillow keeps the upper eight of them
        bands: Any = picture.getextrema()
        highest = max(high for _, high in bands[: 1 if picture.mode == "LA" else 3])
        if highest <= _DARK_16 >> 8:
            raise ValueError(
                "of its numbers of 16 bits the upper four are empty, which is next to black: scale them to 8 bits,"
                " between 0 and 255"
            )
        if _WHITE_14[0] >> 8 <= highest <= _WHITE_14[1] >> 8:
            raise ValueError(
                "its numbers of 16 bits end where those of 14 bits do, which would be a quarter as bright as they are:"
                " scale them to 8 bits, between 0 and 255"
            )
    drawn = _grey(picture, negative) if picture.mode[0] in "IF" else _coloured(picture)
    method = _UPRIGHT.get(_orientation(picture))
    upright = drawn if method is None else drawn.transpose(method)
    upright.info = {}  # what was said of it, such as how to turn it, is done
    return upright


def _is_deep(tile: Any) -> bool:
    """Whether a part of an opened file has 16 bits to each colour."""
    codec, *_, how = tile
    return ";16" in str(how) or (codec in {"ppm", "ppm_plain"} and how[-1] == _WHITE_16)


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # any, as of all that is read from bytes that nobody vouches for
        return None


def _grey(picture: Image.Image, negative: bool) -> Image.Image:
    """Convert grey of more than 8 bits; Pillow turns a TIFF in which white is zero only if it has 8."""
    values = np.asarray(picture)
    grey = _eight_bits(values)
    if negative and values.dtype.kind != "f":
        grey = 255 - grey
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        grey = np.where(values == clear, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _coloured(picture: Image.Image) -> Image.Image:
    """Convert a picture of 8 bits or one."""
    if picture.mode == "La":  # from which Pillow knows one way
        picture = picture.convert("LA")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    drawn = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def _eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale values by their range.

    Raises:
        ValueError: when they lie outside of it, or so close to its lower end that it must be another.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("it has pixels that are NaN or infinite")
        if low < 0 or high > 1:
            raise ValueError(f"its floats lie between {low:g} and {high:g}: scale them to between 0 and 1")
        if 0 < high < 1 / 255:
            raise ValueError(f"its floats end at {high:g} of 1, which is black: scale them")
        return np.rint(255 * values).astype(np.uint8)
    if low < 0 or high > _WHITE_16:
        raise ValueError(f"its whole numbers lie between {low} and {high}: scale them to 8 bits, between 0 and 255")
    if high > 0 and values.itemsize == 1:
        raise ValueError(f"its numbers are int8, whose white is not known, and end at {high}: give uint8, 0 to 255")
    if 0 < high < 256:
        raise ValueError(
            f"its numbers of {8 * values.itemsize} bits end at {high}, as those of 8 bits do, and would be black as"
            " they are: save or give them as 8 bits, uint8"
        )
    if 0 < high < _DARK_16:
        raise ValueError(
            f"its numbers of {8 * values.itemsize} bits end at {high} of {_WHITE_16:,}, which is next to black: scale"
            " them to 8 bits, between 0 and 255"
        )
    if _WHITE_14[0] <= high <= _WHITE_14[1]:
        raise ValueError(
            f"its numbers of {8 * values.itemsize} bits end at {high} of {_WHITE_16:,}, where those of 14 bits do, and"
            " would be a quarter as bright as they are: scale them to 8 bits, between 0 and 255"
        )
    return (values >> 8).astype(np.uint8)


def _check_no_mask(pixels: npt.NDArray[Any]) -> None:
    """Refuse whole numbers that are all 0 or 1: a mask, or a picture scaled to [0, 1], which would be black.

    A file of 8 bits may be that, as a dark frame with a little noise is.

    Raises:
        ValueError: they are, and some of both.
    """
    colours = pixels[..., :-1] if pixels.ndim == 3 and pixels.shape[2] in {2, 4} else pixels
    if colours.dtype.kind in "iu" and colours.min() == 0 and colours.max() == 1:
        raise ValueError(
            f"its numbers are {pixels.dtype} and all 0 or 1, which would be black: scale them to 0 and 255, or give a"
            " mask as booleans"
        )


def _named(given: Any, pixels: npt.NDArray[Any]) -> str:
    return (
        f"{pixels.dtype} of shape {pixels.shape}" if pixels.dtype.kind in "biuf" else f"of type {type(given).__name__}"
    )
